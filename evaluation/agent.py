"""Acting with a trained model: in a loop of one's own, and in many unseen episodes at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector.utils import batch_space, iterate

from environments.contract import Task
from environments.section import Section
from memory import ObservationStore, make_memory, policy_step
from model import ActorCriticModel, Output, action_noise
from run.checkpoint import load_model
from run.config import Config
from run.distributed import Ranks
from utils import EnvironmentFailure, UserError, planned_seed
from worker import SharedArrays, Workers, inspect_environment

# How many environments are played at once: enough for matrix products of a good size, and few enough that most of them
# are still busy with their last episode when the longest ends.
ENVIRONMENTS = 50
# How many observations are kept before all are forgotten; the features of frames that come again are reused till then.
OBSERVATIONS_KEPT = 2048
# The fewest steps between two moves of the memory to the front of the timeline.
SHORTEST_ROLLOUT = 64


class Agent:
    """A model that acts in n environments of `create_env(agent.section)`, and remembers however long episodes are.

    The memory, and all that the model is told, is that of training: `policy_step`.

    Args:
        environments: n; None for one whose observations and actions come singly.
        seed: what actions are drawn from; unless `deterministic`: then they are the most probable ones.
        own: which of how many environments of all ranks these are; by default there are no others.
    """

    def __init__(
        self, model: ActorCriticModel, config: Config, task: Task, environments: int | None = None,
        deterministic: bool = False, seed: int = 0, own: tuple[range, int] | None = None,
    ) -> None:  # fmt: skip
        device, self.count, self.single = next(model.parameters()).device, environments or 1, environments is None
        self.model, self.task, self.section, self.deterministic = model, task, config.environment, deterministic
        space = task.observation_space
        self.observation_space = space if self.single else batch_space(space, self.count)
        self.own, self.everyone = own or (range(self.count), self.count)
        self.length = config.transformer.memory_length if config.transformer else 0
        self.rollout = max(self.length, SHORTEST_ROLLOUT)
        self.memory = make_memory(model, self.count, self.rollout, device)
        self.capacity = max(OBSERVATIONS_KEPT, self.count)
        self.store = ObservationStore(task, config.core.embed_dim, self.capacity, device)
        self.generator, self.t = torch.Generator(device).manual_seed(seed), -1
        # What `act` was shown, and how many steps each environment's episode has had.
        self.arrays = SharedArrays(self.count, task)
        # Of the last call of `act`: the episode steps, the outputs and the actions (n, branches).
        self.looked, self.outputs = np.zeros(self.count, dtype=np.int64), list[Output]()
        self.actions = np.zeros((self.count, task.action_size))

    @classmethod
    def load(
        cls, path: str | Path, device: str = "cpu", environments: int | None = None, deterministic: bool = False,
        seed: int = 0,
    ) -> "Agent":  # fmt: skip
        """Return the agent of a model's file; UserError as `load_for_play` raises it."""
        model, config, task, _ = load_for_play(Path(path), torch.device(device))
        return cls(model, config, task, environments, deterministic, seed)

    def reset(self, which: int | Sequence[int] | Sequence[bool] | np.ndarray | None = None) -> None:
        """Begin new episodes in all environments, or in those that `which` names by number or by True.

        Due before the first observation of each episode. After each step of a vector environment, which has to be made
        with AutoresetMode.SAME_STEP, it is `agent.reset(terminated | truncated)`.
        """
        self.arrays.steps[... if which is None else np.asarray(which)] = 0

    def act(self, observation: Any, mask: np.ndarray | None = None) -> Any:
        """Return an action for what the environment shows, or n of them as a vector environment takes them.

        The mask, (sum of branches,) or (n, sum of branches), is `info["action_mask"]` where the environment says which
        actions are allowed. UserError if one is missing or not as declared, or an episode gets longer than it can be,
        for `reset` was forgotten; nothing is remembered of it, and what is right can follow.
        """
        if not self.observation_space.contains(observation):
            raise UserError(f"agent.act: observation is none of create_env(agent.section), {self.observation_space}")
        if mask is None and self.task.masked:
            raise UserError("agent.act: needs mask=info['action_mask'], as in training")
        if self.arrays.steps.max() >= (self.task.max_episode_steps or math.inf):
            raise UserError(f"agent.act: an episode has ended, after {self.arrays.steps.max()} steps: call agent.reset")
        observations = [observation] if self.single else iterate(self.observation_space, observation)
        masks = [mask] * self.count if self.single or mask is None else mask
        for index, shown in enumerate(zip(observations, masks, strict=True)):
            self.arrays.show(index, *shown)
        self.advance()
        # In groups as evaluation has them, so that numbers are rounded alike.
        half, self.looked = self.count // 2, self.arrays.steps.copy()
        found = [self.observe(self.arrays, rows) for rows in (slice(0, half), slice(half, self.count)) if rows.stop]
        self.outputs, self.actions = [output for output, _ in found], np.concatenate([actions for _, actions in found])
        self.arrays.steps += 1
        return self._unbatched(self.actions[:, 0] if len(self.task.branches) == 1 else self.actions)

    @property
    def value(self) -> Any:
        """The discounted return, of rewards as they are learned from, expected at the last step, or n of them."""
        return self._unbatched(np.concatenate([output.value.cpu().numpy() for output in self.outputs]))

    @property
    def attention(self) -> Any:
        """(blocks, heads, m) weights of the m steps before the last one, oldest first, or n of these; None without."""
        if not self.length:
            return None
        rows = [np.stack([block[row].float().cpu().numpy() for block in output.attention])
                for output in self.outputs for row in range(len(output.value))]  # fmt: skip
        seen = np.minimum(self.looked, self.length)
        return self._unbatched([row[:, :, row.shape[2] - most :] for row, most in zip(rows, seen, strict=True)])

    def _unbatched(self, rows: Any) -> Any:
        """Return n rows, or the only one where observations come singly."""
        return rows[0] if self.single else rows

    # ------------------------------------------------------------------------------------ one step, whoever asks for it

    def advance(self) -> None:
        """Go one column on; all environments act once between two calls."""
        self.t += 1
        if self.t == self.rollout:
            self.memory.roll(self.rollout)
            self.t = 0
        noise = action_noise(self.task, (self.everyone,), self.generator)
        self.noise = noise[self.own.start : self.own.stop]

    def observe(self, arrays: SharedArrays, rows: slice) -> tuple[Output, np.ndarray]:
        """Look at what n neighbouring environments show; return the model's output and the actions (n, branches)."""
        if max(len(self.store), self.store.count) + rows.stop - rows.start > self.capacity:
            self.store.clear()
        step = arrays.steps[rows].copy()
        output, *_ = policy_step(self.model, self.model, self.memory, self.store, arrays, rows, self.t, step)
        actions = output.policy.mode() if self.deterministic else output.policy.sample(self.noise[rows])
        return output, actions.cpu().numpy()


