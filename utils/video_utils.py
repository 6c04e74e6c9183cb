"""Episodes as mp4 files that any browser plays (H.264, yuv420p, imageio's own ffmpeg), and as a contact sheet."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import imageio.v2 as imageio
import numpy as np

SHEET_COLUMNS, SHEET_SIDE, SHEET_MARGIN = (
    8,
    128,
    22,
)  # frames of an episode on a contact sheet, and pixels
MIN_SIDE = 224  # pixels: smaller images are enlarged by a whole factor, so that what the policy sees stays visible


def save_video(file: str | Path, frames_THWC: Sequence[np.ndarray], fps: float = 10.0) -> None:
    """Write uint8 RGB frames, all (H, W, 3), as an mp4; the last one is held for a second.

    Small frames are enlarged without smoothing to at least 224 pixels, odd sides get one repeated row or column (H.264
    needs even ones). Raises ValueError without frames.
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


def contact_strip(frames_THWC: Sequence[np.ndarray], label: str) -> np.ndarray:
    """One row of a contact sheet, uint8 RGB: `label` above frames spread evenly from the first to the last."""
    indices = np.linspace(0, len(frames_THWC) - 1, SHEET_COLUMNS).round().astype(int)
    small = [
        cv2.resize(frames_THWC[i], (SHEET_SIDE, SHEET_SIDE), interpolation=cv2.INTER_AREA)
        for i in indices
    ]
    header = np.full((SHEET_MARGIN, SHEET_COLUMNS * SHEET_SIDE, 3), 255, dtype=np.uint8)
    cv2.putText(
        header,
        label,
        (4, SHEET_MARGIN - 6),
        cv2.FONT_HERSHEY_SIMPLEX,
        0.45,
        (0, 0, 0),
        1,
        cv2.LINE_AA,
    )
    return np.concatenate([header, np.concatenate(small, axis=1)])


def save_contact_sheet(file: str | Path, strips: Sequence[np.ndarray]) -> None:
    """Write rows made by `contact_strip` as one PNG. Raises ValueError without rows."""
    if not len(strips):
        raise ValueError(f"no episodes for {file}")
    cv2.imwrite(str(file), cv2.cvtColor(np.concatenate(list(strips)), cv2.COLOR_RGB2BGR))


@dataclass
class EpisodeRecorder:
    """Keeps the frames of running episodes and writes those that are wanted (an `ppo.evaluation.EpisodeObserver`).

    Memory: one uint8 image per step of every running episode that may still be written.

    folder: made when the first video is written. outcomes: "success", "failure" or both. max_per_task: videos of each
    task and outcome. named: (task id, initial state id) of episodes that are written in any case and not counted
    there. files: what was written, by (task id, initial state id). instructions: by task id, for the rows
    of the contact sheet, which are kept in strips under the same keys.
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
        """Begin an episode's frames."""
        self.frames.pop(env_id, None)
        if self._is_named(request) or any(
            self._wanted(request.task_id, outcome) for outcome in self.outcomes
        ):
            self.frames[env_id] = [image]

    def step(self, env_id: int, image: np.ndarray) -> None:
        """Add a frame."""
        if env_id in self.frames:
            self.frames[env_id].append(image)

    def end(self, env_id: int, result: Any) -> None:
        """Write the episode if it is wanted: task_03-episode_007-success.mp4."""
        frames = self.frames.pop(env_id, None)
        outcome = "success" if result.success else "failure"
        is_named = self._is_named(result)
        if frames is None or not (is_named or self._wanted(result.task_id, outcome)):
            return
        self.num_saved[result.task_id, outcome] += not is_named
        file = (
            self.folder
            / f"task_{result.task_id:02d}-episode_{result.init_state_id:03d}-{outcome}.mp4"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        save_video(file, frames, self.fps)
        key = (result.task_id, result.init_state_id)
        self.files[key] = f"{self.folder.name}/{file.name}"
        instruction = self.instructions[result.task_id] if self.instructions else ""
        label = f"{result.task_id}/{result.init_state_id} {outcome}, {result.length} steps: {instruction}"
        self.strips[key] = contact_strip(frames, label)

    def save_contact_sheet(self) -> Path | None:
        """Write `contact_sheet.png` beside the videos, a row for each in task order; None without videos."""
        if not self.strips:
            return None
        file = self.folder / "contact_sheet.png"
        save_contact_sheet(file, [self.strips[key] for key in sorted(self.strips)])
        return file
