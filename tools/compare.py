"""Train the same tasks with different memories, and set the results side by side.

Usage:
    compare [options]

<output>.md and, for each task, <output>_<task>.png show its rows. The mazes have 3 M steps by default.
Example: python -m tools.compare --tasks=poc_memory_env,minigrid --seeds=1

Options:
    --memories=<names>  Only these: trxl, segments, gtrxl, gru, lstm, none.
    --output=<file>     [default: docs/results/memories]."""

import io
import itertools
import statistics
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from run.checkpoint import load_model, write_file
from run.cli import arguments_of, command_line
from run.config import load_config
from tools.runs import CONFIGS, OPTIONS, Given, Row, Trial, chosen, fill, make_trial, scalars
from utils import UserError

POPGYM = ("RepeatPreviousEasy", "RepeatPreviousMedium", "RepeatPreviousHard", "AutoencodeEasy", "CountRecallEasy",
          "MultiarmedBanditEasy", "NoisyPositionOnlyPendulumEasy", "MineSweeperEasy", "ConcentrationEasy")  # fmt: skip
# Task → its config and what is changed in it.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name, ()) for name in ("poc_memory_env", "cartpole_masked", "minigrid")},
    **{name: ("popgym", (f"environment.name=popgym:popgym-{name}-v0",)) for name in POPGYM},
    **{name: (name, ("updates=183",)) for name in ("mystery_path_grid", "mortar_mayhem_grid")},
}
MEMORIES = {"trxl": "Transformer-XL", "segments": "Transformer-XL, gradients through segments", "gtrxl": "GTrXL",
            "gru": "GRU", "lstm": "LSTM", "none": "no memory"}  # fmt: skip
COLOURS = {memory: f"C{number}" for number, memory in enumerate(MEMORIES)}
COLUMNS = ("task", "length", "memory", "seed", "steps", "success", "reward", "optimum", "seconds", "steps_per_second",
           "parameters", "memory_bytes", "setting", "curve")  # fmt: skip
# What the last columns of <output>.md are called: medians over runs.
MEDIANS = {"steps": "steps", "steps_per_second": "steps/s", "parameters": "parameters",
           "memory_bytes": "bytes of memory per environment"}  # fmt: skip
CURVE = np.arange(1, 21) / 20  # the shares of a run after which its learning curve has a point


def main() -> None:
    """Parse the command line, carry out the runs that are missing, and draw."""
    arguments = arguments_of(__doc__ + OPTIONS, Given)
    memories, trials = chosen(arguments.memories, MEMORIES, "--memories"), []
    for task in chosen(arguments.tasks, TASKS, "--tasks"):
        name, changes = TASKS[task]
        plain = "gtrxl" if load_config(CONFIGS / f"{name}.yaml").transformer.gtrxl else "trxl"
        for seed, memory in itertools.product(range(1, arguments.seeds + 1), memories):
            path = CONFIGS / (f"{name}.yaml" if memory == plain else f"{name}_{memory}.yaml")
            if path.exists():
                trials.append(make_trial((task, "", memory, str(seed)), path, changes, arguments.updates))
    fill(trials, COLUMNS, measure, draw, arguments)


def measure(trial: Trial, found: Row) -> dict:
    """Return what the table says of a run that has been trained and, as `found` says, evaluated."""
    numbers = {name: found.get(f"{name}_mean", "") for name in ("success", "reward", "optimum")}
    learned = scalars(trial.run_id, f"episode/{'success' if numbers['success'] else 'reward'}_mean")
    if not learned:
        raise UserError("no episode has ended")
    speed = scalars(trial.run_id, "performance/update_steps_per_second")
    model, config, *_ = load_model(Path("models", f"{trial.run_id}.nn"), torch.device("cpu"))
    held = config.transformer
    entries = held.memory_length * held.num_blocks * held.embed_dim if held else int(model.core.state_size)  # type: ignore
    return numbers | {
        "steps": max(speed),
        "seconds": round(sum(min(speed) / value for value in speed.values())),
        "steps_per_second": round(statistics.median(speed.values())),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "memory_bytes": 4 * entries,
        "curve": " ".join(f"{v:.3f}" for v in np.interp(CURVE * trial.steps, [*learned], [*learned.values()])),
    }


def draw(rows: list[Row], output: Path) -> None:
    """Write the table, and a figure of learning curves for each task: means over runs, and bands of all runs."""
    headings = ["task", "memory", "success or reward", "of single runs", *MEDIANS.values()]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for task, of_task in grouped(rows, "task").items():
        axes = Figure(figsize=(6, 4), layout="constrained").subplots()
        axes.set(title=task, xlabel="steps", ylabel="success" if of_task[0]["success"] else "reward")
        for memory, own in grouped(of_task, "memory").items():
            values = [float(row["success"] or row["reward"]) for row in own]
            medians = [statistics.median(float(row[name]) for row in own) for name in MEDIANS]
            cells = [task, MEMORIES[memory], f"{np.mean(values):.3f}", " ".join(f"{value:.2f}" for value in values)]
            lines.append(f"| {' | '.join([*cells, *(f'{median:,.0f}' for median in medians)])} |")
            curves, steps = np.array([row["curve"].split() for row in own], dtype=float), CURVE * medians[0]
            axes.plot(steps, curves.mean(axis=0), label=MEMORIES[memory], color=COLOURS[memory])
            axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), alpha=0.15, color=COLOURS[memory])
        save(axes, output.with_name(f"{output.name}_{task}.png"))
    write_file(output.with_name(f"{output.name}.md"), ("\n".join(lines) + "\n").encode())


def grouped(rows: list[Row], column: str) -> dict[str, list[Row]]:
    """Return rows by what they have in a column, memories in the order of `MEMORIES`."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(MEMORIES).index(row["memory"])):
        groups.setdefault(row[column], []).append(row)
    return groups


def save(axes, path: Path) -> None:
    """Write the figure that axes belong to, with one legend for all of its panels below it."""
    figure = axes.figure
    lines = {line.get_label(): line for panel in figure.axes for line in panel.get_legend_handles_labels()[0]}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=3 if len(figure.axes) > 1 else 2)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150)
    write_file(path, stream.getvalue())


if __name__ == "__main__":
    command_line(main)
