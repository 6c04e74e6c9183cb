import imageio.v2 as imageio
import numpy as np
import pytest

from utils.reports.videos import (
    CAPTION,
    CELL,
    GAP,
    MARGIN,
    Column,
    distinct_words,
    read_video,
    save_grid,
    save_video,
)


def clip(value: int, num_frames: int, size: int = 140) -> list[np.ndarray]:
    return [np.full((size, size, 3), value, np.uint8)] * num_frames


def test_grid_has_a_column_per_episode_and_keeps_what_is_over(tmp_path):
    columns = [
        Column("next to the ramekin, state 3", (clip(40, 8), clip(90, 4)), (False, True)),
        Column("on the stove, state 0", (clip(140, 5), clip(200, 6)), (False, False)),
    ]
    save_grid(tmp_path / "grid.mp4", columns, ("supervised", "after PPO"), fps=4)
    frames = imageio.mimread(tmp_path / "grid.mp4", memtest=False)
    assert len(frames) == 8 + 4  # the longest, and a second
    height, width = CAPTION + 2 * (CELL + GAP), MARGIN + 2 * (CELL + GAP)
    assert frames[0].shape == (height, width, 3)

    def middle(frame, row, column):
        y, x = CAPTION + row * (CELL + GAP), MARGIN + column * (CELL + GAP)
        return frame[y + 60 : y + 120, x + 60 : x + 120].mean()

    def border(frame, row, column):
        y, x = CAPTION + row * (CELL + GAP), MARGIN + column * (CELL + GAP)
        return frame[y + 1 : y + 6, x + 20 : x + CELL - 20].reshape(-1, 3).mean(axis=0)

    for time in (0, -1):
        levels = [[middle(frames[time], row, column) for column in (0, 1)] for row in (0, 1)]
        np.testing.assert_allclose(levels, [[40, 140], [90, 200]], atol=8)
    red, green, _ = border(frames[-1], 1, 0)  # a success
    assert green > red + 50
    red, green, _ = border(frames[-1], 0, 1)  # a failure
    assert red > green + 50
    np.testing.assert_allclose(border(frames[0], 0, 0), 40, atol=10)  # not over yet


def test_a_grid_needs_an_episode_in_each_place(tmp_path):
    with pytest.raises(ValueError, match="each of supervised, after"):
        save_grid(tmp_path / "grid.mp4", [], ("supervised", "after"))
    with pytest.raises(ValueError, match="needs columns"):
        save_grid(
            tmp_path / "grid.mp4", [Column("a", (clip(1, 2),), (True,))], ("supervised", "after")
        )


def test_frames_come_back_without_the_last_one_held(tmp_path):
    save_video(tmp_path / "a.mp4", [*clip(20, 2), *clip(220, 1)], fps=10)
    frames = read_video(tmp_path / "a.mp4", 3)
    assert [round(float(f.mean()) / 20) for f in frames] == [1, 1, 11] and frames[0].shape == (
        280,
        280,
        3,
    )


def test_captions_are_the_words_that_differ():
    tasks = [
        "pick up the bowl on the stove and place it",
        "pick up the bowl next to the plate and place it",
    ]
    assert distinct_words(tasks) == ["on the stove", "next to the plate"]
    assert distinct_words(["same", "same"]) == ["same", "same"] and distinct_words(
        ["one task"]
    ) == ["one task"]
    assert distinct_words(["take the cup", "take the red cup"]) == [
        "take the cup",
        "take the red cup",
    ]
