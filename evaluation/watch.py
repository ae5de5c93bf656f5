"""Watching an agent: an episode at a time, drawn with what the agent remembers, as a video or for TensorBoard."""

import itertools
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch.utils.tensorboard.summary import Summary

from environments.contract import Task, failure_of
from evaluation.agent import Agent, task_name
from evaluation.video import film
from model import ActorCriticModel
from run.config import Config
from utils import EnvironmentFailure, create_env, training_seeds

# TensorBoard's episode: how many steps at most, pixels per inch, how fast.
SUMMARY_STEPS, SUMMARY_DPI, SUMMARY_FPS = 200, 80, 6
# How long a video shows how an episode ended, in seconds.
HOLD_SECONDS = 1.5
# Of pictures: their width in inches, and pixels per inch.
WIDTH, DPI = 7.2, 100
# So many past steps are shown; the fewest that fill a strip, and the most of an agent whose memory has no length.
THUMBNAILS, SHORTEST_STRIP, LONGEST_STRIP = 5, 16, 512
# Numbers side by side and on top of each other, at most, and the characters of each.
PANEL_COLUMNS, PANEL_ROWS, CELL_LENGTH = 3, 5, 27
INK, FAINT, EMPTY, MARK = "#1e1e28", "#6e6e7d", "#e8e8ee", "#d55e00"


@dataclass
class Moment:
    """What there is to see at one step of an episode; at its end, how it ended, and the agent as it was last."""

    step: int  # its number in the episode; at the end, how many steps the episode had
    frame: np.ndarray | None  # (H, W, 3) uint8 global view, None where nothing is rendered
    view: np.ndarray | None  # (h, w, 3) uint8 of what the agent sees, None where that is numbers, or nothing is drawn
    action: np.ndarray  # (branches,) of the agent
    value: float  # the return that the agent expects from here on
    reward: float  # sum of the rewards up to here
    # (strips, heads, n) of the last n steps, oldest first: their attention weights in each block, or by how much each
    # changed the state of a recurrent agent (1, 1, n)
    past: np.ndarray
    change: float  # by how much this step changes that state, the mean over its entries; 0 without one
    probabilities: list[np.ndarray]  # (actions,) of each branch; none where actions are numbers
    numbers: dict[str, str]  # by name, in words: what the agent sees, and its actions where they are numbers
    result: dict[str, float] | None = None  # what the environment reports of the finished episode; None before its end


