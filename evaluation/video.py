"""Pictures as a video, in a file or as an animation."""

import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from run.start import StopRequest

if TYPE_CHECKING:
    from evaluation.watch import Player


def film(path: Path, pictures: Iterable[Image.Image], fps: int, player: "Player") -> bool:
    """Write pictures as a video, until the end or until SIGINT or SIGTERM; say so, and return whether it was stopped.

    Args:
        path: of the video.
        pictures: that a player plays.
        fps: pictures per second.
        player: who plays.
    """
    stop = StopRequest()

    def until_stopped() -> Iterator[Image.Image]:
        for picture in pictures:
            yield picture
            if stop.asked:
                return

    with stop.on_signals():
        write_video(path, until_stopped(), fps)
    where = f"stopped at step {player.steps:,} of an episode; " if stop.asked else ""
    print(f"{where}the video is {path}", file=sys.stderr)
    return stop.asked


def write_video(path: Path, pictures: Iterable[Image.Image], fps: int) -> None:
    """Write pictures of one even size to an .mp4 (H.264) or .gif, whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix.lower() == ".gif":
            temporary.write_bytes(encode_gif(pictures, fps))
        else:
            write_mp4(temporary, pictures, fps)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_mp4(path: Path, pictures: Iterable[Image.Image], fps: int) -> None:
    """Write pictures of one even size as H.264."""
    import imageio.v2

    settings: dict[str, Any] = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2}
    settings["ffmpeg_log_level"] = "error"
    writer = imageio.v2.get_writer(path, format="FFMPEG", fps=fps, **settings)
    try:
        for picture in pictures:
            writer.append_data(np.asarray(picture))
    finally:  # the writer's own context leaves ffmpeg running where something fails
        writer.close()


def encode_gif(pictures: Iterable[Image.Image], fps: int) -> bytes:
    """Return pictures as an animated GIF that repeats; equal neighbours become one that is shown for longer."""
    few_colours = (picture.quantize(128, dither=Image.Dither.NONE) for picture in pictures)
    stream = io.BytesIO()
    next(few_colours).save(stream, "GIF", save_all=True, append_images=few_colours, duration=1000 / fps, loop=0)
    return stream.getvalue()
