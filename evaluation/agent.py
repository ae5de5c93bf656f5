"""Acting with a trained model: in a loop of one's own, and in many unseen episodes at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from environments import BrokenContract
from environments.contract import Task
from environments.gymnasium_env import CartPoleSection, GymnasiumEnv, GymnasiumSection
from environments.section import Section
from environments.spaces import Actor
from memory import ObservationStore, make_memory, policy_step
from model import ActorCriticModel, Output, action_noise
from run.checkpoint import load_model
from run.config import Config
from run.distributed import Ranks
from utils import EnvironmentFailure, UserError, create_env, planned_seed
from worker import SharedArrays, Workers, inspect_environment

# How many environments are played at once: enough for matrix products of a good size, and few enough that most of them
# are still busy with their last episode when the longest ends.
ENVIRONMENTS = 50
# How many observations are kept before all are forgotten; the features of frames that come again are reused till then.
OBSERVATIONS_KEPT = 2048
# The fewest steps between two moves of the memory to the front of the timeline.
SHORTEST_ROLLOUT = 64


class Agent:
    """A model that acts in n environments and remembers what happens there, however long the episodes are.

    The memory, and all that the model is told, is that of training: `policy_step`.

    Args:
        environments: n; None for one whose observations and actions come singly.
        seed: what actions are drawn from; with `deterministic`, they are the most probable ones instead.
        own: which of how many environments of all ranks these are; by default there are no others.
        registered: one such environment, if observations and actions are those of what is registered with Gymnasium;
            by default they are those of `create_env(agent.section)`.
    """

    def __init__(
        self, model: ActorCriticModel, config: Config, task: Task, environments: int | None = None,
        deterministic: bool = False, seed: int = 0, own: tuple[range, int] | None = None,
        registered: GymnasiumEnv | None = None,
    ) -> None:  # fmt: skip
        device, self.count, self.single = next(model.parameters()).device, environments or 1, environments is None
        self.model, self.task, self.section, self.deterministic = model, task, config.environment, deterministic
        self.registered, shown = registered, registered.env if registered else task
        self.observation_space, self.action_space = shown.observation_space, shown.action_space
        self.actor = Actor(self.action_space)
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
        seed: int = 0, wrapped: bool = False,
    ) -> "Agent":  # fmt: skip
        """Return the agent of a model's file; UserError as `load_for_play` raises it.

        If `wrapped`, observations and actions are those of `create_env(agent.section)` even where the task is one that
        is registered with Gymnasium. No environment is made then.
        """
        model, config, task, _ = load_model(Path(path), torch.device(device))
        env = None if wrapped else create_env(config.environment)
        if env is not None:
            check_unchanged(path, config, task, replace(env.task, masked=task.masked))
        registered = env if isinstance(config.environment, GymnasiumSection | CartPoleSection) else None
        return cls(model.eval(), config, task, environments, deterministic, seed, registered=registered)

    def reset(self, which: int | Sequence[int] | Sequence[bool] | np.ndarray | None = None) -> None:
        """Begin new episodes in all environments, or in those that `which` names by number or by True.

        Due before the first observation of each episode. After each step of a vector environment, which has to be made
        with AutoresetMode.SAME_STEP, it is `agent.reset(terminated | truncated)`.
        """
        rows = np.asarray(which if which is not None else range(self.count))
        self.arrays.steps[rows if rows.size else []] = 0

    def act(self, observation: Any, mask: Any = None, reward: Any = None, ended: Any = None) -> Any:
        """Return an action of `action_space`, or n of them as a vector environment takes them.

        UserError if something is missing or not as declared, or an episode has ended without `reset`; nothing is
        remembered of such a call, and a correct one can follow.

        Args:
            observation: of `observation_space`, or n of them as a vector environment returns them.
            mask: `info["action_mask"]` where the environment says which actions are allowed, or n of them.
            reward: of the last step, or n of them, for models that see it (`previous_reward`); ignored at an episode's
                first observation.
            ended: whether the last step ended its episode (`terminated or truncated`), or n of these. Without it, a
                `reset` that was forgotten is noticed only where an episode gets longer than it can be.
        """
        given = [[observation], [mask], [reward], [ended]]
        if not self.single:
            try:
                observations = [*iterate(batch_space(self.observation_space, self.count), observation)]
                given = [
                    observations,
                    *([None] * self.count if part is None else part for part in (mask, reward, ended)),
                ]
                complete = {len(part) for part in given} == {self.count}
            except TypeError:  # there is no length
                complete = False
            if not complete:
                raise UserError(
                    f"agent.act: each argument should have an entry for each of the {self.count} environments"
                )
        for index, shown in enumerate(zip(*given, strict=True)):
            try:
                self._show(index, *shown)
            except BrokenContract as error:
                raise UserError(f"agent.act: environment {index}: {error}") from error
        self.advance()
        # In groups as evaluation has them, so that numbers are rounded alike.
        half, self.looked = self.count // 2, self.arrays.steps.copy()
        found = [self.observe(self.arrays, rows) for rows in (slice(0, half), slice(half, self.count)) if rows.stop]
        self.outputs, self.actions = [output for output, _ in found], np.concatenate([actions for _, actions in found])
        self.arrays.steps += 1
        actions = [self.actor.action(action) for action in self.actions]
        if self.single:
            return actions[0]
        return concatenate(self.action_space, actions, create_empty_array(self.action_space, self.count))

    def _show(self, index: int, observation: Any, mask: Any, reward: Any, ended: Any) -> None:
        """Show the model what it is to see of an environment; BrokenContract where that is not as declared."""
        limit, step = self.task.max_episode_steps, self.arrays.steps[index]
        if (ended and step) or (limit is not None and step >= limit):
            raise BrokenContract(f"its episode has ended, after {step} steps: agent.reset is due")
        if (mask is not None) != self.task.masked:
            raise BrokenContract("has an action_mask, and training had none" if mask is not None
                                 else "needs mask=info['action_mask'], as in training")  # fmt: skip
        if self.registered is not None:
            last = (self.actions[index], reward) if step else (None, None)
            observation = self.registered.observed(observation, *last)
        elif not self.observation_space.contains(observation):
            raise BrokenContract(f"observation is not one of {self.observation_space}")
        self.arrays.show(index, observation, None if mask is None else self.actor.mask(mask))

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
    check_unchanged(path, config, task, inspect_environment(config.environment)[0])
    return model.eval(), config, task, run


def check_unchanged(path: str | Path, config: Config, task: Task, found: Task) -> None:
    """Raise UserError if an environment is not what it was when a model was trained on it."""
    if found != task:
        kind = config.environment.type
        raise UserError(f"{path}: was trained where {kind} was {task}; what is installed here is {found}")


def play_episodes(
    model: ActorCriticModel, config: Config, task: Task, seeds: list[int], repetitions: int = 1, *,
    action_seed: int = 0, deterministic: bool = False, processes: int = 1, max_steps: int | None = None,
    progress: Callable[[int], None] = lambda count: None, ranks: Ranks | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Play an episode per reset seed and repetition, many at once; EnvironmentFailure, in one line, where one fails.

    Every environment has a fixed list of episodes, so that processes do not matter; it plays on until all are done.

    Args:
        action_seed: what all actions are drawn from; with `deterministic`, they are the most probable ones instead.
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
