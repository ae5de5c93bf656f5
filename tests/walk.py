"""What tests train on: tiny configs, and a walk of every kind of observation and action with both kinds of ends."""

import sys

import gymnasium
import numpy as np
from gymnasium import spaces

from environments.contract import Task, try_out
from environments.section import Section
from utils import create_env

SIDE, LONGEST = 5, 12
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
SHOWN = ("frames", "vectors", "both")
ACTIONS = {
    "one branch": spaces.Discrete(4),
    "branches": spaces.MultiDiscrete([3, 2]),
    "continuous": spaces.Box(-2, 2, (2,), np.float32),
}
CORES: dict = {
    **{code: {"transformer": {"positional_encoding": code}} for code in ("relative", "learned", "absolute", "")},
    "gated": {"transformer": {"positional_encoding": "", "gtrxl": True, "layer_norm": "post"}},
    "gru": {"recurrence": {"layer_type": "gru", "embed_dim": 16, "hidden_state_size": 12}},
    "lstm": {"recurrence": {"layer_type": "lstm", "embed_dim": 16, "hidden_state_size": 12, "num_layers": 2}},
    "none": {"memoryless": {"embed_dim": 16}},
}


class Walk(gymnasium.Env):
    """Walks about a small torus; shows where that is, as a frame, and numbers of very different sizes.

    An episode ends after 1 to 23 steps, drawn at its start; after `longest` it is cut off. A frame has `scale` pixels
    to a place.
    """

    def __init__(self, shown, actions, longest=LONGEST, scale=1):
        self.shown, self.action_space, self.longest, self.scale = shown, ACTIONS[actions], longest, scale
        frame = spaces.Box(0, 255, (SIDE * scale, SIDE * scale, 1), np.uint8)
        both = spaces.Dict(frame=frame, vector=VECTOR)
        self.observation_space = {"frames": frame, "vectors": VECTOR, "both": both}[shown]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.age = self.np_random.integers(SIDE, size=2), 0
        self.end = int(self.np_random.integers(1, 2 * LONGEST))
        return self.observe(), {}

    def step(self, action):
        way = np.floor(np.resize(action, 2)).astype(int)
        self.place, self.age = (self.place + way + self.np_random.integers(2, size=2)) % SIDE, self.age + 1
        reward = float(self.place.sum() == SIDE)
        info = {"pytorch": "torch" in sys.modules}  # which processes of environments do without
        return self.observe(), reward, self.age >= self.end, self.age >= self.longest, info

    def observe(self):
        frame = np.zeros((SIDE, SIDE, 1), dtype=np.uint8)
        frame[(*self.place, 0)] = 200
        frame = frame.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        vector = np.array([self.place[0], 100 + 30 * self.place[1], self.age / 100], dtype=np.float32)
        return {"frames": frame, "vectors": vector, "both": {"frame": frame, "vector": vector}}[self.shown]


gymnasium.register("Walk-v0", Walk)


def task_of(section: Section) -> Task:
    """Return what `inspect_environment` finds, without a process of its own."""
    env = create_env(section)
    try:
        return try_out(env)
    finally:
        env.close()


def constant(value):
    """Return a schedule that does not change."""
    return {"initial": value, "final": value, "max_decay_steps": 10}


def tiny(environment, **changes):
    """Return a config that trains in moments, with a transformer unless `changes` name another memory."""
    transformer = {"num_blocks": 2, "embed_dim": 16, "num_heads": 2, "memory_length": 8, "positional_encoding": ""}
    if not {"recurrence", "memoryless"} & changes.keys():
        changes["transformer"] = transformer | changes.get("transformer", {})
    sizes = {"updates": 6, "epochs": 1, "n_workers": 4, "worker_steps": 16, "n_mini_batch": 4, "hidden_layer_size": 8}
    schedules = {f"{name}_schedule": constant(1e-3) for name in ("learning_rate", "beta", "clip_range")}
    return {"environment": environment, "checkpoint_interval": 1} | sizes | schedules | changes


def walk(shown, actions, arguments=None, **changes):
    """Return the tiny config of a walk."""
    arguments = {"shown": shown, "actions": actions} | (arguments or {})
    environment = {"type": "Gymnasium", "name": "tests.walk:Walk-v0", "arguments": arguments}
    environment["max_episode_steps"] = arguments.get("longest", LONGEST)
    learned = {"prediction_coefficient": 0.5, "normalize_observations": shown != "frames"}
    return tiny(environment, **learned | changes)
