"""Watching an agent: an episode at a time, drawn with what the agent remembers, as a video or for TensorBoard."""

import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard.summary import Summary

from environments.contract import Task, failure_of
from environments.numbers import episode_means
from evaluation.agent import Agent, first_unseen_seed, task_name
from evaluation.video import encode_gif
from model import ActorCriticModel
from run.config import Config
from utils import EnvironmentFailure, UserError, create_env, reason_of

# TensorBoard's episode: how many steps at most, how wide, how fast.
SUMMARY_STEPS, SUMMARY_WIDTH, SUMMARY_FPS = 200, 480, 6
# How long a video shows how an episode ended, in seconds.
HOLD_SECONDS = 1.5
# Of a picture, in pixels: its width, its margins, the gaps between what is side by side, and where strips begin.
WIDTH, MARGIN, GAP, LEFT = 720, 16, 12, 84
VIEW_HEIGHT, THUMBNAIL_HEIGHT, STRIP_HEIGHT, ROW_HEIGHT = 360, 128, 18, 20
# So many past steps are shown; the fewest that fill a strip, and the most of an agent whose memory has no length.
THUMBNAILS, SHORTEST_STRIP, LONGEST_STRIP = 5, 16, 512
# Numbers side by side and on top of each other, and the characters of each; what is beyond is counted.
PANEL_COLUMNS, PANEL_ROWS, CELL_LENGTH = 3, 5, 27
WHITE, INK, FAINT, EMPTY, MARK = (255, 255, 255), (30, 30, 40), (110, 110, 125), (232, 232, 238), (213, 94, 0)
VIRIDIS = (np.array([matplotlib.colormaps["viridis"](level)[:3] for level in range(256)]) * 255).astype(np.uint8)


@dataclass
class Moment:
    """What there is to see at one step of an episode.

    Attributes:
        step: number of the step in its episode; at the end, how many steps the episode had.
        frame: (H, W, 3) uint8 global view, None where nothing is rendered.
        view: (h, w, 3) uint8 of what the agent sees, None where it sees numbers or nothing is rendered.
        action: (branches,) the agent's action, None at the end.
        value: the return that the agent expects from here on.
        reward: sum of the rewards up to here.
        past: (strips, heads, n) of the last n steps, oldest first: their attention weights in each block, or by how
            much each changed the state of a recurrent agent (1, 1, n).
        change: by how much this step changes that state, None without one.
        probabilities: (actions,) of each branch; none where actions are numbers.
        vector: (n,) the numbers that the agent sees, None where it sees none, and at the end.
        result: what the environment reports of the finished episode; None before its end.
    """

    step: int
    frame: np.ndarray | None
    view: np.ndarray | None
    action: np.ndarray | None
    value: float
    reward: float
    past: np.ndarray
    change: float | None = None
    probabilities: tuple[np.ndarray, ...] = ()
    vector: np.ndarray | None = None
    result: dict[str, float] | None = None


