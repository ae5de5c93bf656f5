"""Pictures as a video, in a file or as an animation."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from run.start import StopRequest


def film(path: Path, pictures: Iterable[Image.Image], fps: int) -> bool:
    """Write pictures of one even size to an .mp4 (H.264) or .gif; return whether SIGINT or SIGTERM ended it early.

    The file is written whole, up to where it was ended, or not at all where making the pictures fails.
    """
    temporary, stop = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}"), StopRequest()

    def until_stopped() -> Iterator[Image.Image]:
        for picture in pictures:
            yield picture
            if stop.asked:
                return

    try:
        with stop.on_signals():
            if path.suffix.lower() == ".gif":
                temporary.write_bytes(encode_gif(until_stopped(), fps))
            else:
                write_mp4(temporary, until_stopped(), fps)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return stop.asked


def write_mp4(path: Path, pictures: Iterable[Image.Image], fps: int) -> None:
    """Write pictures of one even size as H.264."""
    import imageio.v2

    writer = imageio.v2.get_writer(
        path, format="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=2,
        ffmpeg_log_level="error",
    )  # fmt: skip
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
