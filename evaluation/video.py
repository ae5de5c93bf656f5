"""Pictures as a video."""

import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from imageio_ffmpeg import write_frames

from run.start import StopRequest

PALETTE = "split[a][b];[a]palettegen[palette];[b][palette]paletteuse=dither=none:diff_mode=rectangle"
FORMATS: dict[str, dict[str, Any]] = {
    ".mp4": {"codec": "libx264", "pix_fmt_out": "yuv420p"},
    # One palette for all pictures, which ffmpeg keeps until the last one has come.
    ".gif": {"codec": "gif", "pix_fmt_out": "pal8", "output_params": ["-vf", PALETTE]},
}


def film(path: Path, pictures: Iterator[np.ndarray], fps: int) -> bool:
    """Write pictures (H, W, 3) of one even size to an .mp4 or .gif; return whether a signal ended it early.

    The file is written whole, up to where it was ended, or not at all where making the pictures fails.
    """
    temporary, stop = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}"), StopRequest()
    first, options = next(pictures), FORMATS[path.suffix.lower()] | {"fps": fps, "ffmpeg_log_level": "error"}
    try:
        with (
            stop.on_signals(),
            closing(write_frames(temporary, first.shape[1::-1], macro_block_size=2, **options)) as to,
        ):
            to.send(None)
            for picture in itertools.chain([first], pictures):
                to.send(picture)
                if stop.asked:
                    break
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return stop.asked
