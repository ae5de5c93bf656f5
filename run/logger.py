"""What a person sees of a run: TensorBoard, one progress bar, plain lines where there is no terminal."""

import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from environments.numbers import count_missing_success, episode_scalars
from run.config import Config
from run.distributed import Ranks

# Episode statistics are means over this many of the latest episodes.
EPISODES_KEPT = 100


class Episodes:
    """What the `latest` episodes of all ranks reported."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.ended: list[tuple[int, int, dict[str, float]]] = []
        self.latest: list[dict[str, float]] = []

    def add(self, ended: Iterable[tuple[int, int, dict[str, float]]]) -> None:
        """Take (step of the rollout, environment, report) of episodes of this rank."""
        self.ended += ended

    def collect(self) -> dict[str, float]:
        """Extend `latest` by what all ranks added, in the order of its end; return means by tag, if there are any."""
        ended = [episode for episodes in self.ranks.gather(self.ended) for episode in episodes]
        self.latest += [report for _, _, report in sorted(ended, key=lambda episode: episode[:2])]
        self.ended.clear()
        count_missing_success(self.latest)
        del self.latest[:-EPISODES_KEPT]
        return episode_scalars(self.latest)


class Logger:
    """Writes a run's numbers to TensorBoard and its progress to the terminal.

    In `folder` each run that had this id has a folder of its own. A resumed run writes on in its own, so that there is
    one curve; what was logged after the finished updates, `update`, is dropped.
    """

    def __init__(self, folder: Path, config: Config, about: dict, update: int) -> None:
        self.config, self.about = config, about
        earlier = sorted(folder.glob("[0-9]*")) if len(about["starts"]) > 1 else []
        self.folder = earlier[-1] if earlier else folder / f"{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder.mkdir(parents=True, exist_ok=True)  # so that a run resumed before its first update finds it
        self.started, self.first = time.perf_counter(), update
        # The thread that writes hands its errors on to whoever logs next; they need not be shown as well.
        threading.excepthook = lambda error: None if error.exc_type is OSError else sys.__excepthook__(*error[:3])
        self.writer: Any = None
        # None: there is none where there is no terminal.
        layout = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} {elapsed}<{remaining}"
        self.bar = tqdm(total=config.updates, initial=update, desc=about["run_id"][:16], bar_format=layout,
                        dynamic_ncols=True, disable=None)  # fmt: skip

    def _open(self, update: int) -> SummaryWriter:
        writer: Any = SummaryWriter(self.folder, purge_step=update * self.config.samples + 1)
        writer.add_text("config", f"```\n{yaml.safe_dump(self.config.model_dump(), sort_keys=False)}```")
        writer.add_text("run", "\n".join(f"- {key}: {value}" for key, value in self.about.items()))
        # What is as by default is left out: TensorBoard orders columns by name, and there are many.
        chosen = flatten(self.config.model_dump(exclude_defaults=True)) | {"seed": self.about["seed"]}
        for summary in hparams(chosen, {"episode/success_mean": 0, "episode/reward_mean": 0})[:2]:
            writer.file_writer.add_summary(summary)
        return writer

    def log(self, update: int, scalars: dict[str, float], weights: dict[str, Tensor]) -> None:
        """Log scalars by tag and histograms of weights after an update, over environment steps, and show progress."""
        steps = update * self.config.samples
        try:
            self.writer = self.writer or self._open(update - 1)
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, steps)
            for name, weight in weights.items():
                self.writer.add_histogram(f"weights/{name}", weight.detach().cpu(), steps)
            self.writer.flush()
        except OSError as error:  # the disk is full or gone: the run goes on, and so do its curves once they can
            print(f"\n{self.folder}: the curves have a gap: {error.strerror}", file=sys.stderr)
            self._close_writer()
        self._show(update, scalars)

    def _show(self, update: int, scalars: dict[str, float]) -> None:
        means = {name: scalars.get(f"episode/{name}_mean") for name in ("reward", "success", "length")}
        shown = [f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None]
        shown = shown or ["no episode has ended yet"]
        shown.append(f"{scalars['performance/update_steps_per_second']:,.0f} steps/s")
        if not self.bar.disable:
            self.bar.set_description_str(" ".join(word for word in shown if "length" not in word), refresh=False)
            self.bar.update()
            return
        seconds = (time.perf_counter() - self.started) / (update - self.first) * (self.config.updates - update)
        print(f"update {update}/{self.config.updates} step {update * self.config.samples:,} {' '.join(shown)} "
              f"left {timedelta(seconds=round(seconds))}", file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        """Finish the files and the bar."""
        self.bar.close()
        self._close_writer()

    def _close_writer(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()


def flatten(section: dict, prefix: str = "") -> dict[str, float | str]:
    """Return a nested config as one level of dotted keys."""
    flat: dict[str, float | str] = {}
    for key, value in section.items():
        plain = value if isinstance(value, (int, float)) else str(value)
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: plain}
    return flat
