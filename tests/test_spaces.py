"""Observations and actions of any kind: what is shown arrives, what is allowed is done, both are learned from."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from canonical import assert_close
from gymnasium import spaces
from pydantic import TypeAdapter
from test_memories import recomputed

from environments import Environment
from environments.contract import BrokenContract, failure_of, try_out
from environments.gymnasium_env import GymnasiumEnv, GymnasiumSection
from environments.pictures import frame_picture
from environments.spaces import Observer
from model import Normal, RunningMoments
from run.config import check_config
from tests.toy_environments import toy
from tests.walk import constant, tiny
from utils import UserError, create_env
from worker import SharedArrays

PIXELS = {"low": 0, "high": 255, "dtype": np.uint8}


def box(shape, low=-1, high=1, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


class Shows(gymnasium.Env):
    """Shows samples of a space, keeps the actions that it gets, pays 2; what it returns can be bent."""

    def __init__(self, seen=None, acted=None, limit=6, bend=lambda result: result, info=dict, bend_reset=tuple):
        self.observation_space, self.action_space = seen or box((2,)), acted or spaces.Discrete(3)
        self.limit, self.bend, self.info, self.bend_reset = limit, bend, info, bend_reset
        self.shown, self.actions = [], []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.t = 0
        return self.bend_reset((self.show(), self.info()))

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        return self.bend((self.show(), 2.0, self.t == self.limit, False, self.info()))

    def show(self):
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]


gymnasium.register("Shows-v0", Shows)


def section_of(seen=None, acted=None, arguments=None, name="Shows-v0", **entries):
    arguments = {"seen": seen, "acted": acted, **(arguments or {})} if name == "Shows-v0" else {}
    section = GymnasiumSection(type="Gymnasium", name=name, **entries)
    return section.model_copy(update={"arguments": arguments})  # which a file could not hold


def make(*spaces, **entries):
    return section_of(*spaces, **entries).create()


# -------------------------------------------------------------------------------------------------------- observations

NESTED = spaces.Dict(
    b=spaces.Tuple((spaces.Discrete(4), box((3,)))),
    a=spaces.Dict(image=box((64, 48, 3), **PIXELS), on=spaces.MultiBinary(2)),
)
GRID = spaces.MultiDiscrete(np.array([[2, 3], [1, 4]]), start=np.array([[0, 1], [7, -1]]))


def last_to_first(shown):
    return shown.transpose(2, 0, 1)


def nested_vector(shown):
    number, numbers = shown["b"]
    parts = {"a": shown["a"]["on"], "b": np.concatenate([np.eye(4)[number], numbers])}
    return np.concatenate([parts[key] for key in NESTED.spaces])


def grid_vector(shown):
    chosen = zip((shown - GRID.start).ravel(), GRID.nvec.ravel(), strict=True)
    return np.concatenate([np.eye(count)[choice] for choice, count in chosen])


# Space, what the frame has to be of what was shown, what the vector has to be
OBSERVATIONS = {
    "Discrete": (spaces.Discrete(5, start=-2), None, lambda shown: np.eye(5)[shown + 2]),
    "MultiDiscrete": (GRID, None, grid_vector),
    "MultiBinary": (spaces.MultiBinary((2, 3)), None, np.ravel),
    "bytes": (box((128,), 0, 255, np.uint8), None, lambda shown: shown / 255),
    "whole": (box((4,), 3, 9, np.int64), None, lambda shown: (shown - 3) / 6),
    "unbounded": (box((3,), -(2**40), 2**40, np.int64), None, np.ravel),
    "double": (box((2, 3), dtype=np.float64), None, np.ravel),
    "scalar": (box(()), None, np.ravel),
    "small grey": (box((20, 20), **PIXELS), None, lambda shown: np.ravel(shown) / 255),
    "nested": (NESTED, lambda shown: last_to_first(shown["a"]["image"]), nested_vector),
    "grey": (box((84, 60), **PIXELS), lambda shown: shown[None], None),
    "share": (box((3, 64, 64), 0, 1), lambda shown: np.rint(shown * 255), None),
    "grid": (box((7, 7, 3), **PIXELS), last_to_first, None),
    "grid of kinds": (box((10, 10, 20), 0, 1, bool), lambda shown: last_to_first(shown) * 255, None),
    "stack": (box((8, 84, 84), **PIXELS), np.array, None),
    "black and white": (box((40, 36, 1), 0, 1, np.uint8), lambda shown: last_to_first(shown) * 255, None),
}


@pytest.mark.parametrize(("space", "as_frame", "as_vector"), OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_what_the_environment_shows_arrives(space, as_frame, as_vector):
    env = make(space)
    observation, _ = env.reset(seed=1)
    for _ in range(4):
        assert env.observation_space.contains(observation)
        parts = observation if as_frame and as_vector else {"frame" if as_frame else "vector": observation}
        shown = env.unwrapped.shown[-1]
        if as_frame:
            assert np.array_equal(parts["frame"], as_frame(shown))
            assert parts["frame"].transpose(1, 2, 0).flags.c_contiguous
        if as_vector:
            assert np.array_equal(parts["vector"], as_vector(shown).astype(np.float32))
            assert len(env.vector_names) == len(parts["vector"])
        observation = env.step(np.zeros(1, np.int64))[0]


def test_keys():
    env = make(box((5,), 1, 2), hide=[-5, "2:4"], previous_action=True, previous_reward=True, reward_scale=0.25)
    first, _ = env.reset(seed=0)
    assert np.flatnonzero(first).tolist() == [1, 4]  # no action and no reward yet
    for action in (1, 2, 0, 0, 0, 1):
        observation, reward, terminated, _, info = env.step(np.array([action]))
        assert np.flatnonzero(observation).tolist() == [1, 4, 5 + action, 8]
        assert reward == observation[-1] == 0.5
    assert terminated
    assert info == {"reward": 12.0, "length": 6}  # in the environment's own unit
    assert env.reset(seed=0)[0].tolist() == first.tolist()
    env = make(box((40, 40, 3), **PIXELS), previous_reward=True)
    assert env.reset(seed=0)[0]["vector"].tolist() == [0.0]
    env = make(spaces.Dict([("z", box((1,), 7, 8)), ("a", box((1,))), ("t", spaces.Text(3))]), observe=["a", "z"])
    assert env.vector_names == ("z[0]", "a[0]") and env.reset(seed=0)[0][0] >= 7  # the order is the space's
    assert {"a.on[0]", "b[0]=0", "b[0]=3", "b[1][2]"} < set(make(NESTED).vector_names)


def bent(place, change):
    """Return what changes one of the values that an environment returns, by a function or to a value."""

    def bend(result):
        changed = change(result[place]) if callable(change) else change
        return (*result[:place], changed, *result[place + 1 :])

    return bend


@pytest.mark.parametrize("change", [list, torch.as_tensor])
@pytest.mark.parametrize("space", [box((40, 40), **PIXELS), spaces.MultiDiscrete([2, 3])])
def test_observations_that_are_no_arrays(space, change):
    env = make(space, arguments={"bend": bent(0, change), "bend_reset": bent(0, change)})
    for observation in (env.reset(seed=0)[0], env.step(np.array([0]))[0]):
        assert env.observation_space.contains(observation)


# ------------------------------------------------------------------------------------------------------------- actions

ACTIONS = {
    "start": (spaces.Discrete(3, start=-1), [3]),
    "branches": (spaces.MultiDiscrete([2, 1, 5], dtype=np.int32), [2, 1, 5]),
    "square": (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 0], [-3, 2]])), [2, 3, 4, 5]),
    "binary": (spaces.MultiBinary((2, 2)), [2, 2, 2, 2]),
    "nested": (spaces.Dict(a=spaces.MultiDiscrete([3, 2]), b=spaces.Tuple((spaces.Discrete(4),))), [3, 2, 4]),
    "box": (spaces.Box(np.array([[-2.0], [0.0]]), np.array([[0.5], [np.inf]]), dtype=np.float64), 2),
    "bytes": (box((2, 2), 0, 9, np.uint8), 4),
    "boxes": (spaces.Dict(go=box((3,), 0, 2), turn=box(())), 4),
}


@pytest.mark.parametrize(("space", "branches"), ACTIONS.values(), ids=ACTIONS)
def test_environments_get_actions_as_their_space_samples_them(space, branches):
    env = make(acted=space, previous_action=True)
    env.reset(seed=0)
    random = np.random.default_rng(0)
    own = env.unwrapped
    for _ in range(6):
        if isinstance(branches, int):
            assert env.action_space == spaces.Box(-np.inf, np.inf, (branches,), np.float32)
            seen = env.step(random.normal(size=branches, scale=4).astype(np.float32))[0][2:]
            received = own.actions[-1].values() if isinstance(own.actions[-1], dict) else own.actions[-1:]
            assert np.allclose(seen, np.concatenate([np.ravel(part) for part in received]), atol=1e-6)
        else:
            assert env.action_space in (spaces.Discrete(branches[0]), spaces.MultiDiscrete(branches))
            action = random.integers(branches)
            seen = env.step(action)[0][2:]
            assert [part.tolist().index(1) for part in np.split(seen, np.cumsum(branches)[:-1])] == action.tolist()
            assert seen.sum() == len(branches)
        given, sampled = own.actions[-1], space.sample()
        assert space.contains(given) and type(given) is type(sampled), given
        assert getattr(given, "dtype", None) == getattr(sampled, "dtype", None)


@pytest.mark.parametrize(
    ("acted", "mask", "expected"),
    [
        (spaces.Discrete(3, start=5), np.array([0, 1, 1], np.int8), [0, 1, 1]),
        (spaces.MultiDiscrete([2, 3]), ([True, False], np.array([0, 0, 1])), [1, 0, 0, 0, 1]),
        (spaces.MultiDiscrete([2, 3]), [1, 0, 0, 0, 1], [1, 0, 0, 0, 1]),
    ],
)
def test_masks_of_actions(acted, mask, expected):
    env = make(acted=acted, arguments={"info": lambda: {"action_mask": mask}, "limit": 2})
    infos = [env.reset(seed=0)[1], env.step(np.zeros(len(env._actor.branches), np.int64))[4]]
    for info in infos:
        assert info["action_mask"].dtype == bool and info["action_mask"].tolist() == [bool(one) for one in expected]


@pytest.mark.parametrize("first", (0, 1, 2))
def test_masks_that_come_late(first):
    """At reset, at the first step, or later, where it would be too late to make use of them."""
    masks = iter([{}] * first + [{"action_mask": [0, 1, 1]}] * 3)
    env = make(arguments={"info": lambda: next(masks)})
    task = try_out(env)
    assert task.masked == (first < 2)
    if first == 2:
        with pytest.raises(BrokenContract, match="gives an action_mask, but gave none with its first observations"):
            SharedArrays(1, task).show(0, np.zeros(2), env.step(np.zeros(1, np.int64))[4]["action_mask"])


def test_masks_of_a_method(monkeypatch):
    monkeypatch.setattr(Shows, "action_masks", lambda self: [self.t == 0, self.t != 6, False], raising=False)
    env = make()
    infos = [env.reset(seed=0)[1], *(env.step(np.array([0]))[4] for _ in range(6))]
    masks = [info["action_mask"].tolist() for info in infos[:6]]
    assert masks == [[True, True, False], *[[False, True, False]] * 5]
    assert "action_mask" not in infos[6]  # nothing to be chosen at the end


# ------------------------------------------------------------------------------------------------ what is not possible

TWO = spaces.Dict(left=box((64, 64, 3), **PIXELS), right=box((64, 64, 3), **PIXELS), x=box((2,)))
LARGE = spaces.Discrete(10**7)
NOT_POSSIBLE = [
    ({"seen": spaces.Dict(words=spaces.Text(5), x=box((2,)))}, ["words is Text", "observe"]),
    ({"seen": TWO}, ["left, right", "observe"]),
    ({"seen": TWO, "observe": ["middle"]}, ["'middle'", "'left', 'right', 'x'"]),
    ({"hide": [2]}, ["hide: index 2", "size 2"]),
    ({"acted": spaces.Tuple((spaces.Discrete(2), box((2,))))}, ["action space", "Discrete(2), Box("]),
    ({"arguments": {"sene": 1}}, ["'sene'", "Shows-v0"]),
    ({"seen": LARGE}, ["Discrete(10000000)", "10,000,000", "65,536"]),
    ({"seen": box((1080, 1920, 3), **PIXELS)}, ["(3, 1080, 1920)", "6,220,800", "docs/environments.md"]),
    ({"acted": LARGE}, ["Discrete(10000000)", "actions of 10,000,000"]),
    ({"name": "no_such_module:Task-v0"}, ["no_such_module"]),
    ({"type": "Minigrid", "name": "MiniGrid-MemoryS8-v0"}, ["MiniGrid-MemoryS8", "Did you mean"]),
    ({"type": "Minigrid", "name": "CartPole-v1"}, ["CartPole-v1", "agent_view_size"]),
    ({"type": "MortarMayhem", "reset_params": {"comand_count": [5]}}, ["comand_count", "not valid"]),
    ({"type": "MortarMayhem", "reset_params": {"command_count": 5}}, ["command_count", "default, [10]"]),
]


@pytest.mark.parametrize(("entries", "named"), NOT_POSSIBLE)
def test_what_is_not_possible_is_said_in_one_line(entries, named):
    with pytest.raises(UserError) as error:
        create_env(TypeAdapter(Environment).validate_python(entries) if "type" in entries else section_of(**entries))
    assert "\n" not in str(error.value) and str(error.value).startswith("environment: ")
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize("reward", [np.ones(1), np.float32(1), torch.ones(1), True, 1])
def test_rewards_and_ends_that_are_a_number(reward):
    env = make(arguments={"bend": lambda result: (result[0], reward, reward, *result[3:]), "info": lambda: None})
    assert env.reset(seed=0)[1] == {}
    assert env.step(np.array([0]))[1:3] == (1.0, True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bend": bent(1, None)}, "float"),
        ({"bend": lambda result: result[:3] + result[4:]}, "expected 5, got 4"),
        ({"bend": bent(1, np.nan)}, "reward is not finite"),
        ({"info": lambda: {"action_mask": [1, 1]}}, "action_mask has 2 entries"),
        ({"info": lambda: {"action_mask": np.zeros(3)}}, "allows no action"),
    ],
)
def test_broken_contracts_are_named_in_one_line(arguments, named):
    with pytest.raises(Exception) as error:
        try_out(make(arguments=arguments))
    assert named in failure_of(error.value) and "\n" not in failure_of(error.value)


def test_values_outside_of_their_space():
    for space, value in ((spaces.Discrete(3, start=1), 0), (spaces.MultiDiscrete([2, 2]), [0, 2])):
        with pytest.raises(BrokenContract, match="does not contain"):
            Observer(space).vector(value)
    for value in (np.nan, 2.0, -1.0):
        with pytest.raises(BrokenContract, match="bounds"):
            Observer(box((40, 40), 0, 1)).frame(np.full((40, 40), value))


@pytest.mark.parametrize(
    "inside",
    [
        lambda env: gymnasium.wrappers.ClipReward(gymnasium.wrappers.NormalizeObservation(env), 0, 9),
        type("Mine", (gymnasium.wrappers.NormalizeReward,), {}),
    ],
)
def test_statistics_inside_an_environment_are_noticed(inside):
    (notice,) = GymnasiumEnv(inside(Shows()), 9).notices
    assert "normalize_observations" in notice and "\n" not in notice
    assert make().notices == []


# ------------------------------------------------------------------------------------------------------------ pictures


def test_what_is_drawn(monkeypatch):
    """What the environment draws, else what the agent sees."""
    env = make(spaces.Discrete(20))
    env.reset(seed=0)
    assert env.render().dtype == np.uint8
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    monkeypatch.setattr(Shows, "metadata", {"render_modes": ["rgb_array"]})
    monkeypatch.setattr(Shows, "render", lambda env: env.picture, raising=False)
    env.unwrapped.picture = picture
    assert np.array_equal(env.render(), picture) and not np.shares_memory(env.render(), picture)


def test_frames_are_looked_at():
    """The newest picture of a stack; small grids, whose numbers are kinds, by their full range."""
    frame = np.arange(12 * 1600).reshape(12, 40, 40).astype(np.uint8)
    for channels, shown in ((3, [0, 1, 2]), (4, [3, 3, 3]), (12, [9, 10, 11])):
        assert np.array_equal(frame_picture(frame[:channels]), frame[shown].transpose(1, 2, 0))
    assert frame_picture(np.full((3, 7, 7), 10, np.uint8)).max() == 250


# ------------------------------------------------------------------------------------------------------------ training

PENDULUM = {"type": "Gymnasium", "name": "Pendulum-v1", "hide": [2], "previous_action": True, "previous_reward": True}


def test_training_begins_where_sampling_ended(sampled):
    """Memory, normalisation and density are those of sampling."""
    changes = {"learning_rate_schedule": constant(1e-2), "transformer": {"positional_encoding": "relative"}}
    trainer = sampled(check_config(tiny(PENDULUM, normalize_observations=True, **changes), "test"))
    assert trainer.model.moments.count >= trainer.config.samples  # vectors are normalised
    batch, output, _ = recomputed(trainer, np.arange(trainer.config.samples))
    assert_close(output.policy.log_prob(batch.actions), batch.log_probs)
    assert_close(output.value, batch.values)


def test_forbidden_actions_have_no_probability(sampled):
    trainer = sampled(check_config(tiny(toy("Masked")), "test"))  # it breaks where a forbidden action is drawn
    batch, output, _ = recomputed(trainer, np.arange(trainer.config.samples))
    assert_close(output.policy.log_prob(batch.actions), batch.log_probs)
    odd = (batch.step % 2).bool()
    expected = [batch.step > 0, odd | True, odd, odd & False, odd | True, batch.step % 3 == 0, batch.step > 5]
    assert torch.equal(batch.masks, torch.stack(expected, dim=1))
    probabilities = torch.cat(output.policy.log_probs, dim=1).exp()
    assert torch.equal(probabilities > 0, batch.masks)
    assert torch.isfinite(output.policy.entropy()).all()
    gradient = torch.autograd.grad(output.policy.entropy().sum(), trainer.model.policy[0].weight)[0]
    assert torch.isfinite(gradient).all() and (gradient[3] == 0).all()  # the action that is never allowed


def test_moments_are_those_of_all_that_was_seen():
    moments, seen = RunningMoments(3), torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 9.0, 0.0]) + 5
    for part in seen.split([1, 19, 30]):
        moments.update(torch.cat([torch.tensor([float(len(part))]).double(), part.sum(0), (part**2).sum(0)]))
    torch.testing.assert_close(moments.mean, seen.mean(0))
    torch.testing.assert_close(moments.variance, seen.var(0, correction=0))
    assert moments(torch.full((1, 3), 1e9)).max() == 10


def test_normal_is_that_of_torch():
    torch.manual_seed(0)
    mean, log_std, actions, noise = torch.randn(7, 3), torch.randn(3), torch.randn(7, 3) * 2, torch.randn(7, 3)
    own = Normal(mean, log_std)
    reference = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(own.log_prob(actions)[:, 0], reference.log_prob(actions))
    torch.testing.assert_close(own.entropy(), reference.entropy())
    old = torch.distributions.Independent(torch.distributions.Normal(mean + 1, log_std.exp() * 2), 1)
    kl = torch.distributions.kl_divergence(old, reference)
    torch.testing.assert_close(own.kl(Normal(mean + 1, log_std + math.log(2)).parameters()), kl)
    assert torch.equal(own.sample(noise), mean + log_std.exp() * noise) and torch.equal(own.mode(), reference.mean)
