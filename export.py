"""Write a trained agent as an ONNX graph, which plays without PyTorch and without this program.

Usage:
    export.py --model=<file> [options]
    export.py -h | --help

The graph is one step: observation and memory in, policy, value and memory out.
Before it is written, onnxruntime plays three episodes beside PyTorch.

Options:
    --model=<file>    A file of models/.
    --output=<file>   Write this .onnx; by default the model's name in this folder.
    --max-steps=<n>   Cut episodes; at 10,000 where the task has no limit.
    -h --help         Show this.
Example:
    python export.py --model=models/minigrid.nn --output=agent.onnx
"""

from pathlib import Path
from typing import Annotated

from run.cli import Arguments, Count, arguments_of, command_line, step_limit, to_file
from utils import UserError


class Export(Arguments):
    """What the docstring says."""

    model: Path
    output: Annotated[Path, to_file(".onnx")] | None
    max_steps: Count | None


def main() -> None:
    """Parse the command line, make the graph, compare it and write it."""
    arguments = arguments_of(__doc__, Export)
    try:
        from evaluation.graph import describe, play_beside, to_graph
    except ModuleNotFoundError as error:
        raise UserError(f"export.py: needs {error.name}: pip install -r requirements-export.txt") from error
    import torch

    from run.checkpoint import load_model, write_file

    model, config, task, run = load_model(arguments.model, torch.device("cpu"))
    name, output = arguments.model.name, arguments.output or Path(arguments.model.with_suffix(".onnx").name)
    graph = to_graph(model.eval())
    largest = play_beside(graph, model, config, step_limit(arguments.max_steps, task))
    describe(graph, model=name, environment=config.environment.model_dump(), run=run, largest_difference=largest)
    content = graph.SerializeToString()
    write_file(output, content)
    differences = ", ".join(f"{name} {difference:.1e}" for name, difference in largest.items())
    print(f"{output}: {len(content) / 1e6:.1f} MB; largest differences from PyTorch: {differences}")


if __name__ == "__main__":
    command_line(main)
