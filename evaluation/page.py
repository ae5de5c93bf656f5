"""An episode as one self-contained page to walk through: what was seen, done and remembered at each step."""

import base64
import io
import json
import zlib
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.agent import task_name
from evaluation.watch import Moment, Player, describe

TEMPLATE = Path(__file__).with_suffix(".html")


class Page:
    """Takes the moments of an episode, in order, and writes them as a page, which names the model."""

    def __init__(self, player: Player, seed: int, model: str) -> None:
        self.player = player
        self.pictures: dict[str, int] = {}  # the distinct ones, as addresses that hold them → their places
        # Of each row of weights, step by step, the largest as 65,535ths, and all as 255ths of that.
        self.peaks, self.levels = bytearray(), bytearray()
        self.data: dict[str, Any] = {
            "title": task_name(player.config.environment), "seed": seed, "model": model, "heads": 1,
            "strips": player.strips, "unit": player.unit if player.strips else "", "longest": player.longest,
            "names": [], "outcome": [],
        }  # fmt: skip
        self.steps = defaultdict[str, list](list)

    def add(self, moment: Moment) -> None:
        """Take the next moment."""
        now: dict[str, Any] = {"world": self._place(moment.frame), "view": self._place(moment.view)}
        now["reward"] = round(moment.reward, 4)
        if moment.result is not None:
            self.data["outcome"] = describe(moment.result)
        else:
            self.data |= {"names": [*moment.numbers], "heads": moment.past.shape[1]}
            now |= {
                "action": [round(float(number), 3) for number in moment.action],
                "probabilities": [branch.astype(float).round(3).tolist() for branch in moment.probabilities],
                "value": round(moment.value, 4),
                "change": round(moment.change, 5),
                "entries": [*moment.numbers.values()],
            }
            if self.player.unit == "attention":
                past = np.concatenate(moment.past)  # (strips · heads, n)
                peaks = past.max(axis=1, initial=0.0)
                self.peaks += (peaks * 65535).round().astype("<u2").tobytes()
                self.levels += (past / np.maximum(peaks[:, None], 1e-6) * 255).round().astype(np.uint8).tobytes()
        for name, value in now.items():
            self.steps[name].append(value)

    def html(self) -> bytes:
        """Return the page."""
        weights = {"levels": text(zlib.compress(self.levels)), "peaks": text(zlib.compress(self.peaks))}
        content = self.data | self.steps | weights | {"pictures": [*self.pictures]}
        # In a page, "<" inside of a script could end it.
        data = json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        title = escape(f"{self.data['title']}, seed {self.data['seed']}")
        return TEMPLATE.read_text("utf-8").replace("{{title}}", title).replace("{{data}}", data).encode()

    def _place(self, picture: np.ndarray | None) -> int:
        """Return the place of a picture (H, W, 3) among the distinct ones, -1 without one."""
        if picture is None:
            return -1
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "WEBP", lossless=True, quality=30, method=2)
        address = f"data:image/webp;base64,{text(stream.getvalue())}"
        return self.pictures.setdefault(address, len(self.pictures))


def text(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode()
