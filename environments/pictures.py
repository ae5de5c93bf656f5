"""Pictures to be looked at, (height, width, 3): of frames, of vectors, of boards."""

import numpy as np

# The smallest picture that passes the encoder's three convolutions; smaller frames pass other ones.
SMALLEST_PICTURE = 36
# A drawn vector: cells side by side, and the shortest side in pixels.
MOST_COLUMNS, SHORTEST_SIDE, SMALLEST_CELL = 16, 96, 12


def frame_picture(frame: np.ndarray) -> np.ndarray:
    """Return a frame (channels, height, width) as a picture (height, width, 3) that can be looked at, a copy.

    Stacks show their newest picture. Small grids, whose numbers stand for kinds, are scaled to the full range.
    """
    shown = frame[-3:] if len(frame) % 3 == 0 else frame[-1:].repeat(3, axis=0)
    if min(frame.shape[1:]) < SMALLEST_PICTURE:
        shown = shown * np.uint8(255 // max(int(shown.max()), 1))
    return np.array(shown.transpose(1, 2, 0), order="C")


def vector_picture(vector: np.ndarray) -> np.ndarray:
    """Return a vector as a picture, where nothing is drawn: a cell for each entry, black over grey to white."""
    columns = min(len(vector), MOST_COLUMNS)
    cells = np.pad(vector.astype(float), (0, -len(vector) % columns))
    # 0 is grey, ±1 is three quarters of the way to white and black, however large an entry gets.
    grey = np.uint8(127.5 + 127.5 * np.tanh(cells)).reshape(-1, columns)
    return cell_picture(grey[:, :, None].repeat(3, axis=2))


def cell_picture(colours: np.ndarray) -> np.ndarray:
    """Return a picture of a board whose cells have these colours, (rows, columns, 3), with white lines between them."""
    cell = max(SMALLEST_CELL, -(-SHORTEST_SIDE // min(colours.shape[:2])))
    picture = np.uint8(colours).repeat(cell, axis=0).repeat(cell, axis=1)
    picture[cell - 1 :: cell], picture[:, cell - 1 :: cell] = 255, 255
    return picture
