"""Watching an agent: one episode at a time, drawn with what the agent attends to, as a video or for TensorBoard."""

import math
import multiprocessing
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard.summary import Summary

from environments import BrokenContract
from environments.contract import Task, check_observation, checked_step
from environments.numbers import episode_means, episode_numbers
from evaluation.agent import Agent, first_unseen_seed, task_name
from evaluation.video import encode_gif
from model import ActorCriticModel, Output
from run.config import Config
from utils import EnvironmentFailure, UserError, create_env, reason_of
from worker import SharedArrays

# TensorBoard's episode: how many steps at most, how wide, how fast.
SUMMARY_STEPS, SUMMARY_WIDTH, SUMMARY_FPS = 200, 480, 6
# How long a video shows how an episode ended, in seconds.
HOLD_SECONDS = 1.5
# All sizes are those of a picture of this width, and scaled for others.
BASE_WIDTH = 720
THUMBNAILS = 5
SMALLEST_TEXT = 11
# The fewest past steps that fill a strip.
SHORTEST_STRIP = 16
# Numbers side by side and on top of each other; what is beyond is counted. So many numbers of an action are in words.
PANEL_COLUMNS, PANEL_ROWS, MOST_ACTIONS = 3, 5, 2
WHITE, INK, FAINT, EMPTY, MARK = (255, 255, 255), (30, 30, 40), (110, 110, 125), (232, 232, 238), (213, 94, 0)
BAR = (0, 114, 178)
VIRIDIS = np.array([matplotlib.colormaps["viridis"](level)[:3] for level in range(256)]) * 255


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
        attention: (blocks, n) mean over the heads of the weights of the last n steps, oldest first; each row sums to 1.
        vector: (n,) the numbers that the agent sees, None where it sees none, and at the end.
        result: what the environment reports of the finished episode; None in front of its end.
    """

    step: int
    frame: np.ndarray | None
    view: np.ndarray | None
    action: np.ndarray | None
    value: float
    reward: float
    attention: np.ndarray
    vector: np.ndarray | None = None
    result: dict[str, float] | None = None


@dataclass
class Entry:
    """A number, or a choice, as it is shown.

    Attributes:
        name: what it is.
        text: its value.
        bar: from where to where its bar goes, as shares of the width; None without.
    """

    name: str
    text: str
    bar: tuple[float, float] | None = None


@dataclass
class NumberPanel:
    """What there is to show of vectors and of actions that are numbers.

    Attributes:
        names: of the entries of the vector, empty where they are not known.
        bounds: lowest and highest (n,) of an action of n numbers; None for other actions.
        is_continuous: whether actions are numbers.
    """

    names: tuple[str, ...]
    bounds: tuple[np.ndarray, np.ndarray] | None
    is_continuous: bool

    def entries(self, moment: Moment) -> list[Entry]:
        """Return what to show of a moment in front of the end, always equally many; the rest is counted."""
        actions = self._actions(moment.action) if self.is_continuous else []
        numbers = [] if moment.vector is None else self._numbers(moment.vector)
        found, most = [*actions, *numbers], PANEL_COLUMNS * PANEL_ROWS
        return found if len(found) <= most else [*found[: most - 1], Entry(f"and {len(found) - most + 1:,} more", "")]

    def _actions(self, action: np.ndarray) -> list[Entry]:
        """Return the numbers of an action as the environment takes them, clipped, with their bounds."""
        low, high = (np.full(len(action), end) for end in (-math.inf, math.inf)) if self.bounds is None else self.bounds
        found = []
        for index, (number, *ends) in enumerate(zip(np.clip(action, low, high), low, high, strict=True)):
            bounded = all(map(math.isfinite, ends)) and ends[0] < ends[1]
            share = (number - ends[0]) / (ends[1] - ends[0]) if bounded else half_open(number)
            text = f"{number:.2f} in {ends[0]:g}…{ends[1]:g}"
            found.append(Entry(f"action[{index}]", text, (0.0 if bounded else 0.5, share)))
        return found

    def _numbers(self, vector: np.ndarray) -> list[Entry]:
        """Return the entries of a vector; choices that are one-hot are one entry."""
        names = self.names if len(self.names) == len(vector) else tuple(f"[{index}]" for index in range(len(vector)))
        choices: dict[str, list[str]] = {}
        found: list[Entry] = []
        for name, number in zip(names, vector.tolist(), strict=True):
            root, is_choice, value = name.rpartition("=")
            if not is_choice:
                found.append(Entry(name, f"{number:.2f}", (0.5, half_open(number))))
                continue
            if root not in choices:
                choices[root] = []
                found.append(Entry(root, ""))
            choices[root] += [value] if number else []
        for entry in found:
            if entry.name in choices and entry.bar is None:
                entry.text = "= " + (" ".join(choices[entry.name]) or "–")
        return found


def half_open(number: float) -> float:
    """Return where a number without bounds lies on a bar: 0 in the middle, whatever its size within the bar."""
    return 0.5 + 0.5 * math.tanh(number)


def shortened(text: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return a text that is not wider than `room` pixels: its middle gives way."""
    kept = len(text)
    short = text
    while kept > 1 and font.getlength(short) > room:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


