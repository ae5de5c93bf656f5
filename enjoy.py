"""Watch a trained agent play unseen episodes, together with what it attends to.

Usage:
    enjoy.py --model=<file> [options]
    enjoy.py -h | --help

Without --video it opens a window, or prints the results where there is none.

Options:
    --model=<file>    A file of models/.
    --episodes=<n>    How many [default: 1].
    --seed=<n>        Skip that many of the unseen seeds [default: 0].
    --max-steps=<n>   Cut episodes; at 10,000 where the task has no limit.
    --deterministic   Take the most probable actions instead of drawing them.
    --video=<file>    Write all episodes to this .mp4 or .gif.
    --window          Open a window, beside --video too; Esc ends, space pauses.
    --fps=<n>         Steps per second of window and video [default: 6].
    --device=<name>   cpu, cuda or cuda:N; by default cuda where there is one.
    --cpu             The same as --device=cpu.
    -h --help         Show this.
Example:
    python enjoy.py --model=models/poc_memory_env.nn --video=episode.mp4
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from evaluation.window import has_display, open_window
from run.cli import Computing, Count, arguments_of, choose_device, command_line, step_limit, to_file, use_cores
from utils import UserError

WIDTH = 720


class Arguments(Computing):
    """What the docstring says."""

    model: Path
    episodes: Count
    seed: Annotated[int, Field(ge=0, le=2**30)]
    max_steps: Count | None
    deterministic: bool
    video: Annotated[Path, to_file(".mp4", ".gif")] | None
    window: bool
    fps: Annotated[int, Field(ge=1, le=120)]


def main() -> None:
    """Parse the command line and play."""
    arguments = arguments_of(__doc__, Arguments)
    episodes, fps, video = arguments.episodes, arguments.fps, arguments.video
    if arguments.window and not has_display():
        raise UserError("--window: there is no display; write a video instead: --video=episode.mp4")
    from evaluation.agent import first_unseen_seed, load_for_play
    from evaluation.video import film
    from evaluation.watch import Player, check_drawing, describe_means

    device = choose_device(arguments)
    use_cores(device)
    model, config, task, _ = load_for_play(arguments.model, device)
    first = first_unseen_seed(config.environment) + arguments.seed
    window = open_window(WIDTH, arguments.window, wanted=video is None)
    if window or video:
        check_drawing(model, config, task, "--video" if video else "--window", "without it results are printed")
    limit = step_limit(arguments.max_steps, task)
    player = Player(model, config, task, arguments.deterministic, render=bool(window or video), max_steps=limit)
    results: list[dict[str, float]] = []
    pictures = play(player, range(first, first + episodes), fps, window, results)
    stopped = False
    try:
        if video is None:
            for _ in pictures:
                pass
        else:
            stopped = film(video, pictures, fps, player)
    finally:
        player.close()
    if len(results) > 1:
        print(f"mean of {len(results)} episodes: {', '.join(describe_means(results))}")
    if window is None and video is None:
        print("There is no display here; to watch: --video=episode.mp4", file=sys.stderr)
    if stopped:
        sys.exit(130)


def play(player, seeds: range, fps: int, window, results: list[dict[str, float]]) -> Iterator:
    """Play episodes, print and collect their results, and yield the pictures where there are any.

    Args:
        player: a `watch.Player`.
        seeds: of the episodes.
        fps: pictures per second.
        window: a `Window` to show them in, or None.
        results: takes what the environment reports of each episode.
    """
    from evaluation.watch import describe, draw_episode

    for number, seed in enumerate(seeds, start=1):
        moments = draw_episode(player, seed, WIDTH, fps) if player.render else ((None, m) for m in player.play(seed))
        reported = False
        for picture, moment in moments:
            if moment.result is not None and not reported:
                reported = True
                results.append(moment.result)
                print(f"episode {number}, seed {seed}: {', '.join(describe(moment.result))}", flush=True)
            if picture is not None:
                yield picture
            if window is not None and not window.show(picture, fps):
                return


if __name__ == "__main__":
    command_line(main)
