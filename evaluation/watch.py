"""Watching an agent: an episode at a time, drawn with what the agent remembers, as a video or for TensorBoard."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard.summary import Summary

from environments.contract import Task, check_observation, checked_step, failure_of
from environments.numbers import episode_means, episode_numbers
from evaluation.agent import Agent, first_unseen_seed, task_name
from evaluation.video import encode_gif
from model import ActorCriticModel
from run.config import Config
from utils import EnvironmentFailure, UserError, create_env, reason_of

# TensorBoard's episode: how many steps at most, how wide, how fast.
SUMMARY_STEPS, SUMMARY_WIDTH, SUMMARY_FPS = 200, 480, 6
# How long a video shows how an episode ended, in seconds.
HOLD_SECONDS = 1.5
# All sizes are those of a picture of this width, and scaled for others.
BASE_WIDTH, SMALLEST_TEXT, THUMBNAILS = 720, 11, 5
# The fewest past steps that fill a strip, and the most of an agent whose memory has no length.
SHORTEST_STRIP, LONGEST_STRIP = 16, 512
# Numbers side by side and on top of each other; what is beyond is counted. So many numbers of an action are in words.
PANEL_COLUMNS, PANEL_ROWS, MOST_ACTIONS = 3, 5, 2
WHITE, INK, FAINT, EMPTY, MARK = (255, 255, 255), (30, 30, 40), (110, 110, 125), (232, 232, 238), (213, 94, 0)
BAR = (0, 114, 178)
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


@dataclass
class Entry:
    """A number or a choice as it is shown: its name, its value in words, and the ends of its bar as shares of 1."""

    name: str
    text: str
    bar: tuple[float, float] | None = None


def half_open(number: float) -> float:
    """Return where a number without bounds lies on a bar: 0 in the middle, whatever its size within the bar."""
    return 0.5 + 0.5 * math.tanh(number)


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
        self.env = create_env(config.environment, "rgb_array" if render else None)
        self.strips, self.unit, self.longest = ["state"] if config.recurrence else [], "change", LONGEST_STRIP
        if config.transformer is not None:
            self.strips = [f"block {block + 1}" for block in range(config.transformer.num_blocks)]
            self.unit, self.longest = "attention", config.transformer.memory_length

    def close(self) -> None:
        """Close the environment."""
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
        except Exception as error:  # whatever an environment does
            where = f"{task_name(self.config.environment)}, reset seed {seed}, step {self.steps}"
            raise EnvironmentFailure(f"{where}: {failure_of(error)}") from error

    def _play(self, seed: int) -> Iterator[Moment]:
        agent = Agent(self.model, self.config, self.task, None, self.deterministic, seed)
        # Rewards are shown as they are reported, not as they are learned from.
        scale, changes = getattr(self.env, "reward_scale", 1.0), deque[float](maxlen=LONGEST_STRIP)
        observation, info = self.env.reset(seed=seed)
        check_observation(self.env, observation, self.task)
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
            observation, reward, terminated, truncated, info = checked_step(self.env, agent.actions[0], self.task)
            total, ended = total + float(reward) / scale, terminated or truncated
        numbers = episode_numbers(info) if ended else self.env.numbers_so_far() | {"cut": 1.0}
        yield Moment(self.steps, *self._pictures(), None, moment.value, total, past, result=numbers)

    def _pictures(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self.render:
            return None, None
        try:
            return self.env.render(), self.env.agent_view()
        except Exception as error:  # whatever an environment's own drawing does
            raise UserError(f"{task_name(self.config.environment)} cannot be drawn: {reason_of(error)}") from error

    def entries(self, moment: Moment) -> list[Entry]:
        """Return the numbers of a moment before the end, always equally many; those that have no room are counted."""
        found = self._acted(moment.action) if self.task.continuous else []
        found += [] if moment.vector is None else self._seen(moment.vector)
        most = PANEL_COLUMNS * PANEL_ROWS
        return found if len(found) <= most else [*found[: most - 1], Entry(f"and {len(found) - most + 1:,} more", "")]

    def _acted(self, action: np.ndarray) -> list[Entry]:
        """Return the numbers of an action as the environment takes them, clipped, with their bounds."""
        bounds = getattr(self.env, "action_bounds", None) or np.array([[-math.inf], [math.inf]]).repeat(len(action), 1)
        found = []
        for index, (number, low, high) in enumerate(zip(np.clip(action, *bounds), *bounds, strict=True)):
            bounded = math.isfinite(low) and math.isfinite(high) and low < high
            bar = (0.0, (number - low) / (high - low)) if bounded else (0.5, half_open(number))
            found.append(Entry(f"action[{index}]", f"{number:.2f} in {low:g}…{high:g}", bar))
        return found

    def _seen(self, vector: np.ndarray) -> list[Entry]:
        """Return the entries of a vector; a choice that is one-hot is one entry."""
        names = list(getattr(self.env, "vector_names", ()))
        names = names if len(names) == len(vector) else [f"[{index}]" for index in range(len(vector))]
        found: dict[str, Entry] = {}
        for name, number in zip(names, vector.tolist(), strict=True):
            root, is_choice, value = name.rpartition("=")
            if is_choice:
                entry = found.setdefault(f"{root}=", Entry(root, "="))
                entry.text += f" {value}" if number else ""
            else:
                found[name] = Entry(name, f"{number:.2f}", (0.5, half_open(number)))
        return [Entry(entry.name, "= –") if entry.text == "=" else entry for entry in found.values()]


class Painter:
    """Draws the moments of an episode as pictures that all have the same, even size.

    From top to bottom: what happens in words, the global view with the agent's own beside it, the numbers that the
    agent sees and its actions where they are numbers, a strip per block with the attention to past steps, or one with
    the changes of a recurrent state, and the past steps that have most of it.

    Args:
        player: who plays.
        title: what is played.
        moment: the first one, for the sizes.
        width: of the pictures.
    """

    def __init__(self, player: Player, title: str, moment: Moment, width: int) -> None:
        self.player, self.title = player, title
        self.width, self.scale = width - width % 2, width / BASE_WIDTH
        self.sizes = [max(SMALLEST_TEXT, self._size(size)) for size in (18, 14)]
        self.font, self.small = map(ImageFont.load_default, self.sizes)
        self.margin, self.gap, self.left = self._size(16), self._size(12), self._size(84)
        self.room = self.width - 2 * self.margin
        pictures = [picture for picture in (moment.frame, moment.view) if picture is not None]
        self.views = self._fit(pictures, len(pictures), self._size(360))
        smallest = min(picture.shape[0] for picture in pictures)
        if self.views[0][1] > smallest:  # small pixels become whole squares
            height = self.views[0][1] // smallest * smallest
            self.views = [(round(height * p.shape[1] / p.shape[0]), height) for p in pictures]
        (self.thumbnail,) = self._fit(pictures[-1:], THUMBNAILS, self._size(128))
        self.past: deque[Image.Image] = deque(maxlen=player.longest)
        self.last = moment

    def _size(self, pixels: float) -> int:
        return max(1, round(pixels * self.scale))

    def _fit(self, pictures: list[np.ndarray], count: int, most: int) -> list[tuple[int, int]]:
        """Return (width, height) of pictures, equally high, that fit side by side, `count` in all."""
        aspects = [picture.shape[1] / picture.shape[0] for picture in pictures]
        total = sum(aspects) * count / len(aspects)
        height = max(1, int(min(most, (self.room - (count - 1) * self.gap) / total)))
        return [(max(1, round(height * aspect)), height) for aspect in aspects]

    def _part(self, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        part = Image.new("RGB", (self.width, height), WHITE)
        return part, ImageDraw.Draw(part)

    def draw(self, moment: Moment) -> Image.Image:
        """Return the picture of a moment; moments are to come in order."""
        # At the end, what the last action was taken on stays.
        self.last = moment if moment.result is None else self.last
        entries = self.player.entries(self.last)
        parts = [self._words(moment), self._views(moment), *([self._numbers(entries)] if entries else [])]
        if self.player.strips:
            weights = self.last.past.mean(axis=(0, 1))
            places = np.sort(np.argsort(-weights, kind="stable")[:THUMBNAILS])
            parts += [self._strips(places, weights), self._thumbnails(places, weights)]
        height = sum(part.height for part in parts)
        canvas, top = Image.new("RGB", (self.width, height + height % 2), WHITE), 0
        for part in parts:
            canvas.paste(part, (0, top))
            top += part.height
        if moment.result is None:
            self.past.append(resized(moment.frame if moment.view is None else moment.view, self.thumbnail))
        return canvas

    def _words(self, moment: Moment) -> Image.Image:
        """Draw the title, what the colours of the strips mean, and the step in numbers, or the outcome."""
        part, draw = self._part(self._size(64))
        right, middle = self.width - self.margin, self._size(20)
        if self.player.strips:
            for text in (" most", VIRIDIS, f"{self.player.unit}: none "):
                if isinstance(text, str):
                    draw.text((right, middle), text, FAINT, self.small, anchor="rm")
                    right -= round(draw.textlength(text, self.small))
                else:
                    right -= self._size(96)
                    colours = Image.fromarray(text[None]).resize((self._size(96), self._size(10)))
                    part.paste(colours, (right, middle - self._size(5)))
        fits = self.margin + draw.textlength(self.title, self.font) <= right - self.gap
        draw.text((self.margin, self._size(10)), self.title, INK, self.font if fits else self.small)
        if moment.result is not None:
            outcome = "over: " + ", ".join(describe(moment.result))
            draw.text((self.margin, self._size(37)), outcome, MARK, self.small)
            return part
        numbers = [f"{n:.2f}" if isinstance(n, float) else str(n) for n in moment.action.tolist()[:MOST_ACTIONS]]
        action = " ".join(numbers) + " …" * (len(moment.action) > MOST_ACTIONS)
        fields = (f"step {moment.step}", f"action {action}", f"reward {moment.reward:.2f}", f"value {moment.value:.2f}")
        for index, text in enumerate(fields):
            draw.text((self.margin + index * self.room // len(fields), self._size(37)), text, INK, self.small)
        return part

    def _views(self, moment: Moment) -> Image.Image:
        """Draw the global view and the agent's own."""
        part, draw = self._part(self.views[0][1] + self._size(30))
        left = (self.width - sum(width for width, _ in self.views) - (len(self.views) - 1) * self.gap) // 2
        pictures = (moment.frame, moment.view), ("world", "agent's view")
        for picture, name, (width, height) in zip(*pictures, self.views, strict=False):
            part.paste(resized(picture, (width, height)), (left, 1))
            draw.rectangle((left - 1, 0, left + width, height + 1), outline=FAINT)
            draw.text((left + width // 2, height + self._size(4)), name, FAINT, self.small, anchor="ma")
            left += width + self.gap
        return part

    def _numbers(self, entries: list[Entry]) -> Image.Image:
        """Draw a cell for each entry: its name, its value and, under both, a bar from the middle or the lower end."""
        row, width = round(self.sizes[1] * 1.25) + self._size(7), self.room // PANEL_COLUMNS - self.gap
        part, draw = self._part(-(-len(entries) // PANEL_COLUMNS) * row + self._size(8))
        for index, entry in enumerate(entries):
            left, top = self.margin + index % PANEL_COLUMNS * (width + self.gap), index // PANEL_COLUMNS * row
            name, kept = entry.name, len(entry.name)
            while kept > 1 and draw.textlength(f"{name}  {entry.text}", self.small) > width:  # its middle gives way
                kept -= 1
                name = f"{entry.name[: (kept + 1) // 2]}…{entry.name[len(entry.name) - kept // 2 :]}"
            draw.text((left, top), name, FAINT, self.small)
            draw.text((left + width, top), entry.text, INK, self.small, anchor="ra")
            if entry.bar is not None:
                bottom, (low, high) = top + row - self._size(4), sorted(left + round(end * width) for end in entry.bar)
                draw.rectangle((left, bottom - self._size(2), left + width, bottom), EMPTY)
                draw.rectangle((low, bottom - self._size(2), high, bottom), BAR)
        return part

    def _strips(self, places: np.ndarray, weights: np.ndarray) -> Image.Image:
        """Draw the strips, in which a past step keeps its place while the present moves to the right, and an axis."""
        past, step, height = self.last.past.mean(axis=1), self.last.step, self._size(18)
        axis = self._size(4) + len(self.player.strips) * (height + self._size(4))
        part, draw = self._part(axis + self._size(46))
        span = min(2 ** math.ceil(math.log2(max(SHORTEST_STRIP, step))), self.player.longest)
        first, cell = max(0, step - span), (self.width - self.margin - self.left) / span
        for index, name in enumerate(self.player.strips):
            top = self._size(4) + index * (height + self._size(4))
            draw.text((self.margin, top + height // 2), name, INK, self.small, anchor="lm")
            draw.rectangle((self.left, top, self.width - self.margin, top + height), EMPTY)
            if len(weights):
                row = past[index, -span:]
                colours = VIRIDIS[(row / max(row.max(), 1e-12) * 255).astype(int)]
                strip = Image.fromarray(colours[None]).resize((round(len(row) * cell), height + 1), 0)
                part.paste(strip, (self.left, top))
        now, top, every = self.left + (step - first) * cell, axis + self._size(9), max(1, span // 8)
        for tick in range(-(-first // every) * every, step, every):
            if (left := self.left + (tick - first + 0.5) * cell) < now - self._size(30):
                draw.text((left, top), str(tick), FAINT, self.small, anchor="ma")
        draw.text((min(now, self.width - self.margin), top), "now", INK, self.small, anchor="ra" if step else "la")
        draw.text((self.margin, top), "past step", FAINT, self.small)
        for place in places.tolist():
            tip, size = self.left + (step - len(weights) + place - first + 0.5) * cell, self._size(5)
            corners = [(tip, axis), (tip - size, axis + 1.6 * size), (tip + size, axis + 1.6 * size)]
            draw.polygon(corners, MARK if place == weights.argmax() else FAINT)
        return part

    def _thumbnails(self, places: np.ndarray, weights: np.ndarray) -> Image.Image:
        """Show the past steps with the largest weights, mean over the strips, in order of time; mark the largest."""
        width, height = self.thumbnail
        part, draw = self._part(height + self._size(28))
        if not len(weights):
            text = "the first step: nothing to remember yet"
            draw.text((self.width // 2, height // 2), text, FAINT, self.small, anchor="mm")
        for number, place in enumerate(places.tolist()):
            left, most = self.margin + number * (width + self.gap), place == weights.argmax()
            part.paste(self.past[place - len(weights)], (left, 1))
            outline, thickness = (MARK, self._size(3)) if most else (FAINT, 1)
            draw.rectangle((left - 1, 0, left + width, height + 1), outline=outline, width=thickness)
            share = f"{weights[place]:.0%}" if self.player.unit == "attention" else f"{weights[place]:.2f}"
            text = f"step {self.last.step - len(weights) + place}: {share}"
            draw.text((left + width // 2, height + self._size(5)), text, INK, self.small, anchor="ma")
        return part


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


def resized(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return a picture (H, W, 3) in another size (width, height): enlarged pixels stay sharp squares."""
    method = Image.Resampling.NEAREST if size[1] >= picture.shape[0] else Image.Resampling.BOX
    return Image.fromarray(picture).resize(size, method)


def draw_episode(player: Player, seed: int, fps: int, width: int | None) -> Iterator[tuple[Image.Image | None, Moment]]:
    """Play an episode; yield picture and moment of each step, the end for as long as it takes to read it.

    Args:
        player: who plays.
        seed: of the episode.
        fps: pictures per second.
        width: of the pictures; None to have none.
    """
    painter, title = None, f"{task_name(player.config.environment)}, seed {seed}"
    for moment in player.play(seed):
        if width is None:
            yield None, moment
            continue
        painter = painter or Painter(player, title, moment, width)
        picture = painter.draw(moment)
        for _ in range(1 if moment.result is None else math.ceil(HOLD_SECONDS * fps)):
            yield picture, moment


def episode_summary(model: ActorCriticModel, config: Config, task: Task, tag: str) -> Summary:
    """Play an episode, the same unseen one at each call, and return it as an animated picture for TensorBoard.

    Args:
        model: on any device, with its `config` and `task`; nothing of it changes.
        tag: under which TensorBoard shows it.
    """
    player = Player(model, config, task, max_steps=SUMMARY_STEPS)
    try:
        drawn = draw_episode(player, first_unseen_seed(config.environment), SUMMARY_FPS, SUMMARY_WIDTH)
        pictures = [picture for picture, _ in drawn]
    finally:
        player.close()
    (width, height), encoded = pictures[0].size, encode_gif(pictures, SUMMARY_FPS)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
