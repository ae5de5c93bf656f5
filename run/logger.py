"""What a person sees of a run: TensorBoard, one progress bar, plain lines where there is no terminal."""

import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary, hparams
from tqdm import tqdm

from run.config import Config


class Logger:
    """Writes a run's numbers to TensorBoard and its progress to the terminal.

    Args:
        folder: where the summaries of all runs lie.
        config: the run's config; kept as text and as hyperparameters to compare runs by.
        run: what is known about the run; names its folder, which a resumed run writes on in.
        steps: environment steps done already; what was logged beyond them by an interrupted run is dropped.
    """

    def __init__(self, folder: Path, config: Config, run: dict, steps: int) -> None:
        self.updates, self.started = config.updates, time.perf_counter()
        self.first: tuple[int, float] | None = None
        resumed = "summaries" in run
        run.setdefault("summaries", f"{run['run_id']}/{datetime.now():%Y%m%d-%H%M%S-%f}")
        self.writer: Any = SummaryWriter(folder / run["summaries"], purge_step=steps + 1 if resumed else None)
        if not resumed:
            self.writer.add_text("config", f"```\n{yaml.safe_dump(config.model_dump(), sort_keys=False)}```")
            self.writer.add_text("run", "\n".join(f"- {key}: {value}" for key, value in run.items()))
            for summary in hparams(flatten(config.model_dump()) | {"seed": run["seed"]}, {"episode/reward_mean": 0})[
                :2
            ]:
                self.add(summary)
        # The thread that writes hands its errors on to whoever logs next; they need not be shown as well.
        threading.excepthook = lambda error: None if error.exc_type is OSError else sys.__excepthook__(*error[:3])
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} {elapsed}<{remaining}"
            done = steps // (config.n_workers * config.worker_steps)
            self.bar = tqdm(total=self.updates, initial=done, desc=run["run_id"][:16], bar_format=layout,
                            dynamic_ncols=True)  # fmt: skip

    def log(self, update: int, steps: int, scalars: dict[str, float]) -> None:
        """Log the scalars of an update by tag, over environment steps, and show progress."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, steps)
        self.writer.flush()
        shown = []
        for name in ("reward", "success", "length"):
            if f"episode/{name}_mean" in scalars:
                shown.append(f"{name} {scalars[f'episode/{name}_mean']:.2f}")
        shown = shown or ["no episode has ended yet"]
        shown.append(f"{scalars['performance/update_steps_per_second']:,.0f} steps/s")
        if self.bar is not None:
            self.bar.set_description_str(" ".join(word for word in shown if "length" not in word), refresh=False)
            self.bar.update()
            return
        now = time.perf_counter()
        self.first = self.first or (update - 1, self.started)
        left = (now - self.first[1]) / (update - self.first[0]) * (self.updates - update)
        print(f"update {update}/{self.updates} step {steps:,} {' '.join(shown)} left {timedelta(seconds=round(left))}",
              file=sys.stderr, flush=True)  # fmt: skip

    def histograms(self, steps: int, model: nn.Module) -> None:
        """Log the distribution of every weight."""
        for name, parameter in model.named_parameters():
            self.writer.add_histogram(f"weights/{name}", parameter.detach().cpu(), steps)

    def video(self, steps: int, episode: Summary) -> None:
        """Log an episode as an animated picture."""
        self.add(episode, steps)

    def add(self, summary: Summary, steps: int | None = None) -> None:
        """Log what TensorBoard's writer has no method for."""
        self.writer.file_writer.add_summary(summary, steps)

    def flush(self) -> None:
        """Let the system have all that was logged."""
        self.writer.flush()

    def close(self) -> None:
        """Finish the files and the bar."""
        if self.bar is not None:
            self.bar.close()
        self.writer.close()


def flatten(section: dict, prefix: str = "") -> dict[str, float | str | bool]:
    """Return a nested config as one level of dotted keys."""
    flat: dict[str, float | str | bool] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


class Episodes:
    def __init__(self, ranks):
        self.ranks, self.ended, self.finished = ranks, [], []

    def add(self, reports):
        self.ended += reports

    def collect(self):
        ended = [report for reports in self.ranks.gather(self.ended) for report in reports]
        self.finished += [report for _, _, report in sorted(ended, key=lambda report: report[:2])]
        self.ended.clear()
        del self.finished[:-100]

    def scalars(self):
        from environments.numbers import episode_scalars
        return episode_scalars(self.finished)

    def state_dict(self):
        return {"finished": list(self.finished)}

    def load_state_dict(self, state):
        self.finished = list(state["finished"])
