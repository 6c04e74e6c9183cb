"""Metric files: what is written can be read back by TensorBoard, W&B offline and ourselves; nothing undefined is 0."""

import math

from utils.logging_utils import MetricWriter, PhaseTimer, format_duration, read_metrics


def write_two_steps(folder, **options):
    writer = MetricWriter(folder, config={"learning_rate": 0.1}, **options)
    writer.write(1, {"train/loss": 0.5, "rollout/success_rate": None, "train/kl": math.nan})
    writer.write(2, {"train/loss": 0.25, "rollout/success_rate": 1.0})
    writer.close()


def test_tensorboard_and_jsonl_hold_every_defined_value_and_no_other(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_two_steps(tmp_path)
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": 0.25, "rollout/success_rate": 1.0},
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [e.step for e in events.Scalars("rollout/success_rate")] == [2]
    assert "train/kl" not in events.Tags()["scalars"]


def test_tensorboard_shows_a_step_that_came_again_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_two_steps(tmp_path)
    writer = MetricWriter(tmp_path, first_step=2)
    writer.write(2, {"train/loss": 0.125})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.125)]


def test_wandb_offline_writes_into_the_run_and_sends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_two_steps(tmp_path, use_wandb=True, wandb_project="test", wandb_mode="offline")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))[0].stat().st_size > 0


def test_phases_of_one_name_add_up_and_a_pop_starts_anew():
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("outer"), timer.phase("inner"):
            pass
    seconds = timer.pop()
    assert set(seconds) == {"outer", "inner"} and seconds["outer"] >= seconds["inner"] >= 0
    assert timer.pop() == {}


def test_durations_read_like_a_clock():
    assert [format_duration(s) for s in (0, 59.6, 125, 3723)] == ["0:00", "1:00", "2:05", "1:02:03"]
