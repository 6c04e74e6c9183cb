"""Two policies' episodes from the same initial states as one video: a column per episode, the later policy below.

H, W: height and width in pixels; T frames.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio.v2 as imageio
import numpy as np

from utils.video_utils import save_video

CELL, GAP, MARGIN, CAPTION = (
    192,
    6,
    96,
    52,
)  # pixels: an image's side, between two, left of a row, above a column
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
GOOD, BAD = (20, 140, 60), (190, 50, 40)
FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class Column:
    """One initial state: its task's words, and each policy's frames and outcome, in the rows' order."""

    caption: str
    frames: tuple[Sequence[np.ndarray], ...]
    successes: tuple[bool, ...]


def read_video(file: Path, num_frames: int) -> list[np.ndarray]:
    """The first frames of an mp4, (H, W, 3) uint8: it holds its last one for a while. Raises ValueError without any."""
    with imageio.get_reader(str(file)) as reader:
        frames = [np.asarray(frame) for frame in itertools.islice(reader.iter_data(), num_frames)]  # type: ignore[attr-defined]
    if not frames:
        raise ValueError(f"{file} holds no frame")
    return frames


def distinct_words(instructions: Sequence[str]) -> list[str]:
    """Instructions without the words that all of them begin or end with; whole where nothing would be left."""
    words = [text.split() for text in instructions]
    shortest = min(map(len, words), default=0)
    start = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), 0)
    end = next((i for i in range(shortest) if len({w[-1 - i] for w in words}) > 1), 0)
    cut = [" ".join(w[start : len(w) - end]) for w in words]
    return cut if all(cut) else list(instructions)


def wrapped(text: str, width: int, scale: float) -> list[str]:
    """Words in lines of at most `width` pixels (a longer word stands alone)."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and cv2.getTextSize(longer, FONT, scale, 1)[0][0] <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def draw_text(image: np.ndarray, lines: Sequence[str], x: int, y: int, scale: float) -> None:
    """Write lines below each other, the first one's base line at y."""
    for i, line in enumerate(lines):
        cv2.putText(image, line, (x, y + i * int(40 * scale)), FONT, scale, INK, 1, cv2.LINE_AA)


def _backdrop(columns: Sequence[Column], row_labels: Sequence[str]) -> np.ndarray:
    height = CAPTION + len(row_labels) * (CELL + GAP)
    image = np.full((height, MARGIN + len(columns) * (CELL + GAP), 3), BACKGROUND, np.uint8)
    for i, column in enumerate(columns):
        draw_text(
            image,
            wrapped(column.caption, CELL - 4, 0.42)[:3],
            MARGIN + i * (CELL + GAP) + 2,
            14,
            0.42,
        )
    for row, label in enumerate(row_labels):
        draw_text(
            image,
            wrapped(label, MARGIN - 10, 0.5),
            6,
            CAPTION + row * (CELL + GAP) + CELL // 2,
            0.5,
        )
    return image


def _cell(column: Column, row: int, time: int) -> np.ndarray:
    frames, success = column.frames[row], column.successes[row]
    frame = frames[min(time, len(frames) - 1)]
    interpolation = cv2.INTER_AREA if frame.shape[0] >= CELL else cv2.INTER_CUBIC
    image = np.ascontiguousarray(cv2.resize(frame, (CELL, CELL), interpolation=interpolation))
    if time >= len(frames) - 1:
        colour = GOOD if success else BAD
        cv2.rectangle(image, (0, 0), (CELL - 1, CELL - 1), colour, 7)
        cv2.rectangle(image, (0, CELL - 24), (CELL - 1, CELL - 1), colour, -1)
        cv2.putText(
            image,
            "success" if success else "failure",
            (8, CELL - 8),
            FONT,
            0.5,
            BACKGROUND,
            1,
            cv2.LINE_AA,
        )
    return image


def save_grid(
    file: Path, columns: Sequence[Column], row_labels: Sequence[str], fps: float = 20.0
) -> None:
    """Write the columns side by side as an mp4; an episode that is over keeps its last frame, with its outcome.

    Raises ValueError without columns, or if a column has not an episode for each row.
    """
    if not columns or any(
        len(c.frames) != len(row_labels) or len(c.successes) != len(row_labels) for c in columns
    ):
        raise ValueError(
            f"a grid needs columns with an episode for each of {', '.join(row_labels)}"
        )
    backdrop = _backdrop(columns, row_labels)
    frames = []
    for time in range(max(len(f) for column in columns for f in column.frames)):
        image = backdrop.copy()
        for i, column in enumerate(columns):
            for row in range(len(row_labels)):
                y, x = CAPTION + row * (CELL + GAP), MARGIN + i * (CELL + GAP)
                image[y : y + CELL, x : x + CELL] = _cell(column, row, time)
        frames.append(image)
    save_video(file, frames, fps)
