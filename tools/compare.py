"""Train the same tasks with different memories, and set the results side by side.

Usage:
    compare [options]

What there is already is not done again, so it may be interrupted at any time. A run whose
config has changed, or that is to be longer, is done anew. Of each run <output>.csv has a row;
<output>.md and, for each task, <output>_<task>.png are drawn from them.

Options:
    --seeds=<n>         Runs of each task and memory, with the seeds 1 to n; 0 draws only [default: 3].
    --tasks=<names>     Only these, or whose names contain one of these, with commas between; see TASKS.
    --memories=<names>  Only these: trxl, segments, gtrxl, gru, lstm, none.
    --updates=<n>       Updates of each run, schedules in proportion; by default the config's, of the mazes 3 M steps.
    --parallel=<n>      Runs at a time, a core each; by default one per core.
    --output=<file>     [default: docs/results/memories].
    -h --help           Show this.

Example: python -m tools.compare --tasks=poc_memory_env,minigrid --seeds=1
"""

import io
import statistics
from pathlib import Path

import numpy as np
import torch

from run.checkpoint import load_model, write_file
from run.cli import arguments_of, command_line
from run.config import load_config
from tools.runs import Failed, Given, Row, Trial, chosen, digest, fill, make_trial, scalars

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
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
COLUMNS = ("task", "length", "memory", "seed", "steps", "success", "reward", "optimum", "seconds", "steps_per_second",
           "parameters", "memory_bytes", "setting", "curve")  # fmt: skip
# Of the table, whose last columns are medians over runs.
MEDIANS = ("steps", "steps_per_second", "parameters", "memory_bytes")
HEADINGS = ("task", "memory", "success or reward", "of single runs", "steps", "steps/s", "parameters",
            "bytes of memory per environment")  # fmt: skip
PARTS = 20  # of a curve


class Arguments(Given):
    """What the docstrings of this module and of the ladder say."""

    memories: str | None


def main() -> None:
    """Parse the command line, carry out the runs that are missing, and draw."""
    arguments = arguments_of(__doc__, Arguments)
    trials = []
    for task in chosen(arguments.tasks, TASKS, "--tasks"):
        name, changes = TASKS[task]
        files = {memory: CONFIGS / f"{name}_{memory}.yaml" for memory in MEMORIES}
        plain = "gtrxl" if load_config(CONFIGS / f"{name}.yaml").transformer.gtrxl else "trxl"
        files[plain] = CONFIGS / f"{name}.yaml"
        for seed in range(1, arguments.seeds + 1):
            for memory in chosen(arguments.memories, MEMORIES, "--memories"):
                if (path := files[memory]).exists():
                    key = task, "", memory, str(seed)
                    trials.append(make_trial(key, digest(path, changes), path, changes, arguments.updates))
    fill(trials, COLUMNS, measure, draw, arguments)


def measure(trial: Trial, found: Row) -> dict:
    """Return what the table says of a run that has been trained and, as `found` says, evaluated."""
    numbers = {name: found.get(f"{name}_mean", "") for name in ("success", "reward", "optimum")}
    speed = scalars(trial.run_id, "performance/update_steps_per_second")
    kind = "success" if numbers["success"] else "reward"
    learned = dict(sorted(scalars(trial.run_id, f"episode/{kind}_mean").items()))
    if not learned:
        raise Failed("no episode has ended")
    curve = np.interp(np.arange(1, PARTS + 1) * trial.steps / PARTS, [*learned], [*learned.values()])
    model, config, *_ = load_model(Path("models", f"{trial.run_id}.nn"), torch.device("cpu"))
    held = config.transformer
    entries = held.memory_length * held.num_blocks * held.embed_dim if held else int(model.core.state_size)  # type: ignore
    return numbers | {
        "steps": max(speed),
        "seconds": round(sum(min(speed) / value for value in speed.values())),
        "steps_per_second": round(statistics.median(speed.values())),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "memory_bytes": 4 * entries,
        "curve": " ".join(f"{value:.3f}" for value in curve),
    }


def draw(rows: list[Row], output: Path) -> None:
    """Write the table, and a figure of learning curves for each task: means over runs, and bands of all runs."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for task, of_task in grouped(rows, "task").items():
        axes = new_figure()
        axes.set(title=task, xlabel="steps", ylabel="success" if of_task[0]["success"] else "reward")
        for memory, own in grouped(of_task, "memory").items():
            values = [float(row["success"] or row["reward"]) for row in own]
            medians = [statistics.median(float(row[name]) for row in own) for name in MEDIANS]
            cells = [task, MEMORIES[memory], f"{np.mean(values):.3f}", " ".join(f"{value:.2f}" for value in values)]
            lines.append(f"| {' | '.join([*cells, *(f'{median:,.0f}' for median in medians)])} |")
            curves = np.array([row["curve"].split() for row in own], dtype=float)
            steps = np.arange(1, PARTS + 1) / PARTS * medians[0]
            axes.plot(steps, curves.mean(axis=0), label=MEMORIES[memory], color=colour(memory))
            axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), alpha=0.15, color=colour(memory))
        save(axes, output.with_name(f"{output.name}_{task}.png"))
    write_file(output.with_name(f"{output.name}.md"), ("\n".join(lines) + "\n").encode())


def grouped(rows: list[Row], column: str) -> dict[str, list[Row]]:
    """Return rows by what they have in a column, memories in the order of `MEMORIES`."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(MEMORIES).index(row["memory"])):
        groups.setdefault(row[column], []).append(row)
    return groups


def colour(memory: str) -> str:
    """Return a memory's colour, the same in all figures."""
    return f"C{list(MEMORIES).index(memory)}"


def new_figure(panels: int = 1):
    """Return the axes of a new figure, an array of them where it has several panels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(6 * panels, 4), layout="constrained").subplots(1, panels)


def save(axes, path: Path) -> None:
    """Write the figure that axes belong to, with one legend for all of its panels below it."""
    figure = axes.figure
    lines = {line.get_label(): line for panel in figure.axes for line in panel.get_legend_handles_labels()[0]}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=3)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150)
    write_file(path, stream.getvalue())


if __name__ == "__main__":
    command_line(main)
