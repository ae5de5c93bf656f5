"""An episode as one self-contained page to walk through: what was seen, done and remembered at each step."""

import base64
import io
import json
import zlib
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from evaluation.agent import task_name
from evaluation.watch import Moment, Player, describe

TEMPLATE = Path(__file__).with_suffix(".html")
# Bytes that pictures and weights may take, so that a page, which holds them in base64, stays below 15 MB.
MOST_PICTURES, MOST_WEIGHTS = 6_500_000, 3_500_000
# How pictures are written where all of them take more: the divisor of their size, their quality.
COARSER = ((1, 80), (2, 70), (3, 60), (4, 50), (8, 40))
# How many of a row's weights are kept where all of them take more.
FEWER = (64, 32, 16, 8, 4)


class Page:
    """Takes the moments of an episode, in order, and writes them as a page.

    Args:
        player: who plays.
        seed: of the episode.
        model: its name.
    """

    def __init__(self, player: Player, seed: int, model: str) -> None:
        self.player = player
        self.places: dict[bytes, int] = {}  # digest of a picture → its place among the distinct ones
        self.pictures: list[bytes] = []
        self.past: list[np.ndarray] = []  # of each step (strips · heads, n)
        self.data: dict[str, Any] = {
            "title": task_name(player.config.environment), "seed": seed, "model": model, "heads": 1,
            "strips": player.strips, "unit": player.unit if player.strips else "", "longest": player.longest,
            "names": [], "outcome": [],
        }  # fmt: skip
        self.steps: dict[str, list] = {
            name: [] for name in ("world", "view", "action", "probabilities", "value", "reward", "change", "entries")
        }

    def add(self, moment: Moment) -> None:
        """Take the next moment."""
        now: dict[str, Any] = {"world": self._place(moment.frame), "view": self._place(moment.view)}
        now["reward"] = round(moment.reward, 4)
        if moment.result is not None:
            self.data["outcome"] = describe(moment.result)
        else:
            entries = self.player.entries(moment)
            self.data |= {"names": [entry.name for entry in entries], "heads": moment.past.shape[1]}
            now |= {
                "action": [round(float(number), 3) for number in moment.action],
                "probabilities": [branch.astype(float).round(3).tolist() for branch in moment.probabilities],
                "value": round(moment.value, 4),
                "change": round(float(moment.change or 0.0), 5),
                "entries": [entry.text for entry in entries],
            }
            if self.player.unit == "attention":
                self.past.append(np.concatenate(moment.past).astype(np.float16))
        for name, value in now.items():
            self.steps[name].append(value)

    def html(self) -> bytes:
        """Return the page."""
        levels, peaks = quantised(self.past)
        pictures = [f"data:image/webp;base64,{text(picture)}" for picture in fitting(self.pictures)]
        content = self.data | self.steps | {"levels": text(levels), "peaks": text(peaks), "pictures": pictures}
        # In a page, "<" inside of a script could end it.
        data = json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        title = escape(f"{self.data['title']}, seed {self.data['seed']}")
        return TEMPLATE.read_text("utf-8").replace("{{title}}", title).replace("{{data}}", data).encode()

    def _place(self, picture: np.ndarray | None) -> int:
        """Return the place of a picture (H, W, 3) among the distinct ones, -1 without one."""
        if picture is None:
            return -1
        place = self.places.setdefault(xxhash.xxh3_128_digest(picture.tobytes()), len(self.pictures))
        if place == len(self.pictures):
            self.pictures.append(written(Image.fromarray(picture), lossless=True, quality=30, method=2))
        return place


def text(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode()


def written(picture: Image.Image, **options: Any) -> bytes:
    """Return a picture as a WebP file."""
    stream = io.BytesIO()
    picture.save(stream, "WEBP", **options)
    return stream.getvalue()


def fitting(pictures: list[bytes]) -> list[bytes]:
    """Return the pictures, or coarser ones where they take too many bytes."""
    found = pictures
    for divisor, quality in COARSER:
        if sum(map(len, found)) <= MOST_PICTURES:
            break
        found = []
        for picture in map(Image.open, map(io.BytesIO, pictures)):
            size = max(1, picture.width // divisor), max(1, picture.height // divisor)
            found.append(written(picture.resize(size, Image.Resampling.BOX), quality=quality, method=2))
    return found


def quantised(past: list[np.ndarray]) -> tuple[bytes, bytes]:
    """Return weights as bytes, compressed: 255 for the largest of each row; where they are too many, the largest only.

    Args:
        past: (rows, n) of each step.

    Returns:
        The levels of all steps and rows, step by step, and the largest weights, as 65,535ths.
    """
    peaks = [step.max(axis=1, initial=0.0) for step in past]
    most = np.concatenate([*peaks, np.zeros(0)]).astype(np.float64)
    shares = [step.astype(np.float32) / np.maximum(peak[:, None], 1e-6) for step, peak in zip(past, peaks, strict=True)]
    found = b""
    for kept in (None, *FEWER):
        for step in shares if kept is not None else ():
            if step.shape[1] > kept:
                least = np.partition(step, -kept, axis=1)[:, -kept, None]
                step[step < least] = 0.0
        found = zlib.compress(b"".join((step * 255).round().astype(np.uint8).tobytes() for step in shares), 6)
        if len(found) <= MOST_WEIGHTS:
            break
    return found, zlib.compress((most * 65535).round().astype("<u2").tobytes(), 6)
