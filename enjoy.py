"""Watch a trained agent play unseen episodes, together with what it attends to.

Usage:
    enjoy.py (<model> | --model=<file>) [options]
    enjoy.py -h | --help

Without --video and --html it opens a window, or only prints the results.
Options:
    --model=<file>    A file of models/; the same as <model>.
    --episodes=<n>    How many [default: 1].
    --seed=<n>        Skip that many of the unseen seeds [default: 0].
    --seeds=<seeds>   Which seeds, seen or not: 0:10 for 0 to 9.
    --max-steps=<n>   Cut episodes; at 10,000 where the task has no limit.
    --deterministic   Take the most probable actions instead of drawing them.
    --video=<file>    Write all episodes to this .mp4 or .gif.
    --html=<file>     Write each episode as an .html page to walk through.
    --window          Open a window beside them; Esc ends, space pauses.
    --fps=<n>         Steps per second of window and video [default: 6].
    --device=<name>   cpu, cuda or cuda:N; by default cuda where there is one.
    --cpu             The same as --device=cpu.
    -h --help         Show this.
Example: python enjoy.py models/poc_memory_env.nn --video=episode.mp4
"""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from run.cli import Computing, Count, arguments_of, choose_device, command_line, step_limit, to_file, use_cores
from utils import UserError


class Arguments(Computing):
    """What the docstring says."""

    given: Path | None = Field(alias="<model>")
    model: Path | None
    episodes: Count
    seed: Annotated[int, Field(ge=0, le=2**30)]
    seeds: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None
    max_steps: Count | None
    deterministic: bool
    video: Annotated[Path, to_file(".mp4", ".gif")] | None
    html: Annotated[Path, to_file(".html")] | None
    window: bool
    fps: Annotated[int, Field(ge=1, le=120)]


def main() -> None:
    """Parse the command line and play."""
    arguments = arguments_of(__doc__, Arguments)
    from evaluation.agent import load_for_play
    from evaluation.statistics import chosen_seeds
    from evaluation.video import film
    from evaluation.watch import Player
    from evaluation.window import Window

    device, path, video = choose_device(arguments), arguments.given or arguments.model, arguments.video
    use_cores(device)
    to_files, window = bool(video or arguments.html), None
    with nullcontext() if arguments.window else suppress(UserError):
        window = Window() if arguments.window or not to_files else None
    model, config, task, _ = load_for_play(path, device)
    seeds, note = chosen_seeds(arguments.seeds or str(arguments.episodes), arguments.seed, [config.environment])
    limit = step_limit(arguments.max_steps, task)
    with closing(Player(model, config, task, arguments.deterministic, to_files or window is not None, limit)) as player:
        pictures = play(player, seeds, arguments, path.name, window)
        if not video:
            deque(pictures, maxlen=0)
        elif film(video, pictures, arguments.fps):
            print(f"stopped at step {player.steps:,} of an episode; the video is {video}", file=sys.stderr)
            sys.exit(130)
        else:
            print(f"the video is {video}", file=sys.stderr)
    if note:
        print(note, file=sys.stderr)
    if not (window or to_files):
        print("There is no display here; to watch: --video=episode.mp4 or --html=episode.html", file=sys.stderr)


def play(player, seeds: list[int], arguments: Arguments, model: str, window) -> Iterator:
    """Play episodes with a `watch.Player`; print their results, write pages, show and yield pictures."""
    from evaluation.page import Page
    from evaluation.watch import describe, draw_episode
    from run.checkpoint import write_file

    fps = arguments.fps if arguments.video or window else 0
    for number, seed in enumerate(seeds, start=1):
        page = Page(player, seed, model)
        for moment, pictures in draw_episode(player, seed, fps):
            if arguments.html:
                page.add(moment)
            if moment.result is not None:
                print(f"episode {number}, seed {seed}: {', '.join(describe(moment.result))}", flush=True)
            for picture in pictures:
                yield picture
                if window is not None and not window.show(picture, fps):
                    return
        if arguments.html:
            file = arguments.html.with_stem(arguments.html.stem + f"-{seed}" * (len(seeds) > 1))
            write_file(file, page.html())
            print(f"the page is {file}", file=sys.stderr)


if __name__ == "__main__":
    command_line(main)
