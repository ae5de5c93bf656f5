"""Evaluate models on episodes that training has not seen.

Usage:
  evaluate.py [<models>...] [--group=<runs>]... [--reference=<c>]... [options]

Models are files, folders of them, or what --output wrote (.json), which is not
played again. Those with one config and commit are runs of one group.
Options:
    --seeds=<n>           How many unseen ones, or 0:10 for 0–9 [default: 50].
    --repetitions=<n>     How often it plays each of them [default: 5].
    --seed=<n>            Skip n unseen seeds; seeds actions [default: 0].
    --deterministic       Take the most probable actions instead of drawing them.
    --max-steps=<n>       Cut episodes; at 10,000 where the task has no limit.
    --group=<runs>        Name runs of one group: <label>:<models>,<models>…
    --aggregate=<what>    runs: average each first; episodes [default: runs].
    --metric=<name>       What is plotted: reward, success, … [default: reward].
    --plot=<file>         Learning curves as .png, .pdf or .svg.
    --reference=<curves>  Published ones beside them: <file>.csv:<task>/<run>,…
    --output=<file>       Write <file>.json with everything and <file>.csv.
    --processes=<n>       Processes that step the environments; by default half the cores.
    --device=<name>       cpu, cuda or cuda:N; by default cuda if there is one.
    --cpu                 The same as --device=cpu.
    -h --help             Show this.
Example: python evaluate.py models/*.nn --output=results --plot=curves.pdf
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from run.cli import Computing, Count, Processes, arguments_of, command_line, cores, step_limit, to_file
from utils import UserError


class Arguments(Computing):
    """What the docstring says."""

    models: list[str] = Field(alias="<models>")
    seeds: str
    repetitions: Annotated[int, Field(ge=1, le=10**6)]
    seed: Annotated[int, Field(ge=0, le=2**30)]
    deterministic: bool
    max_steps: Count | None
    group: list[str]
    aggregate: Literal["runs", "episodes"]
    metric: str
    plot: Annotated[Path, to_file(".png", ".pdf", ".svg")] | None
    reference: list[str]
    output: Annotated[Path, to_file("")] | None
    processes: Processes | None


def main() -> None:
    """Parse the command line and evaluate, together with the other ranks that torchrun started."""
    arguments = arguments_of(__doc__, Arguments)
    from evaluation.published import read_references
    from evaluation.statistics import check_same_episodes, chosen_seeds
    from run.checkpoint import provenance
    from run.distributed import together

    with together(arguments) as (ranks, device):
        with ranks.agree_on(UserError):
            if arguments.reference and arguments.plot is None:
                raise UserError("--reference: is for a figure; name one with --plot=<file>")
            stored, agents = load(arguments, device)
            models = [*stored, *(evaluated for evaluated, *_ in agents)]
            references = read_references(arguments.reference, arguments.metric, [m.environment for m in models])
            seeds, note = sorted({episode["seed"] for model in stored for episode in model.episodes}), ""
            if agents:
                sections = [config.environment for _, _, config, _ in agents]
                seeds, note = chosen_seeds(arguments.seeds, arguments.seed, sections)
            check_same_episodes(models, seeds, arguments.repetitions)
        if ranks.first and note:
            print(note, file=sys.stderr)
        play(agents, seeds, arguments, ranks)
        with ranks.agree_on(UserError, OSError):
            if ranks.first:
                protocol = {"command": ["python", *sys.argv], "seeds": seeds, "versions": provenance(device)}
                protocol |= arguments.model_dump(include={"repetitions", "seed", "deterministic"})
                report(models, protocol, arguments, references)


def load(arguments: Arguments, device) -> tuple[list, list[tuple]]:
    """Return the `Evaluated` of files that --output wrote, and (`Evaluated`, model, config, task) of those to play."""
    from evaluation.agent import load_for_play, task_name
    from evaluation.statistics import Evaluated, find_models, from_json

    labels = dict.fromkeys(find_models(arguments.models), "")
    for text in arguments.group:
        label, _, names = text.partition(":")
        if not label or not names:
            raise UserError(f"--group: {text!r} should be <label>:<models>,<models>…")
        labels |= dict.fromkeys(find_models(names.split(",")), label)
    if not labels:
        raise UserError("evaluate.py: name the models, or files that --output wrote; see --help")
    stored, agents = [], []
    for path, label in labels.items():
        if path.suffix == ".json":
            stored += from_json(path, label)
            continue
        model, config, task, run = load_for_play(path, device)
        name, limit = task_name(config.environment), step_limit(arguments.max_steps, task)
        agents.append((Evaluated(str(path), name, config.model_dump(), run, [], limit, label), model, config, task))
    return stored, agents


def play(agents: list[tuple], seeds: list[int], arguments: Arguments, ranks) -> None:
    """Let all models play the seeds."""
    import torch
    from tqdm import tqdm

    from evaluation.agent import play_episodes

    # The environments need the other cores. Must not depend on --processes: it decides how sums are rounded.
    mine = max(1, cores() // ranks.local_size)
    torch.set_num_threads(max(1, mine // 2))
    processes = arguments.processes or mine - max(1, mine // 2) or 1
    total = len(seeds) * arguments.repetitions // ranks.size
    for number, (evaluated, model, config, task) in enumerate(agents, start=1):
        name = f"{number}/{len(agents)} {Path(evaluated.path).name}"[-30:]
        with tqdm(desc=name, total=total, unit="episode", mininterval=1, disable=not ranks.first) as bar:
            evaluated.episodes = play_episodes(
                model, config, task, seeds, arguments.repetitions, action_seed=arguments.seed,
                deterministic=arguments.deterministic, processes=processes, ranks=ranks,
                max_steps=evaluated.max_steps, progress=bar.update,  # type: ignore[arg-type]
            )  # fmt: skip


def report(evaluated: list, protocol: dict, arguments: Arguments, references: dict) -> None:
    """Write the files that were asked for, and only then print; UserError where no group reports what is plotted."""
    from evaluation import statistics
    from run.checkpoint import write_file

    groups, files = statistics.group_runs(evaluated, arguments.aggregate), {}
    output, figure, metric = arguments.output, arguments.plot, arguments.metric
    known = dict.fromkeys(name for points in groups.values() for point in points for name in point.statistics)
    if output is not None:
        content = statistics.contents(groups, protocol)
        files[output.with_name(output.name + ".json")] = (json.dumps(content, indent=1) + "\n").encode()
        files[output.with_name(output.name + ".csv")] = statistics.to_csv(content)
    if figure is not None and metric in known:
        files[figure] = statistics.plot(groups, metric, figure.suffix, references)
    for path, data in files.items():
        write_file(path, data)
    print("\n".join(statistics.table(groups)), flush=True)
    if files:
        print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)
    if figure is not None and metric not in known:
        raise UserError(f"--metric: {metric!r} is not reported; allowed here are {', '.join(known)}")


if __name__ == "__main__":
    command_line(main)
