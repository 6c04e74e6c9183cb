"""Episodes as mp4 files that any browser plays (H.264, yuv420p), written with imageio's own ffmpeg."""

from collections.abc import Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np

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