def task_name(section: Section) -> str:
    """Return what a person calls the task of a config's `environment` section."""
    return getattr(section, "name", None) or section.type


def load_for_play(path: Path, device: torch.device) -> tuple[ActorCriticModel, Config, Task, dict]:
    """Read a model as `load_model` does; UserError where its environment is not here, or no longer what it was."""
    model, config, task, run = load_model(path, device)
    found, kind = inspect_environment(config.environment)[0], config.environment.type
    if found != task:
        raise UserError(f"{path}: was trained where {kind} was {task}; what is installed here is {found}")
    return model.eval(), config, task, run


def play_episodes(
    model: ActorCriticModel, config: Config, task: Task, seeds: list[int], repetitions: int = 1, *,
    action_seed: int = 0, deterministic: bool = False, processes: int = 1, max_steps: int | None = None,
    progress: Callable[[int], None] = lambda count: None, ranks: Ranks | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Play an episode per reset seed and repetition, many at once; EnvironmentFailure, in one line, where one fails.

    Every environment has a fixed list of episodes, so that processes do not matter; it plays on until all are done.

    Args:
        action_seed: all actions are drawn from it; unless `deterministic`: then they are the most probable ones.
        processes: how many step the environments.
        max_steps: after how many steps an episode is cut, if at all.
        progress: called with the number of episodes that have just ended.
        ranks: all of them, which share the environments out; by default there are no others.

    Returns:
        Per episode, ordered as given, its `seed`, its `repetition` (from 0) and what the environment reports of it
        (reward, length, …); `cut` is 1 where it was cut.
    """
    planned = [(seed, repetition) for repetition in range(repetitions) for seed in seeds]
    count, ranks = min(ENVIRONMENTS, len(planned)), ranks or Ranks()
    plan, own = [planned[index::count] for index in range(count)], ranks.share(count)
    found: dict[tuple[int, int], dict[str, float]] = {}
    try:
        with ranks.agree_on(EnvironmentFailure):
            if own:
                agent = Agent(model, config, task, len(own), deterministic, action_seed, (own, count))
                found = dict(_play(agent, plan, processes, max_steps, progress))
    except EnvironmentFailure as error:  # on one line: of a traceback, what it ends in
        where, *trace = str(error).splitlines()
        raise EnvironmentFailure(f"{task_name(config.environment)}, {' '.join([where, *trace[-1:]])}") from error
    infos = {episode: info for part in ranks.gather(found) for episode, info in part.items()}
    return [{"seed": s, "repetition": r} | infos[s, r] for s in seeds for r in range(repetitions)]


def _play(
    agent: Agent, plan: list[list[tuple[int, int]]], processes: int, max_steps: int | None,
    progress: Callable[[int], None],
) -> Iterator[tuple[tuple[int, int], dict[str, float]]]:  # fmt: skip
    """Play until each of an agent's environments has ended its planned episodes; yield these with what they report.

    The environments of one group step while the model looks at the other group.
    """
    own, stepping = agent.own, set()
    seed = partial(planned_seed, [[seed for seed, _ in episodes] for episodes in plan])
    workers = Workers(agent.section, agent.task, len(own), seed, processes, 2, own.start, max_steps)
    plan = [plan[index] for index in own]
    with closing(workers):
        workers.start()
        while any(episode.number < len(planned) for episode, planned in zip(workers.episodes, plan, strict=True)):
            agent.advance()
            for group in workers.groups:
                if group in stepping:
                    for index, info in workers.receive(group):
                        number = workers.episodes[index].number - 1
                        if number < len(plan[index]):
                            progress(1)
                            yield plan[index][number], info
                workers.send(group, agent.observe(workers.arrays, slice(group.start, group.stop))[1])
                stepping.add(group)
