"""The console line, the rollout's metrics and the choice of the best policy."""

import json

import pytest

from ppo.evaluation import EpisodeResult
from ppo.reporting import BestReturn, progress_line, rollout_metrics, time_metrics

WORKER = {
    "num_void_steps": 2.0,
    "num_replaced": 1.0,
    "num_not_repeated": 0.0,
    "generate_s": 3.0,
    "wait_env_s": 0.5,
    "mem_gib": 1.5,
    "envs_gib": 2.0,
}


def test_success_and_return_are_absent_when_no_episode_ended():
    metrics = rollout_metrics([], [WORKER, WORKER | {"generate_s": 4.0}])
    assert metrics["rollout/num_episodes"] == 0 and "rollout/success_rate" not in metrics
    assert metrics["mem/environments_gib"] == 4.0 and metrics["mem/worker_peak_gib"] == 1.5
    assert metrics["rollout/num_void_steps"] == 4 and metrics["time/generate_s"] == 4.0


def test_rates_are_over_the_episodes_that_ended():
    ended = [EpisodeResult(0, None, 1, True, 4, 1.0), EpisodeResult(2, None, 2, False, 10, 0.0)]
    metrics = rollout_metrics(ended, [WORKER])
    assert metrics["rollout/success_rate"] == 0.5 and metrics["rollout/episode_length"] == 7.0


def test_busy_fractions_are_shares_of_the_step():
    seconds = {"step": 10.0, "update": 6.0, "sync": 1.0}
    workers = [{"collect_s": 4.0, "generate_s": 3.0}, {"collect_s": 8.0, "generate_s": 5.0}]
    metrics = time_metrics(seconds, workers, samples_per_step=200)
    assert metrics["time/env_steps_per_s"] == 20.0 and metrics["time/sync_s"] == 1.0
    assert metrics["time/trainer_busy_fraction"] == pytest.approx(0.6)
    assert metrics["time/worker_busy_fraction"] == pytest.approx(0.6)
    assert metrics["time/engine_busy_fraction"] == pytest.approx(0.4)


def test_the_line_has_the_eta_and_a_dash_for_what_is_undefined():
    metrics = {
        "rollout/num_episodes": 0.0,
        "time/sync_s": 0.1,
        "time/collect_s": 2.0,
        "time/update_s": 1.0,
    }
    line = progress_line(2, 10, metrics | {"time/env_steps_per_s": 99.7}, step_s=10.0)
    assert (
        "step 2/10" in line
        and "success - (0 ep)" in line
        and "ETA 1:20" in line
        and "100 env steps/s" in line
    )


def test_best_return_is_saved_on_a_strict_improvement_and_not_too_often():
    best = BestReturn(min_delta=0.01, patience=3)
    assert not best.update([], 1)
    assert best.update([0.5], 2)
    assert not best.update([1.0] * 50, 3) and not best.update([1.0] * 50, 4), "patience"
    assert best.update([1.0], 5) and best.ema == pytest.approx(1.0 - 0.5 * 0.99**101)
    assert not best.update([0.0], 9), "worse"


def test_best_return_goes_on_from_its_state():
    straight, first, second = (BestReturn(min_delta=0.01, patience=2) for _ in range(3))
    returns = [[0.5], [1.0] * 9, [], [1.0] * 9, [2.0] * 9]
    expected = [straight.update(values, step) for step, values in enumerate(returns, 1)]
    got = [first.update(values, step) for step, values in enumerate(returns[:3], 1)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.update(values, step) for step, values in enumerate(returns[3:], 4)]
    assert got == expected and any(expected[3:]) and second == straight
