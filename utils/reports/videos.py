"""Episodes as videos that every browser plays: single ones, contact sheets, and a grid of several.

Videos are H.264 (yuv420p) from imageio's own ffmpeg; text is drawn with Pillow's built-in font.
Shapes: T frames, H and W height and width in pixels, C three colours.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Smaller frames are enlarged by a whole factor, so that what the policy sees stays visible.
MIN_SIDE = 224
# A contact sheet shows this many frames of an episode; sizes in pixels.
SHEET_COLUMNS, SHEET_SIDE, SHEET_MARGIN = 8, 128, 22
# Grid: side of a frame, gap between frames, margin left of a row, caption above a column.
CELL, GAP, MARGIN, CAPTION = 192, 6, 96, 52
WHITE, INK, GOOD, BAD = (255, 255, 255), (40, 40, 40), (20, 140, 60), (190, 50, 40)


@lru_cache
def font(size: int) -> Any:
    """Return Pillow's built-in font at `size` pixels."""
    return ImageFont.load_default(size=size)


def save_video(file: str | Path, frames_THWC: Sequence[np.ndarray], fps: float = 10.0) -> None:
    """Write uint8 RGB frames as an mp4 and hold the last one for a second.

    Small frames are enlarged without smoothing to at least 224 pixels. Odd sides get one repeated
    row or column, because H.264 needs even ones.

    Raises:
        ValueError: there are no frames.
    """
    if not len(frames_THWC):
        raise ValueError(f"no frames for {file}")
    height, width = frames_THWC[0].shape[:2]
    factor = -(-MIN_SIDE // min(height, width))
    padding = ((0, height * factor % 2), (0, width * factor % 2), (0, 0))
    held = [*frames_THWC, *[frames_THWC[-1]] * round(fps)]
    with imageio.get_writer(
        str(file), fps=fps, codec="libx264", quality=7, macro_block_size=1, ffmpeg_log_level="error"
    ) as writer:
        for frame in held:
            large = np.repeat(np.repeat(frame, factor, axis=0), factor, axis=1)
            writer.append_data(np.pad(large, padding, mode="edge"))  # type: ignore[attr-defined]


def read_video(file: Path, num_frames: int) -> list[np.ndarray]:
    """Return the first frames of an mp4, each (H, W, 3) uint8.

    Raises:
        ValueError: the file has no frames.
    """
    with imageio.get_reader(str(file)) as reader:
        frames = [np.asarray(f) for f in itertools.islice(reader.iter_data(), num_frames)]  # type: ignore[attr-defined]
    if not frames:
        raise ValueError(f"{file} has no frames")
    return frames


def contact_strip(frames_THWC: Sequence[np.ndarray], label: str) -> np.ndarray:
    """Return a row of a contact sheet: `label` above frames spread evenly over the episode."""
    indices = np.linspace(0, len(frames_THWC) - 1, SHEET_COLUMNS).round().astype(int)
    size = (SHEET_COLUMNS * SHEET_SIDE, SHEET_MARGIN + SHEET_SIDE)
    strip = Image.new("RGB", size, WHITE)
    ImageDraw.Draw(strip).text((4, 3), label, fill=(0, 0, 0), font=font(14))
    for column, index in enumerate(indices):
        strip.paste(_resized(frames_THWC[index], SHEET_SIDE), (column * SHEET_SIDE, SHEET_MARGIN))
    return np.asarray(strip)


def save_contact_sheet(file: str | Path, strips: Sequence[np.ndarray]) -> None:
    """Write rows made by `contact_strip` as one PNG.

    Raises:
        ValueError: there are no rows.
    """
    if not len(strips):
        raise ValueError(f"no episodes for {file}")
    Image.fromarray(np.concatenate(list(strips))).save(file)


@dataclass
class EpisodeRecorder:
    """An `EpisodeObserver` that writes videos of the wanted episodes.

    It keeps the uint8 frames of every running episode that may still be written.

    Attributes:
        folder: created with the first video.
        outcomes: which episodes to write: "success", "failure" or both.
        max_per_task: videos of each task and outcome.
        fps: frames per second.
        instructions: by task id, for the contact sheet.
        named: (task id, initial state id) of episodes that are always written and do not count
            towards `max_per_task`.
        files: paths of the written videos relative to the folder's parent, by (task id, state id).
        strips: rows of the contact sheet under the same keys.
    """

    folder: Path
    outcomes: Collection[str]
    max_per_task: int
    fps: float = 10.0
    frames: dict[int, list[np.ndarray]] = field(default_factory=dict)
    num_saved: Counter = field(default_factory=Counter)
    files: dict[tuple[int, int | None], str] = field(default_factory=dict)
    instructions: Sequence[str] = ()
    strips: dict[tuple[int, int | None], np.ndarray] = field(default_factory=dict)
    named: Collection[tuple[int, int | None]] = ()

    def _wanted(self, task_id: int, outcome: str) -> bool:
        return outcome in self.outcomes and self.num_saved[task_id, outcome] < self.max_per_task

    def _is_named(self, episode: Any) -> bool:
        return (episode.task_id, episode.init_state_id) in self.named

    def start(self, env_id: int, request: Any, image: np.ndarray) -> None:
        """Keep the first frame of an episode that may be written."""
        self.frames.pop(env_id, None)
        if self._is_named(request) or any(self._wanted(request.task_id, o) for o in self.outcomes):
            self.frames[env_id] = [image]

    def step(self, env_id: int, image: np.ndarray) -> None:
        """Keep the frame after a step."""
        if env_id in self.frames:
            self.frames[env_id].append(image)

    def end(self, env_id: int, result: Any) -> None:
        """Write the episode if it is wanted, as task_03-episode_007-success.mp4."""
        frames = self.frames.pop(env_id, None)
        outcome = "success" if result.success else "failure"
        is_named = self._is_named(result)
        if frames is None or not (is_named or self._wanted(result.task_id, outcome)):
            return
        self.num_saved[result.task_id, outcome] += not is_named
        episode = f"task_{result.task_id:02d}-episode_{result.init_state_id:03d}"
        file = self.folder / f"{episode}-{outcome}.mp4"
        self.folder.mkdir(parents=True, exist_ok=True)
        save_video(file, frames, self.fps)
        key = (result.task_id, result.init_state_id)
        self.files[key] = f"{self.folder.name}/{file.name}"
        label = f"{result.task_id}/{result.init_state_id} {outcome}, {result.length} steps"
        if self.instructions:
            label += f": {self.instructions[result.task_id]}"
        self.strips[key] = contact_strip(frames, label)

    def save_contact_sheet(self) -> Path | None:
        """Write `contact_sheet.png` with one row per video in task order; None without videos."""
        if not self.strips:
            return None
        file = self.folder / "contact_sheet.png"
        save_contact_sheet(file, [self.strips[key] for key in sorted(self.strips)])
        return file


# ------------------------------------------------------------------------------------------- grid


@dataclass(frozen=True)
class Column:
    """One initial state: a caption, and each policy's frames and outcome in the order of the rows."""

    caption: str
    frames: tuple[Sequence[np.ndarray], ...]
    successes: tuple[bool, ...]


def save_grid(
    file: Path, columns: Sequence[Column], row_labels: Sequence[str], fps: float = 20.0
) -> None:
    """Write episodes side by side as an mp4: a column per initial state, a row per policy.

    An episode that has ended keeps its last frame, marked with its outcome.

    Raises:
        ValueError: there are no columns, or a column does not have one episode per row.
    """
    num_rows = len(row_labels)
    if not columns or any({len(c.frames), len(c.successes)} != {num_rows} for c in columns):
        raise ValueError(
            f"a grid needs columns with one episode for each of {', '.join(row_labels)}"
        )
    backdrop = _backdrop(columns, row_labels)
    frames = []
    for time in range(max(len(f) for column in columns for f in column.frames)):
        image = backdrop.copy()
        for (i, column), row in itertools.product(enumerate(columns), range(num_rows)):
            place = (MARGIN + i * (CELL + GAP), CAPTION + row * (CELL + GAP))
            image.paste(_cell(column, row, time), place)
        frames.append(np.asarray(image))
    save_video(file, frames, fps)


def distinct_words(instructions: Sequence[str]) -> list[str]:
    """Return the instructions without the words that all of them begin or end with.

    They stay whole where nothing would be left.
    """
    words = [text.split() for text in instructions]
    shortest = min(map(len, words), default=0)
    start = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), 0)
    end = next((i for i in range(shortest) if len({w[-1 - i] for w in words}) > 1), 0)
    cut = [" ".join(w[start : len(w) - end]) for w in words]
    return cut if all(cut) else list(instructions)