class Player:
    """One environment in this process, played by a model.

    Args:
        model: the actor-critic, on the device where it is to compute.
        config: its config.
        task: what the environment is like.
        deterministic: whether the most probable actions are taken instead of drawn ones.
        render: whether moments have pictures.
        max_steps: after how many steps an episode is cut, None where only its end ends it.
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
        self.env = create_env(config.environment, "rgb_array" if render else None)
        # Rewards are shown as they are reported, not as they are learned from.
        self.reward_scale = getattr(self.env, "reward_scale", 1.0)
        self.arrays = SharedArrays(1, task, multiprocessing.get_context("spawn"))

    @property
    def panel(self) -> NumberPanel | None:
        """What shows the numbers of its moments; None where there are none."""
        if not self.task.vector and not self.task.continuous:
            return None
        bounds = getattr(self.env, "action_bounds", None)
        return NumberPanel(tuple(getattr(self.env, "vector_names", ())), bounds, self.task.continuous > 0)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def play(self, seed: int) -> Iterator[Moment]:
        """Play one episode; yield each of its steps before the action takes effect, and its end.

        Args:
            seed: of the environment and of the actions.

        Raises:
            EnvironmentFailure: if the environment fails or breaks its contract; the message is one line.
        """
        self.steps = 0
        try:
            yield from self._play(seed)
        except Exception as error:  # whatever an environment does
            where = f"{task_name(self.config.environment)}, reset seed {seed}, step {self.steps}"
            raise EnvironmentFailure(f"{where}: {failure_of(error)}") from error

    def _play(self, seed: int) -> Iterator[Moment]:
        agent = Agent(self.model, self.config, self.task, 1, self.deterministic)
        agent.generator.manual_seed(seed)
        observation, info = self.env.reset(seed=seed)
        check_observation(self.env, observation, self.task)
        total, ended = 0.0, False
        while not ended and self.steps < self.max_steps:
            self.arrays.show(0, observation, info.get("action_mask"))
            agent.advance()
            output, actions = agent.act(self.arrays, slice(0, 1))
            attention = past_attention(output, min(self.steps, agent.memory.length))
            vector = None if self.arrays.vectors is None else self.arrays.vectors[0].copy()
            value = float(output.value[0]) / self.reward_scale
            moment = Moment(self.steps, *self._pictures(), actions[0], value, total, attention, vector)
            yield moment
            self.steps += 1
            observation, reward, terminated, truncated, info = checked_step(self.env, actions[0], self.task)
            total, ended = total + float(reward) / self.reward_scale, terminated or truncated
            agent.count_step(slice(0, 1), np.array([ended]))
        cut = {} if ended else self.env.numbers_so_far() | {"cut": 1.0}
        numbers = episode_numbers(info) | cut
        yield Moment(self.steps, *self._pictures(), None, moment.value, total, attention, result=numbers)

    def _pictures(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        return (self.env.render(), self.env.agent_view()) if self.render else (None, None)


def failure_of(error: Exception) -> str:
    """Return what went wrong in an environment on one line; where, too, unless the line is meant for its user."""
    if isinstance(error, UserError | BrokenContract):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{reason_of(error)} ({type(error).__name__}, {where.filename}:{where.lineno})"


def past_attention(output: Output, valid: int) -> np.ndarray:
    """Return (blocks, valid): what one query's blocks attend to, mean over the heads, the previous step last.

    Args:
        output: of one observation; its attention is (1, heads, columns) per block.
        valid: how many of the newest columns it may look at.
    """
    weights = [block[0].float().mean(dim=0).cpu().numpy() for block in output.attention]
    return np.stack([block[len(block) - valid :] for block in weights])


class Painter:
    """Draws moments as pictures that all have the same, even size.

    From top to bottom: what happens in words, the global view with the agent's own beside it, the numbers that the
    agent sees and its actions where they are numbers, a strip per block with the attention to past steps, and the past
    steps that get most of it.

    Args:
        title: what is played.
        moment: the first one, for the sizes.
        width: of the pictures.
        memory_length: L, the most past steps of a strip.
        panel: of the numbers.
    """

    def __init__(
        self, title: str, moment: Moment, width: int, memory_length: int, panel: NumberPanel | None = None
    ) -> None:
        self.title, self.memory_length = title, memory_length
        self.width, self.scale = width - width % 2, width / BASE_WIDTH
        self.text = [max(SMALLEST_TEXT, self._size(size)) for size in (18, 14)]
        self.font, self.small = map(ImageFont.load_default, self.text)
        self.margin, self.gap = self._size(16), self._size(12)
        pictures = [picture for picture in (moment.frame, moment.view) if picture is not None]
        self.sizes = self._picture_sizes(pictures)
        self.top = self._size(64)
        self.panel, self.panel_top = panel, self.top + max(height for _, height in self.sizes) + self._size(30)
        self.row = round(self.text[1] * 1.25) + self._size(7)
        rows = 0 if panel is None else -(-len(panel.entries(moment)) // PANEL_COLUMNS)
        self.strips_top = self.panel_top + self._size(4) + rows * self.row + self._size(8) * (rows > 0)
        self.strip_height, self.strip_left = self._size(18), self._size(84)
        self.axis = self.strips_top + len(moment.attention) * (self.strip_height + self._size(4))
        self.thumbnails_top = self.axis + self._size(46)
        self.thumbnail = self._thumbnail_size(pictures[-1])
        height = self.thumbnails_top + self.thumbnail[1] + self._size(26)
        self.height = height + height % 2
        self.past: deque[Image.Image] = deque(maxlen=memory_length)
        self.last = moment

    def _size(self, pixels: float) -> int:
        return max(1, round(pixels * self.scale))

    def _picture_sizes(self, pictures: list[np.ndarray]) -> list[tuple[int, int]]:
        """Return (width, height) of the views: equally high, as large as fits, whole multiples of small pixels."""
        aspects = [picture.shape[1] / picture.shape[0] for picture in pictures]
        room = self.width - 2 * self.margin - (len(pictures) - 1) * self.gap
        height = max(1, int(min(self._size(360), room / sum(aspects))))
        smallest = min(picture.shape[0] for picture in pictures)
        height -= height % smallest if height > smallest else 0
        return [(max(1, round(height * aspect)), height) for aspect in aspects]

    def _thumbnail_size(self, picture: np.ndarray) -> tuple[int, int]:
        room = (self.width - 2 * self.margin - (THUMBNAILS - 1) * self.gap) / THUMBNAILS
        aspect = picture.shape[1] / picture.shape[0]
        height = min(self._size(128), room / aspect)
        return max(1, round(height * aspect)), max(1, round(height))

    def draw(self, moment: Moment) -> Image.Image:
        """Return the picture of a moment; moments are to come in order, an episode's first one has step 0."""
        if moment.step == 0:
            self.past.clear()
        canvas = Image.new("RGB", (self.width, self.height), WHITE)
        draw = ImageDraw.Draw(canvas)
        self._draw_words(draw, moment, self._draw_legend(canvas, draw) - self.gap)
        self._draw_views(canvas, draw, moment)
        # At the end, what the last action was taken on stays.
        self.last = moment if moment.result is None else self.last
        if self.panel is not None:
            self._draw_numbers(draw, self.panel.entries(self.last))
        self._draw_attention(canvas, draw, self.last)
        if moment.result is None:
            shown = moment.frame if moment.view is None else moment.view
            self.past.append(resized(shown, self.thumbnail))
        return canvas

    def _draw_words(self, draw: ImageDraw.ImageDraw, moment: Moment, right: int) -> None:
        """Draw the title, smaller if it would reach beyond `right`, and under it the step in numbers or the outcome."""
        font = self.font if self.margin + draw.textlength(self.title, self.font) <= right else self.small
        draw.text((self.margin, self._size(10)), self.title, INK, font)
        if moment.result is not None:
            outcome = "over: " + ", ".join(describe(moment.result))
            draw.text((self.margin, self._size(37)), outcome, MARK, self.small)
            return
        action = " ".join(f"{number:.2f}" if isinstance(number, float) else str(number)
                          for number in moment.action.tolist()[:MOST_ACTIONS])  # fmt: skip
        action += " …" * (len(moment.action) > MOST_ACTIONS)
        fields = (f"step {moment.step}", f"action {action}", f"reward {moment.reward:.2f}", f"value {moment.value:.2f}")
        for index, text in enumerate(fields):
            left = self.margin + index * (self.width - 2 * self.margin) // len(fields)
            draw.text((left, self._size(37)), text, INK, self.small)

    def _draw_legend(self, canvas: Image.Image, draw: ImageDraw.ImageDraw) -> int:
        """Say what the colours of the strips mean; return where that begins."""
        width, right, middle = self._size(96), self.width - self.margin, self._size(20)
        draw.text((right, middle), "most", FAINT, self.small, anchor="rm")
        right -= round(draw.textlength("most ", self.small)) + self._size(3)
        colours = Image.fromarray(VIRIDIS.astype(np.uint8)[None]).resize((width, self._size(10)))
        canvas.paste(colours, (right - width, middle - self._size(5)))
        right -= width + self._size(7)
        draw.text((right, middle), "attention: none", FAINT, self.small, anchor="rm")
        return right - round(draw.textlength("attention: none", self.small))

    def _draw_views(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        left = (self.width - sum(width for width, _ in self.sizes) - (len(self.sizes) - 1) * self.gap) // 2
        for picture, size, name in zip(
            (moment.frame, moment.view), self.sizes, ("world", "agent's view"), strict=False
        ):
            canvas.paste(resized(picture, size), (left, self.top))
            draw.rectangle((left - 1, self.top - 1, left + size[0], self.top + size[1]), outline=FAINT)
            middle = (left + size[0] // 2, self.top + size[1] + self._size(3))
            draw.text(middle, name, FAINT, self.small, anchor="ma")
            left += size[0] + self.gap

    def _draw_numbers(self, draw: ImageDraw.ImageDraw, entries: list["Entry"]) -> None:
        """Draw a cell for each entry: its name, its value and, under both, a bar from the middle or the lower end."""
        width = (self.width - 2 * self.margin - (PANEL_COLUMNS - 1) * self.gap) // PANEL_COLUMNS
        for index, entry in enumerate(entries):
            left = self.margin + index % PANEL_COLUMNS * (width + self.gap)
            top = self.panel_top + index // PANEL_COLUMNS * self.row
            room = width - draw.textlength(f"{entry.text}  ", self.small)
            draw.text((left, top), shortened(entry.name, room, self.small), FAINT, self.small)
            draw.text((left + width, top), entry.text, INK, self.small, anchor="ra")
            if entry.bar is None:
                continue
            low, high = (left + round(end * width) for end in sorted(entry.bar))
            bar = top + self.row - self._size(6)
            draw.rectangle((left, bar, left + width, bar + self._size(2)), EMPTY)
            draw.rectangle((low, bar, high, bar + self._size(2)), BAR)

    def _draw_attention(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        """Draw a strip per block, in which a past step keeps its place while the present moves to the right."""
        blocks, valid = moment.attention.shape
        span = min(2 ** math.ceil(math.log2(max(SHORTEST_STRIP, moment.step))), self.memory_length)
        first, cell = max(0, moment.step - span), (self.width - self.margin - self.strip_left) / span
        for block in range(blocks):
            top = self.strips_top + block * (self.strip_height + self._size(4))
            draw.text((self.margin, top + self.strip_height // 2), f"block {block + 1}", INK, self.small, anchor="lm")
            draw.rectangle((self.strip_left, top, self.width - self.margin, top + self.strip_height), EMPTY)
            if valid:
                weights = moment.attention[block, -span:]
                colours = VIRIDIS[(weights / weights.max() * 255).astype(int)].astype(np.uint8)
                strip = Image.fromarray(colours[None]).resize((round(len(weights) * cell), self.strip_height + 1), 0)
                canvas.paste(strip, (self.strip_left, top))
        self._draw_axis(draw, first, span, cell, moment.step)
        if valid:
            self._draw_most_attended(canvas, draw, moment, first, cell)
        else:
            draw.text((self.width // 2, self.thumbnails_top + self.thumbnail[1] // 2),
                      "the first step: nothing to remember yet", FAINT, self.small, anchor="mm")  # fmt: skip

    def _draw_axis(self, draw: ImageDraw.ImageDraw, first: int, span: int, cell: float, step: int) -> None:
        """Name past steps under the strips, and the present."""
        every = max(1, span // 8)
        now = self.strip_left + (step - first) * cell
        top = self.axis + self._size(9)
        for past in range(-(-first // every) * every, step, every):
            left = self.strip_left + (past - first + 0.5) * cell
            if left < now - self._size(30):
                draw.text((left, top), str(past), FAINT, self.small, anchor="ma")
        draw.text((min(now, self.width - self.margin), top), "now", INK, self.small, anchor="ra" if step else "la")
        draw.text((self.margin, top), "past step", FAINT, self.small)

    def _draw_most_attended(
        self, canvas: Image.Image, draw: ImageDraw.ImageDraw, moment: Moment, first: int, cell: float
    ) -> None:
        """Show the past steps with the largest weights, mean over the blocks, in order of time; mark their place."""
        weights = moment.attention.mean(axis=0)
        oldest = moment.step - len(weights)
        places = np.sort(np.argsort(-weights, kind="stable")[:THUMBNAILS])
        left = self.margin
        for place in places.tolist():
            past, weight = oldest + place, weights[place]
            canvas.paste(self.past[place - len(weights)], (left, self.thumbnails_top))
            most = place == int(weights.argmax())
            edge = (
                left - 1,
                self.thumbnails_top - 1,
                left + self.thumbnail[0],
                self.thumbnails_top + self.thumbnail[1],
            )
            draw.rectangle(edge, outline=MARK if most else FAINT, width=self._size(3) if most else 1)
            under = (left + self.thumbnail[0] // 2, self.thumbnails_top + self.thumbnail[1] + self._size(4))
            draw.text(under, f"step {past}: {weight:.0%}", INK, self.small, anchor="ma")
            tip, size = self.strip_left + (past - first + 0.5) * cell, self._size(5)
            draw.polygon([(tip, self.axis), (tip - size, self.axis + 1.6 * size), (tip + size, self.axis + 1.6 * size)],
                         MARK if most else FAINT)  # fmt: skip
            left += self.thumbnail[0] + self.gap


def describe(result: dict[str, float]) -> list[str]:
    """Return what an episode came to in words: reward and length, success as yes or no, then the task's own numbers."""
    words = [f"reward {result['reward']:.2f}", f"length {result['length']:.0f}"]
    if "success" in result:
        words.append(f"success {'yes' if result['success'] else 'no'}")
    others = [name for name in result if name not in ("reward", "length", "success", "cut")]
    words += [f"{name.replace('_', ' ')} {result[name]:.2f}" for name in others]
    return words + ([f"cut after {result['length']:,.0f} steps"] if "cut" in result else [])


def describe_means(results: list[dict[str, float]]) -> list[str]:
    """Return the mean of each number in words, with how many episodes report it where some do not."""
    words = []
    for name, found in episode_means(results).items():
        words.append(f"{name.replace('_', ' ')} {found.mean:.2f}" + (f" ({found.note})" if found.note else ""))
    cut = sum("cut" in result for result in results)
    return words + ([f"{cut:,} of {len(results):,} episodes cut"] if cut else [])


def resized(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return a picture (H, W, 3) in another size (width, height): enlarged pixels stay sharp squares."""
    enlarged = size[1] >= picture.shape[0]
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
    return Image.fromarray(picture).resize(size, method)


def draw_episode(player: Player, seed: int, width: int, fps: int) -> Iterator[tuple[Image.Image, Moment]]:
    """Play an episode and yield picture and moment of each step; its end is repeated so that it can be read."""
    painter = None
    for moment in player.play(seed):
        if painter is None:
            title = f"{task_name(player.config.environment)}, seed {seed}"
            painter = Painter(title, moment, width, player.config.transformer.memory_length, player.panel)
        picture = painter.draw(moment)
        for _ in range(1 if moment.result is None else math.ceil(HOLD_SECONDS * fps)):
            yield picture, moment


def check_drawing(
    model: ActorCriticModel,
    config: Config,
    task: Task,
    wanted_by: str = "video_interval",
    way_out: str = "allowed is 0",
) -> None:
    """Draw the first step of an episode; UserError, in one line, where the environment cannot be drawn.

    Args:
        model: the actor-critic.
        config: its config.
        task: what its environment is like.
        wanted_by: what asks for pictures.
        way_out: what to do where there are none.
    """
    try:
        player = Player(model, config, task)
        try:
            next(draw_episode(player, first_unseen_seed(config.environment), SUMMARY_WIDTH, SUMMARY_FPS))
        finally:
            player.close()
    except UserError:
        raise
    except Exception as error:  # whatever an environment's own drawing does
        name, reason = task_name(config.environment), reason_of(error.__cause__ or error)
        raise UserError(f"{wanted_by}: {name} cannot be drawn ({reason}); {way_out}") from error


def episode_summary(model: ActorCriticModel, config: Config, task: Task, tag: str) -> Summary:
    """Play an episode, the same unseen one at each call, and return it as an animated picture for TensorBoard.

    Args:
        model: on any device; nothing of it changes.
        config: its config.
        task: what its environment is like.
        tag: under which TensorBoard shows it.
    """
    player = Player(model, config, task)
    try:
        seed = first_unseen_seed(config.environment)
        pictures = []
        for picture, moment in draw_episode(player, seed, SUMMARY_WIDTH, SUMMARY_FPS):
            if moment.step > SUMMARY_STEPS:
                break
            pictures.append(picture)
    finally:
        player.close()
    width, height = pictures[0].size
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=encode_gif(pictures, SUMMARY_FPS)
    )
    return Summary(value=[Summary.Value(tag=tag, image=image)])
