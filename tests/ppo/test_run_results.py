import pytest

from ppo.run_results import (
    choose_columns,
    compare,
    curve_points,
    merge_results,
    piece_spans,
    ppo_phases,
    summarize_policy,
    summarize_ppo,
)
from utils.reports.statistics import wilson_interval


def part(successes: dict[int, list[bool]], **changes) -> dict:
    """A results.json with `successes[task][state]`; an episode of task t takes 10 t + state + 1 steps."""

    def numbers(values):
        return {
            "successes": sum(values), "episodes": len(values), "rate": sum(values) / len(values),
            "wilson_95": list(wilson_interval(sum(values), len(values))),
        }  # fmt: skip

    episodes = [
        {"task_id": t, "init_state_id": s, "seed": 9, "success": ok, "length": 10 * t + s + 1,
         "episode_return": float(ok), "num_dropped": 0, "video": None}
        for t, row in successes.items()
        for s, ok in enumerate(row)
    ]  # fmt: skip
    everything = {
        "checkpoint_fingerprint": "abc", "task_suite_name": "libero_spatial", "seed": 7, "temperature": 0.0,
        "remarks": ["stand-ins"], "time": {"wall_s": 5.0},
        "overall": {**numbers([ok for row in successes.values() for ok in row]), "void": 1, "dropped_attempts": 2},
        "per_task": [{"task_id": t, "instruction": f"do {t}", **numbers(row)} for t, row in successes.items()],
        "episodes": episodes,
    }  # fmt: skip
    return everything | changes


def test_parts_of_an_evaluation_read_as_one():
    merged = merge_results([part({1: [True, False]}), part({0: [True, True, False]})])
    overall = merged["overall"]
    assert (overall["successes"], overall["episodes"], overall["rate"]) == (3, 5, 0.6)
    assert overall["wilson_95"] == list(wilson_interval(3, 5))
    assert overall["mean_length"] == pytest.approx((11 + 12 + 1 + 2 + 3) / 5)
    assert overall["mean_length_success"] == pytest.approx((11 + 1 + 2) / 3)
    assert (overall["void"], overall["dropped_attempts"]) == (2, 4)
    assert [task["task_id"] for task in merged["per_task"]] == [0, 1]
    assert [(e["task_id"], e["init_state_id"]) for e in merged["episodes"]][:2] == [(0, 0), (0, 1)]
    assert merged["remarks"] == ["stand-ins"] and merged["wall_s"] == 10.0


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="a task in common"):
        merge_results([part({1: [True]}), part({1: [True]})])
    with pytest.raises(ValueError, match="differ in seed: .7, 8"):
        merge_results([part({1: [True]}), part({0: [True]}, seed=8)])
    with pytest.raises(ValueError, match="differ in checkpoint_fingerprint"):
        merge_results([part({1: [True]}), part({0: [True]}, checkpoint_fingerprint="x")])


def test_a_gain_counts_the_states_that_turned_either_way():
    before, after = part({0: [True, False, False, False]}), part({0: [False, True, True, False]})
    gain = compare(before, after)
    assert (
        gain["gain_points"] == 25.0 and gain["gain_points_95"][0] < 25 < gain["gain_points_95"][1]
    )
    assert (
        gain["states_turned_to_success"],
        gain["states_turned_to_failure"],
        gain["mcnemar_p"],
    ) == (2, 1, 1.0)
    summary = summarize_policy(after, before)
    assert summary["successes"] == 2 and summary["gain_points"] == 25.0
    assert summary["per_task"][0][
        "instruction"
    ] == "do 0" and "gain_points" not in summarize_policy(before)


def step(number: int, seconds: float, rate: float | None = None, **more) -> dict:
    line = {"step": number, "time/step_s": seconds, "time/env_steps_total": 100.0 * number}
    line |= (
        {"rollout/num_episodes": 0.0}
        if rate is None
        else {"rollout/num_episodes": 4.0, "rollout/success_rate": rate}
    )
    return line | more