def _backdrop(columns: Sequence[Column], row_labels: Sequence[str]) -> Image.Image:
    size = (MARGIN + len(columns) * (CELL + GAP), CAPTION + len(row_labels) * (CELL + GAP))
    image = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(image)
    for i, column in enumerate(columns):
        place = (MARGIN + i * (CELL + GAP) + 2, 2)
        draw.text(place, _wrapped(column.caption, CELL - 4, 13), fill=INK, font=font(13))
    for row, label in enumerate(row_labels):
        place = (6, CAPTION + row * (CELL + GAP) + CELL // 2)
        draw.text(place, _wrapped(label, MARGIN - 10, 15), fill=INK, font=font(15))
    return image


def _cell(column: Column, row: int, time: int) -> Image.Image:
    frames, success = column.frames[row], column.successes[row]
    image = _resized(frames[min(time, len(frames) - 1)], CELL)
    if time >= len(frames) - 1:
        draw = ImageDraw.Draw(image)
        colour = GOOD if success else BAD
        draw.rectangle((0, 0, CELL - 1, CELL - 1), outline=colour, width=7)
        draw.rectangle((0, CELL - 24, CELL - 1, CELL - 1), fill=colour)
        draw.text((8, CELL - 22), "success" if success else "failure", fill=WHITE, font=font(15))
    return image


def _resized(frame: np.ndarray, side: int) -> Image.Image:
    """A frame as a square picture; averaged when it shrinks, smooth when it grows."""
    return Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int, size: int) -> str:
    """Text broken into lines of at most `width` pixels; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