class Player:
    """One environment in this process, played by a model, its episodes cut after `max_steps`; `render` draws pictures.

    Attributes:
        agent: acts in the running episode, which has had so many `steps`.
        strips: the name of each strip of `Moment.past`; unit: what it holds; longest: the most steps in it.
    """

    def __init__(
        self, model: ActorCriticModel, config: Config, task: Task, deterministic: bool = False, render: bool = True,
        max_steps: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.task, self.deterministic, self.render = model, config, task, deterministic, render
        self.max_steps, self.steps = math.inf if max_steps is None else max_steps, 0
        sys.argv = sys.argv[:1]  # for modules that parse their command line when they are imported
        self.env = create_env(config.environment, "rgb_array" if render else None)
        self.strips, self.unit, self.longest = ["state"] if config.recurrence else [], "change", LONGEST_STRIP
        if config.transformer is not None:
            self.strips = [f"block {block + 1}" for block in range(config.transformer.num_blocks)]
            self.unit, self.longest = "attention", config.transformer.memory_length

    def close(self) -> None:
        """Close the environment; where that fails, there is nothing left to lose."""
        with suppress(Exception):
            self.env.close()

    def play(self, seed: int) -> Iterator[Moment]:
        """Play one episode, with one seed for environment and actions; yield each step before it is taken, and the end.

        EnvironmentFailure, in one line, if the environment fails, breaks its contract or cannot be drawn.
        """
        self.steps = 0
        try:
            yield from self._play(seed)
        except (Exception, SystemExit) as error:  # whatever an environment does
            where = f"{task_name(self.config.environment)}, reset seed {seed}, step {self.steps}"
            raise EnvironmentFailure(f"{where}: {failure_of(error)}") from error

    def _play(self, seed: int) -> Iterator[Moment]:
        self.agent = agent = Agent(self.model, self.config, self.task, None, self.deterministic, seed)
        (observation, info), ended = self.env.reset(seed=seed), False
        changes = deque[float](maxlen=LONGEST_STRIP)
        while not ended and self.steps < self.max_steps:
            everything = np.ones(sum(self.task.branches), bool) if self.task.masked else None
            agent.act(observation, info.get("action_mask", everything))
            past = np.array(changes)[None, None] if agent.attention is None else agent.attention
            changes.append(self._change() if self.config.recurrence else 0.0)
            # Rewards are shown as they are reported, not as they are learned from.
            value, reward = float(agent.value) / self.env.reward_scale, self.env.numbers_so_far()["reward"]
            moment = Moment(
                self.steps, *self._pictures(), agent.actions[0], value, reward, past, changes[-1],
                self._probabilities(), self._numbers(),
            )  # fmt: skip
            yield moment
            self.steps += 1
            observation, _, terminated, truncated, info = self.env.step(agent.actions[0])
            ended = terminated or truncated
        result, (frame, view) = self.env.numbers_so_far() | (info if ended else {"cut": 1.0}), self._pictures()
        yield replace(moment, step=self.steps, frame=frame, view=view, reward=result["reward"], result=result)

    def _pictures(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        return (self.env.render(), self.env.agent_view()) if self.render else (None, None)

    def _change(self) -> float:
        memory, t = self.agent.memory, self.agent.t
        before, after = memory.states[0, t : t + 2].cpu().numpy()  # type: ignore[union-attr]
        return float(np.abs(after - before * (self.steps > 0)).mean())

    def _probabilities(self) -> list[np.ndarray]:
        if self.task.continuous:
            return []
        together = self.agent.outputs[0].policy.parameters()[0].exp().cpu().numpy()
        return np.split(together, np.cumsum(self.task.branches)[:-1])

    def _numbers(self) -> dict[str, str]:
        """Return `Moment.numbers`, actions as the environment takes them, clipped; as many as there is room for."""
        found, agent, bounds = {}, self.agent, self.env.action_bounds
        if self.task.continuous:
            entries = zip(np.clip(agent.actions[0], *bounds), *bounds, strict=True)
            found = {f"action[{k}]": f"{entry:.2f} in {low:g}…{high:g}" for k, (entry, low, high) in enumerate(entries)}
        if agent.arrays.vectors is not None:
            found |= named(agent.arrays.vectors[0], self.env.vector_names)
        most = PANEL_COLUMNS * PANEL_ROWS
        if len(found) > most:
            found = dict(itertools.islice(found.items(), most - 1)) | {f"and {len(found) - most + 1:,} more": ""}
        return found


def named(vector: np.ndarray, names: Sequence[str]) -> dict[str, str]:
    """Return the entries of a vector (n,) in words, by name; a choice, which is one-hot, is one entry."""
    found: dict[str, str] = {}
    for name, number in zip(names, vector.tolist(), strict=True):
        root, is_choice, value = name.rpartition("=")
        if is_choice:
            found[root] = f"= {value}" if number else found.get(root, "= –")
        else:
            found[name] = f"{number:.2f}"
    return found


class Painter:
    """Draws the moments of an episode, which are to come in order, as pictures that all have the same, even size.

    From top to bottom: what happens in words, with the numbers of the moment; the global view with the agent's own
    beside it; a strip per block with the attention to past steps, or one with the changes of a recurrent state; and the
    past steps that have most of it. The first moment tells the sizes.
    """

    def __init__(self, player: Player, title: str, moment: Moment, dpi: int) -> None:
        self.player, self.title, views = player, title, views_of(moment)
        self.past = deque[np.ndarray](maxlen=player.longest)
        names, heights = ["world", "agent's view"][: len(views)], [height_of(views, 3.6)]
        rows: list[list] = [[name for name in names for _ in range(2 * THUMBNAILS // len(views))]]
        if player.strips:
            heights += [0.2 * len(player.strips), height_of(views[-1:] * THUMBNAILS, 1.3)]
            rows += [["strips"] * 2 * THUMBNAILS, [place for place in range(THUMBNAILS) for _ in range(2)]]
        lines = 3 + len(moment.numbers) // PANEL_COLUMNS
        inches = math.ceil(2 * (sum(heights) + 0.2 * lines + 0.4 * len(heights))) / 2  # which are an even size
        self.figure = Figure((WIDTH, inches), dpi, layout="constrained")
        FigureCanvasAgg(self.figure)
        self.words = self.figure.suptitle(self._words(moment), x=0.02, ha="left", family="monospace", size=9)
        axes: dict[Any, Axes] = self.figure.subplot_mosaic(rows, height_ratios=heights)
        self.views = [framed(axes[name], view, name) for name, view in zip(names, views, strict=True)]
        if player.strips:
            self.thumbnails = [framed(axes[place], np.full_like(views[-1], 255), " ") for place in range(THUMBNAILS)]
            self.strips = strips_in(axes["strips"], player)
        self.figure.canvas.draw()
        self.figure.set_layout_engine("none")  # nothing moves from now on

    def draw(self, moment: Moment) -> np.ndarray:
        """Return the picture (H, W, 3) of the next moment."""
        self.words.set(text=self._words(moment), color=INK if moment.result is None else MARK)
        for image, view in zip(self.views, views_of(moment), strict=True):
            image.set_data(view)
        if self.player.strips and moment.result is None:  # at the end, what the last action was taken on stays
            self._show_past(moment)
        self.figure.canvas.draw()
        seen = Image.fromarray(views_of(moment)[-1])
        self.past.append(np.asarray(seen.reduce(max(1, seen.height // 128))))  # many are kept, and shown small
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]

    def _words(self, moment: Moment) -> str:
        """Return the title, the step in numbers, or the outcome, and in columns the numbers that the agent sees."""
        step = f"step {moment.step:<10}reward {moment.reward:<12.2f}value {moment.value:<12.2f}"
        if moment.result is not None:
            step = f"over: {', '.join(describe(moment.result))}"
        elif not self.player.task.continuous:
            step += f"action {' '.join(map(str, moment.action))}"
        cells = [f"{name} {text}"[-CELL_LENGTH:].ljust(CELL_LENGTH) for name, text in moment.numbers.items()]
        rows = ["   ".join(cells[first : first + PANEL_COLUMNS]) for first in range(0, len(cells), PANEL_COLUMNS)]
        return "\n".join([self.title, step, *rows])

    def _show_past(self, moment: Moment) -> None:
        """Show the weights of past steps, and in order of time those whose mean weight is largest; mark the largest."""
        past, step = moment.past.mean(axis=1), moment.step
        weights, (strips, count) = past.mean(axis=0), past.shape
        # A past step keeps its place while the present moves to the right, until the strips are full.
        span = min(2 ** math.ceil(math.log2(max(SHORTEST_STRIP, step))), self.player.longest)
        first = max(0, step - span)
        shown = np.full((strips, span), np.nan)
        shown[:, step - count - first : step - first] = past / np.maximum(past.max(axis=1, initial=0), 1e-12)[:, None]
        self.strips.set(data=shown, extent=(first - 0.5, first + span - 0.5, strips - 0.5, -0.5))
        places = np.sort(np.argsort(-weights, kind="stable")[:THUMBNAILS])
        self.strips.axes.set_xticks(places + step - count, minor=True)
        for image, place in zip(self.thumbnails, places, strict=False):
            share = f"{weights[place]:.0%}" if self.player.unit == "attention" else f"{weights[place]:.2f}"
            image.set_data(self.past[place - count])
            image.axes.set_xlabel(f"step {step - count + place}: {share}")
            image.axes.spines[:].set_color(MARK if place == weights.argmax() else FAINT)


def framed(axes: Axes, picture: np.ndarray, text: str) -> AxesImage:
    """Show a picture (H, W, 3) with a frame, and words below it."""
    axes.set(xticks=[], yticks=[], xlabel=text)
    axes.spines[:].set(color=FAINT, linewidth=2)
    return axes.imshow(picture)


def strips_in(axes: Axes, player: Player) -> AxesImage:
    """Return the strips, which show nothing yet; minor ticks below them are for past steps that are to be marked."""
    axes.set_title(f"{player.unit}, from none (dark) to most (bright)", color=FAINT, loc="left", size=9)
    axes.set(facecolor=EMPTY, xlabel="past step", yticks=range(len(player.strips)), yticklabels=player.strips)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=9)
    axes.tick_params(which="minor", length=8, width=3, color=MARK)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.xaxis.remove_overlapping_locs = False
    for strip in range(1, len(player.strips)):
        axes.axhline(strip - 0.5, color="white", linewidth=3)
    nothing = np.full((len(player.strips), SHORTEST_STRIP), np.nan)
    return axes.imshow(nothing, vmin=0, vmax=1, aspect="auto", interpolation="nearest")


def views_of(moment: Moment) -> list[np.ndarray]:
    """Return the global view and, last, the agent's own where it is another."""
    return [view for view in (moment.frame, moment.view) if view is not None]


def height_of(pictures: list[np.ndarray], most: float) -> float:
    """Return how high pictures (H, W, 3), side by side and equally high, may be, in inches, `most` at most."""
    return min(most, WIDTH / sum(picture.shape[1] / picture.shape[0] for picture in pictures))


def describe(result: dict[str, float]) -> list[str]:
    """Return what an episode came to in words: reward and length, success as yes or no, then the task's own numbers."""
    words = [f"reward {result['reward']:.2f}", f"length {result['length']:.0f}"]
    words += [f"success {'yes' if result['success'] else 'no'}"] if "success" in result else []
    others = [name for name in result if name not in ("reward", "length", "success", "cut")]
    words += [f"{name.replace('_', ' ')} {result[name]:.2f}" for name in others]
    return words + ([f"cut after {result['length']:,.0f} steps"] if "cut" in result else [])


def draw_episode(player: Player, seed: int, fps: int, dpi: int = DPI) -> Iterator[tuple[Moment, list[np.ndarray]]]:
    """Play an episode; yield each moment and its picture, repeated at the end to be read; no pictures if fps is 0."""
    painter, title = None, f"{task_name(player.config.environment)}, seed {seed}"
    for moment in player.play(seed):
        if fps and painter is None:
            painter = Painter(player, title, moment, dpi)
        times = 1 if moment.result is None else math.ceil(HOLD_SECONDS * fps)
        yield moment, [painter.draw(moment)] * times if painter else []


def episode_summary(model: ActorCriticModel, config: Config, task: Task, tag: str) -> Summary:
    """Play an episode, the same unseen one at each call, and return it as an animated picture for TensorBoard."""
    with closing(Player(model, config, task, max_steps=SUMMARY_STEPS)) as player, TemporaryDirectory() as folder:
        drawn = draw_episode(player, training_seeds(config.environment).stop, SUMMARY_FPS, SUMMARY_DPI)
        film(path := Path(folder) / "episode.gif", (picture for _, some in drawn for picture in some), SUMMARY_FPS)
        encoded = path.read_bytes()
    image = Summary.Image(colorspace=3, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
