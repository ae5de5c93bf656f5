"""What watching and evaluating share: a model that acts with its memory, unseen episodes, and many of them at once."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from environments.contract import Task
from environments.section import Section
from memory import ObservationStore, make_memory, policy_step
from model import ActorCriticModel, Output, action_noise
from run.checkpoint import load_model
from run.config import Config
from run.distributed import Ranks
from utils import EnvironmentFailure, UserError, seed_range
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

    The memory, and all that the model is told, is that of training: `policy_step` on a `Timeline`.

    Args:
        model: the actor-critic.
        config: its config.
        task: what the environments are like.
        count: n.
        deterministic: whether it takes the most probable actions instead of drawing them.
        own: which of how many environments of all processes these are; by default there are no others.
    """

    def __init__(
        self,
        model: ActorCriticModel,
        config: Config,
        task: Task,
        count: int,
        deterministic: bool,
        own: tuple[range, int] | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.task, self.deterministic = model, task, deterministic
        self.own, self.everyone = own or (range(count), count)
        self.section = config.environment
        self.rollout = max(config.transformer.memory_length if config.transformer else 0, SHORTEST_ROLLOUT)
        self.memory = make_memory(model, count, self.rollout, device)
        self.capacity = max(OBSERVATIONS_KEPT, count)
        self.store = ObservationStore(task, config.core.embed_dim, self.capacity, device)
        self.generator = torch.Generator(device)
        self.step = np.zeros(count, dtype=np.int64)  # episode step of each environment
        self.t = -1

    def advance(self) -> None:
        """Go one column on; all environments act once between two calls."""
        self.t += 1
        if self.t == self.rollout:
            self.memory.roll(self.rollout)
            self.t = 0
        noise = action_noise(self.task, (self.everyone,), self.generator)
        self.noise = noise[self.own.start : self.own.stop]

    def act(self, arrays: SharedArrays, rows: slice) -> tuple[Output, np.ndarray]:
        """Look at what n neighbouring environments show; return the model's output and the actions (n, branches)."""
        if max(len(self.store), self.store.count) + rows.stop - rows.start > self.capacity:
            self.store.clear()
        step = self.step[rows]
        output, *_ = policy_step(self.model, self.model, self.memory, self.store, arrays, rows, self.t, step)
        policy = output.policy
        actions = policy.mode() if self.deterministic else policy.sample(self.noise[rows])
        return output, actions.cpu().numpy()

    def count_step(self, rows: slice, ended: np.ndarray) -> None:
        """Count a step of n neighbouring environments; where an episode ended (n,), the next one begins."""
        self.step[rows] = np.where(ended, 0, self.step[rows] + 1)


def task_name(section: Section) -> str:
    """Return what a person calls the task of a config's `environment` section."""
    return getattr(section, "name", None) or section.type


def first_unseen_seed(environment: Section) -> int:
    """Return the first episode seed that training cannot have drawn."""
    start, count = seed_range(environment)
    return start + count


def load_for_play(path: Path, device: torch.device) -> tuple[ActorCriticModel, Config, Task, dict]:
    """Read a model as `load_model` does and check that its environment is still what it was trained on.

    Raises:
        UserError: if the file is not a model, or the environment cannot be created or has changed.
    """
    model, config, task, run = load_model(path, device)
    found, _ = inspect_environment(config.environment)
    if found != task:
        kind = config.environment.type
        raise UserError(f"{path}: was trained where {kind} was {task}; what is installed here is {found}")
    return model.eval(), config, task, run


def play_episodes(
    model: ActorCriticModel,
    config: Config,
    task: Task,
    seeds: list[int],
    repetitions: int = 1,
    *,
    action_seed: int = 0,
    deterministic: bool = False,
    processes: int = 1,
    max_steps: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
    world: Ranks | None = None,
) -> list[dict[str, float]]:
    """Play an episode per seed and repetition, many at once.

    Every environment has a fixed list of episodes, so that processes do not matter; it plays on until all are done.

    Args:
        model: on the device where it is to compute, with its `config` and `task`.
        seeds: reset seeds of the episodes.
        repetitions: how often each seed is played.
        action_seed: all actions are drawn from it.
        deterministic: whether the most probable actions are taken instead.
        processes: number of processes that step the environments.
        max_steps: after how many steps an episode is cut, if at all.
        progress: called with the number of episodes that have just ended.
        world: all processes, which share the episodes out; by default there are no others.

    Returns:
        Per episode, ordered as given, its `seed`, its `repetition` (from 0) and what the environment reports of it
        (reward, length, …); `cut` is 1 where it was cut.

    Raises:
        EnvironmentFailure: in one line, if an environment breaks its contract or fails.
    """
    planned = [(seed, repetition) for repetition in range(repetitions) for seed in seeds]
    count = min(ENVIRONMENTS, len(planned))
    plan = [planned[index::count] for index in range(count)]
    own, found = (world := world or Ranks()).share(count), {}
    with naming(config.environment), world.agree_on(EnvironmentFailure):
        if own:
            agent = Agent(model, config, task, len(own), deterministic, (own, count))
            agent.generator.manual_seed(action_seed)
            found = _play(agent, plan, processes, max_steps, progress)
    infos = {plan[index][number]: info for part in world.gather(found) for (index, number), info in part.items()}
    return [{"seed": s, "repetition": r} | infos[s, r] for s in seeds for r in range(repetitions)]


@contextmanager
def naming(environment: Section) -> Iterator[None]:
    """Let a failure say on one line which task it was of, and what its traceback ends in."""
    try:
        yield
    except EnvironmentFailure as error:
        where, *trace = str(error).splitlines()
        raise EnvironmentFailure(f"{task_name(environment)}, {' '.join([where, *trace[-1:]])}") from error


def planned_seed(seeds: list[list[int]], index: int, episode: int) -> int:
    """Return the reset seed of an environment's episode; behind the last one that counts, the list begins anew."""
    return seeds[index][episode % len(seeds[index])]


def _play(
    agent: Agent,
    plan: list[list[tuple[int, int]]],
    processes: int,
    max_steps: int | None,
    progress: Callable[[int], None],
) -> dict[tuple[int, int], dict[str, float]]:
    """Play until each of an agent's environments has ended its episodes; return infos by (environment, episode).

    The environments of one group step while the model looks at the other group.

    Args:
        agent: plays.
        plan: (seed, repetition) of the episodes of each environment, of all processes.
        processes: number of processes that step the environments.
        max_steps: after how many steps an episode is cut.
        progress: called with the number of episodes that have just ended.
    """
    own, found, stepping = agent.own, {}, set()
    episode_seed = partial(planned_seed, [[seed for seed, _ in episodes] for episodes in plan])
    wanted = [len(plan[index]) for index in own]
    workers = Workers(
        agent.section, agent.task, len(own), episode_seed, processes, min(2, len(own)), own.start, max_steps
    )
    arrays = workers.arrays
    with closing(workers):
        workers.start()
        while any(episode.number < number for episode, number in zip(workers.episodes, wanted, strict=True)):
            agent.advance()
            for group in workers.groups:
                rows = slice(group.start, group.stop)
                if group in stepping:
                    for index, info in workers.receive(group):
                        number = workers.episodes[index].number - 1
                        if number < wanted[index]:
                            found[own[index], number] = info
                            progress(1)
                    agent.count_step(rows, arrays.terminated[rows] | arrays.truncated[rows])
                workers.send(group, agent.act(arrays, rows)[1])
                stepping.add(group)
    if len(found) < sum(wanted):
        raise EnvironmentFailure("a process died, and its episodes cannot be repeated: the task is not deterministic")
    return found
