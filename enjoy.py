"""Watch a trained agent play unseen episodes, together with what it attends to.

Usage:
    enjoy.py (<model> | --model=<file>) [options]
    enjoy.py -h | --help

Without --video or --html it opens a window, or prints results if there is none.
Options:
    --model=<file>    A file of models/; the same as <model>.
    --episodes=<n>    How many [default: 1].
    --seed=<n>        Skip that many of the unseen seeds [default: 0].
    --seeds=<seeds>   Which seeds, seen or not: 0:10 for 0 to 9.
    --max-steps=<n>   Cut episodes; at 10,000 where the task has no limit.
    --deterministic   Take the most probable actions instead of drawing them.
    --video=<file>    Write all episodes to this .mp4 or .gif.
    --html=<file>     Write a page to walk through an episode, one .html for each.
    --window          Open a window beside them; Esc ends, space pauses.
    --fps=<n>         Steps per second of window and video [default: 6].
    --device=<name>   cpu, cuda or cuda:N; by default cuda where there is one.
    --cpu             The same as --device=cpu.
    -h --help         Show this.
Example: python enjoy.py models/poc_memory_env.nn --video=episode.mp4
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from run.cli import Computing, Count, arguments_of, choose_device, command_line, step_limit, to_file, use_cores

WIDTH = 720


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
    from evaluation.watch import Player, describe_means
    from evaluation.window import open_window

    device, path = choose_device(arguments), arguments.given or arguments.model
    use_cores(device)
    wanted = arguments.video is arguments.html is None
    window = open_window(WIDTH, arguments.window) if wanted or arguments.window else None
    model, config, task, _ = load_for_play(path, device)
    seeds, note = chosen_seeds(arguments.seeds or str(arguments.episodes), arguments.seed, [config.environment])
    drawn, limit = bool(window or not wanted), step_limit(arguments.max_steps, task)
    player = Player(model, config, task, arguments.deterministic, drawn, limit)
    results: list[dict[str, float]] = []
    pictures = play(player, seeds, arguments, path.name, window, results)
    stopped = False
    try:
        if arguments.video:
            stopped = film(arguments.video, pictures, arguments.fps)
        for _ in pictures:
            pass
    finally:
        player.close()
    if len(results) > 1:
        print(f"mean of {len(results)} episodes: {', '.join(describe_means(results))}")
    if arguments.video:
        where = f"stopped at step {player.steps:,} of an episode; " if stopped else ""
        print(f"{where}the video is {arguments.video}", file=sys.stderr)
    if window is None and wanted:
        print("There is no display here; to watch: --video=episode.mp4 or --html=episode.html", file=sys.stderr)
    if note:
        print(note, file=sys.stderr)
    if stopped:
        sys.exit(130)


def play(player, seeds: list[int], arguments: Arguments, name: str, window, results: list[dict]) -> Iterator:
    """Play episodes, print and collect their results, write pages, and yield the pictures where there are any.

    Args:
        player: a `watch.Player`.
        seeds: of the episodes.
        arguments: of the command line.
        name: of the model.
        window: a `Window` to show them in, or None.
        results: takes what the environment reports of each episode.
    """
    from evaluation.page import Page
    from evaluation.watch import describe, draw_episode
    from run.checkpoint import write_file

    for number, seed in enumerate(seeds, start=1):
        page, html, ended = Page(player, seed, name), arguments.html, False
        drawn = arguments.video or window
        moments = draw_episode(player, seed, WIDTH, arguments.fps) if drawn else ((None, m) for m in player.play(seed))
        for picture, moment in moments:
            if html and not ended:
                page.add(moment)
            if moment.result is not None and not ended:
                ended = True
                results.append(moment.result)
                print(f"episode {number}, seed {seed}: {', '.join(describe(moment.result))}", flush=True)
                if html:
                    target = html if len(seeds) == 1 else html.with_stem(f"{html.stem}-{seed}")
                    write_file(target, page.html())
                    print(f"the page is {target}", file=sys.stderr)
            if picture is not None:
                yield picture
            if window is not None and not window.show(picture, arguments.fps):
                return


if __name__ == "__main__":
    command_line(main)