class Player:
    """One environment in this process, played by a model.

    Args:
        model: the actor-critic, on the device where it is to compute, with its `config` and `task`.
        deterministic: whether the most probable actions are taken instead of drawn ones.
        render: whether moments have pictures.
        max_steps: after how many steps an episode is cut, None where only its end ends it.

    Attributes:
        strips: the name of each strip of `Moment.past`; unit: what it holds.
        longest: the most steps in a strip.
    """

    def __init__(
        self,
        model: ActorCriticModel,
        config: Config,
        task: Task,
        deterministic: bool = False,
        render: bool = True,
        max_steps: int | None = None,
    ) -> None:
        self.model, self.config, self.task, self.deterministic, self.render = model, config, task, deterministic, render
        self.max_steps = math.inf if max_steps is None else max_steps
        self.steps = 0  # of the running episode
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
        """Play one episode; yield each of its steps before the action takes effect, and its end.

        Args:
            seed: of the environment and of the actions.

        Raises:
            EnvironmentFailure: if the environment fails or breaks its contract; the message is one line.
            UserError: if it cannot be drawn.
        """
        self.steps = 0
        try:
            yield from self._play(seed)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever an environment does
            where = f"{task_name(self.config.environment)}, reset seed {seed}, step {self.steps}"
            raise EnvironmentFailure(f"{where}: {failure_of(error)}") from error

    def _play(self, seed: int) -> Iterator[Moment]:
        agent = Agent(self.model, self.config, self.task, None, self.deterministic, seed)
        # Rewards are shown as they are reported, not as they are learned from.
        scale, changes = self.env.reward_scale, deque[float](maxlen=LONGEST_STRIP)
        observation, info = self.env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended and self.steps < self.max_steps:
            everything = np.ones(sum(self.task.branches), bool) if self.task.masked else None
            agent.act(observation, info.get("action_mask", everything))
            past = np.array(changes)[None, None] if agent.attention is None else agent.attention
            vector = None if agent.arrays.vectors is None else agent.arrays.vectors[0].copy()
            moment = Moment(
                self.steps, *self._pictures(), agent.actions[0], float(agent.value) / scale, total, past, agent.change,
                tuple(agent.probabilities), vector,
            )  # fmt: skip
            yield moment
            changes.append(agent.change or 0.0)
            self.steps += 1
            observation, reward, terminated, truncated, info = self.env.step(agent.actions[0])
            total, ended = total + reward / scale, terminated or truncated
        numbers = info if ended else self.env.numbers_so_far() | {"cut": 1.0}
        yield Moment(self.steps, *self._pictures(), None, moment.value, total, past, result=numbers)

    def _pictures(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self.render:
            return None, None
        try:
            return self.env.render(), self.env.agent_view()
        except Exception as error:  # whatever an environment's own drawing does
            raise UserError(f"{task_name(self.config.environment)} cannot be drawn: {reason_of(error)}") from error

    def numbers(self, moment: Moment) -> dict[str, str]:
        """Return the numbers of a moment before the end in words, by name; those that have no room are counted."""
        found = self._acted(moment.action) if self.task.continuous else {}
        if moment.vector is not None:
            found |= named(moment.vector, self.env.vector_names)
        most = PANEL_COLUMNS * PANEL_ROWS
        if len(found) <= most:
            return found
        return dict(list(found.items())[: most - 1]) | {f"and {len(found) - most + 1:,} more": ""}

    def _acted(self, action: np.ndarray) -> dict[str, str]:
        """Return the numbers of an action as the environment takes them, clipped, with their bounds."""
        entries = enumerate(zip(np.clip(action, *self.env.action_bounds), *self.env.action_bounds, strict=True))
        return {f"action[{k}]": f"{number:.2f} in {low:g}…{high:g}" for k, (number, low, high) in entries}


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
    """Draws the moments of an episode as pictures that all have the same, even size.

    From top to bottom: what happens in words, the global view with the agent's own beside it, the numbers that the
    agent sees and its actions where they are numbers, a strip per block with the attention to past steps, or one with
    the changes of a recurrent state, and the past steps that have most of it.

    Args:
        player: who plays.
        title: what is played.
        moment: the first one, for the sizes.
    """

    def __init__(self, player: Player, title: str, moment: Moment) -> None:
        self.player, self.title = player, title
        self.font, self.small = map(ImageFont.load_default, (18, 14))
        pictures = [picture for picture in (moment.frame, moment.view) if picture is not None]
        smallest = min(picture.shape[0] for picture in pictures)
        height = fitting_height(pictures, VIEW_HEIGHT)
        self.height = height // smallest * smallest if height > smallest else height  # pixels become squares
        self.thumbnail_height = fitting_height(pictures[-1:] * THUMBNAILS, THUMBNAIL_HEIGHT)
        self.past: deque[Image.Image] = deque(maxlen=player.longest)
        self.last = moment

    def draw(self, moment: Moment) -> Image.Image:
        """Return the picture of a moment; moments are to come in order."""
        # At the end, what the last action was taken on stays.
        self.last = moment if moment.result is None else self.last
        parts = [self._words(moment), self._views(moment)]
        if numbers := self.player.numbers(self.last):
            parts.append(self._numbers(numbers))
        if self.player.strips:
            weights = self.last.past.mean(axis=(0, 1))
            places = np.sort(np.argsort(-weights, kind="stable")[:THUMBNAILS])
            parts += [self._strips(places, weights), self._thumbnails(places, weights)]
        height = sum(part.height for part in parts)
        canvas, top = Image.new("RGB", (WIDTH, height + height % 2), WHITE), 0
        for part in parts:
            canvas.paste(part, (0, top))
            top += part.height
        if moment.result is None:
            seen = moment.frame if moment.view is None else moment.view
            self.past.append(resized(seen, self.thumbnail_height))
        return canvas

    def _words(self, moment: Moment) -> Image.Image:
        """Draw the title, and the step in numbers, or the outcome."""
        part, draw = new_part(64)
        draw.text((MARGIN, 10), self.title, INK, self.font)
        if moment.result is not None:
            draw.text((MARGIN, 37), "over: " + ", ".join(describe(moment.result)), MARK, self.small)
            return part
        action = "" if self.player.task.continuous else f"action {' '.join(map(str, moment.action))}"
        fields = f"step {moment.step}", f"reward {moment.reward:.2f}", f"value {moment.value:.2f}", action
        for index, text in enumerate(fields):
            draw.text((MARGIN + index * (WIDTH - 2 * MARGIN) // len(fields), 37), text, INK, self.small)
        return part

    def _views(self, moment: Moment) -> Image.Image:
        """Draw the global view and the agent's own."""
        part, _ = new_part(self.height + 30)
        views = {"world": moment.frame, "agent's view": moment.view}
        pictures = {name: resized(view, self.height) for name, view in views.items() if view is not None}
        left = (WIDTH + GAP - sum(picture.width + GAP for picture in pictures.values())) // 2
        for name, picture in pictures.items():
            self._frame(part, picture, left, name)
            left += picture.width + GAP
        return part

    def _frame(self, part: Image.Image, picture: Image.Image, left: int, text: str, colour=FAINT) -> None:
        """Draw a picture with a frame, and words below it."""
        draw, (width, height) = ImageDraw.Draw(part), picture.size
        part.paste(picture, (left, 2))
        draw.rectangle((left - 2, 0, left + width + 1, height + 3), outline=colour, width=2)
        draw.text((left + width // 2, height + 6), text, INK, self.small, anchor="ma")

    def _numbers(self, numbers: dict[str, str]) -> Image.Image:
        """Draw a cell for each number: its name, whose middle gives way, and its value."""
        part, draw = new_part(-(-len(numbers) // PANEL_COLUMNS) * ROW_HEIGHT + 8)
        width = (WIDTH - 2 * MARGIN) // PANEL_COLUMNS
        for index, (name, text) in enumerate(numbers.items()):
            left, top = MARGIN + index % PANEL_COLUMNS * width, index // PANEL_COLUMNS * ROW_HEIGHT
            half = max(2, CELL_LENGTH - len(text)) // 2
            short = name if len(name) <= 2 * half else f"{name[:half]}…{name[1 - half :]}"
            draw.text((left, top), short, FAINT, self.small)
            draw.text((left + width - GAP, top), text, INK, self.small, anchor="ra")
        return part

    def _strips(self, places: np.ndarray, weights: np.ndarray) -> Image.Image:
        """Draw the strips, in which a past step keeps its place while the present moves to the right, and an axis."""
        past, step, row = self.last.past.mean(axis=1), self.last.step, STRIP_HEIGHT + 4
        axis = ROW_HEIGHT + len(self.player.strips) * row
        part, draw = new_part(axis + 46)
        draw.text((LEFT, 8), f"{self.player.unit}: none", FAINT, self.small, anchor="lm")
        part.paste(Image.fromarray(VIRIDIS[None]).resize((96, 10)), (LEFT + 112, 3))
        draw.text((LEFT + 214, 8), "most", FAINT, self.small, anchor="lm")
        span = min(2 ** math.ceil(math.log2(max(SHORTEST_STRIP, step))), self.player.longest)
        first, cell = max(0, step - span), (WIDTH - MARGIN - LEFT) / span
        for index, name in enumerate(self.player.strips):
            top = ROW_HEIGHT + index * row
            draw.text((MARGIN, top + STRIP_HEIGHT // 2), name, INK, self.small, anchor="lm")
            draw.rectangle((LEFT, top, WIDTH - MARGIN, top + STRIP_HEIGHT), EMPTY)
            if len(weights):
                shares = past[index, -span:] / max(past[index, -span:].max(), 1e-12)
                strip = Image.fromarray(VIRIDIS[(shares * 255).astype(int)][None])
                part.paste(strip.resize((round(strip.width * cell), STRIP_HEIGHT + 1), 0), (LEFT, top))
        now, top, every = LEFT + (step - first) * cell, axis + 9, max(1, span // 8)
        for tick in range(-(-first // every) * every, step, every):
            if (left := LEFT + (tick - first + 0.5) * cell) < now - 30:
                draw.text((left, top), str(tick), FAINT, self.small, anchor="ma")
        draw.text((min(now, WIDTH - MARGIN), top), "now", INK, self.small, anchor="ra" if step else "la")
        draw.text((MARGIN, top), "past step", FAINT, self.small)
        for place in places.tolist():
            tip = LEFT + (step - len(weights) + place - first + 0.5) * cell
            corners = [(tip, axis), (tip - 5, axis + 8), (tip + 5, axis + 8)]
            draw.polygon(corners, MARK if place == weights.argmax() else FAINT)
        return part

    def _thumbnails(self, places: np.ndarray, weights: np.ndarray) -> Image.Image:
        """Show the past steps with the largest weights, mean over the strips, in order of time; mark the largest."""
        part, draw = new_part(self.thumbnail_height + 28)
        if not len(weights):
            text = "the first step: nothing to remember yet"
            draw.text((WIDTH // 2, part.height // 2), text, FAINT, self.small, anchor="mm")
        left = MARGIN
        for place in places.tolist():
            share = f"{weights[place]:.0%}" if self.player.unit == "attention" else f"{weights[place]:.2f}"
            text, picture = f"step {self.last.step - len(weights) + place}: {share}", self.past[place - len(weights)]
            self._frame(part, picture, left, text, MARK if place == weights.argmax() else FAINT)
            left += picture.width + GAP
        return part


def new_part(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty part of a picture, and what draws on it."""
    part = Image.new("RGB", (WIDTH, height), WHITE)
    return part, ImageDraw.Draw(part)


def fitting_height(pictures: list[np.ndarray], most: int) -> int:
    """Return how high pictures (H, W, 3), side by side and equally high, may be, `most` at most."""
    room = WIDTH - 2 * MARGIN - (len(pictures) - 1) * GAP
    return max(1, min(most, int(room / sum(picture.shape[1] / picture.shape[0] for picture in pictures))))


def resized(picture: np.ndarray, height: int) -> Image.Image:
    """Return a picture (H, W, 3) in another height: enlarged pixels stay sharp squares."""
    method = Image.Resampling.NEAREST if height >= picture.shape[0] else Image.Resampling.BOX
    return Image.fromarray(picture).resize(
        (max(1, round(height * picture.shape[1] / picture.shape[0])), height), method
    )


def describe(result: dict[str, float]) -> list[str]:
    """Return what an episode came to in words: reward and length, success as yes or no, then the task's own numbers."""
    words = [f"reward {result['reward']:.2f}", f"length {result['length']:.0f}"]
    words += [f"success {'yes' if result['success'] else 'no'}"] if "success" in result else []
    others = [name for name in result if name not in ("reward", "length", "success", "cut")]
    words += [f"{name.replace('_', ' ')} {result[name]:.2f}" for name in others]
    return words + ([f"cut after {result['length']:,.0f} steps"] if "cut" in result else [])


def describe_means(results: list[dict[str, float]]) -> list[str]:
    """Return the mean of each number in words, with how many episodes report it where some do not."""
    words = []
    for name, found in episode_means(results).items():
        some = f" (in {found.reported:,} of {found.episodes:,} episodes)" if found.reported < found.episodes else ""
        words.append(f"{name.replace('_', ' ')} {found.mean:.2f}{some}")
    cut = sum("cut" in result for result in results)
    return words + ([f"{cut:,} of {len(results):,} episodes cut"] if cut else [])


def draw_episode(player: Player, seed: int, fps: int) -> Iterator[tuple[Moment, list[Image.Image]]]:
    """Play an episode; yield each moment with its pictures: one, at the end as many as it takes to read it.

    Args:
        player: who plays.
        seed: of the episode.
        fps: pictures per second.
    """
    painter, title = None, f"{task_name(player.config.environment)}, seed {seed}"
    for moment in player.play(seed):
        painter = painter or Painter(player, title, moment)
        yield moment, [painter.draw(moment)] * (1 if moment.result is None else math.ceil(HOLD_SECONDS * fps))


def episode_summary(model: ActorCriticModel, config: Config, task: Task, tag: str) -> Summary:
    """Play an episode, the same unseen one at each call, and return it as an animated picture for TensorBoard.

    Args:
        model: on any device, with its `config` and `task`; nothing of it changes.
        tag: under which TensorBoard shows it.
    """
    player = Player(model, config, task, max_steps=SUMMARY_STEPS)
    try:
        drawn = draw_episode(player, first_unseen_seed(config.environment), SUMMARY_FPS)
        pictures = [picture for _, pictures in drawn for picture in pictures]
    finally:
        player.close()
    height = SUMMARY_WIDTH * pictures[0].height // WIDTH
    encoded = encode_gif((picture.resize((SUMMARY_WIDTH, height)) for picture in pictures), SUMMARY_FPS)
    image = Summary.Image(height=height, width=SUMMARY_WIDTH, colorspace=3, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