METRICS = [
    step(1, 10.0, 0.25, **{"time/collect_s": 8.0, "time/generate_s": 5.0, "time/wait_env_s": 1, "time/update_s": 2}),
    step(2, 10.0, **{"time/collect_s": 8.0, "time/generate_s": 5.0, "time/update_s": 1.5, "time/checkpoint_s": 0.5}),
    step(3, 4.0, 0.75, **{"time/update_s": 4.0}),
]  # fmt: skip
# The first piece began its first step 20 s after its start, the second, of step 3, 30 s after; the third did none.
PIECES = [
    {"started": 0.0, "seconds": 45.0, "outcome": "stopped", "first_step": 1, "first_step_s": 30.0},
    {"started": 90.0, "seconds": 40.0, "outcome": "stopped", "first_step": 3, "first_step_s": 34.0},
    {"started": 200.0, "seconds": 7.0, "outcome": "done"},
]


def test_start_ups_of_all_pieces_are_told_from_training():
    assert piece_spans(PIECES, METRICS) == [(20.0, 45.0), (30.0, 40.0)]
    summary = summarize_ppo(METRICS, PIECES)
    assert (summary["wall_s"], summary["training_s"], summary["startup_s"]) == (92.0, 35.0, 57.0)
    assert (
        summary["num_pieces"] == 3
        and summary["training_steps"] == 3
        and summary["env_steps"] == 300
    )
    assert summary["env_steps_per_s"] == round(300 / 35, 1)
    assert summary["sampled_success_last_10_steps"] == 0.5
    split = summary["time_split_s"]
    assert sum(split.values()) == pytest.approx(35.0)
    assert split["engine generating"] == 10.0 and split["updates"] == 7.5
    assert split["saving and stopping"] == pytest.approx(35 - 16 - 7.5)


def test_what_is_collected_beside_the_updates_is_not_counted_twice():
    line = {
        "time/collect_s": 1.0,
        "time/generate_s": 5.0,
        "time/wait_env_s": 2.0,
        "time/update_s": 8.0,
    }
    phases = ppo_phases([line, line], 20.0, "rest")
    assert sum(phases.values()) == 20.0 and "engine generating" not in phases
    assert phases["waiting for rollouts, beside the updates"] == 2.0 and phases["updates"] == 16.0


def test_a_run_that_has_not_begun_has_no_rates():
    summary = summarize_ppo([], [{"started": 0.0, "seconds": 3.0, "outcome": "failed"}])
    assert summary["training_s"] == 0 and summary["startup_s"] == 3.0
    assert "env_steps_per_s" not in summary and "sampled_success_last_10_steps" not in summary


def test_curve_has_steps_and_seconds_of_those_in_which_episodes_ended():
    points = curve_points([*METRICS, {"step": 3, "time/eval_s": 9.0}])
    assert [(p.env_steps, p.success_rate, p.num_episodes, p.seconds) for p in points] == [
        (100, 0.25, 4, 10.0), (300, 0.75, 4, 24.5)
    ]  # fmt: skip


def test_episodes_that_end_first_are_no_point_of_their_own():
    settled = curve_points(METRICS, settled_at=300)
    assert [(p.env_steps, p.success_rate, p.num_episodes, p.seconds) for p in settled] == [
        (300, 0.5, 8, 24.5)
    ]
    assert curve_points(METRICS, settled_at=100) == curve_points(METRICS)
    assert curve_points(METRICS, settled_at=301) == ()


def test_columns_are_recorded_states_that_turned_then_others_one_per_task():
    before = part({0: [False, False], 1: [True, True], 2: [False, False], 3: [False, False]})
    after = part({0: [True, True], 1: [True, True], 2: [False, True], 3: [True, False]})
    recorded = {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 1)}
    assert choose_columns(before, after, recorded, 3) == [(0, 0), (1, 0), (2, 1)]
    assert choose_columns(before, after, recorded, 2) == [(0, 0), (2, 1)]
    assert choose_columns(before, after, set(), 2) == []
