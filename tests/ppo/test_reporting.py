"""The console line, the rollout's metrics and the choice of the best policy."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ppo.collector import Collector
from ppo.envs.vector import VectorEnv
from ppo.episodes import TrainingEpisode
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


def test_success_and_return_are_absent_when_no_episode_is_reported():
    metrics = rollout_metrics([], [WORKER, WORKER | {"generate_s": 4.0}])
    assert metrics["rollout/num_episodes"] == 0 and "rollout/success_rate" not in metrics
    assert metrics["mem/environments_gib"] == 4.0 and metrics["mem/worker_peak_gib"] == 1.5
    assert metrics["rollout/num_void_steps"] == 4 and metrics["time/generate_s"] == 4.0


def test_rates_are_over_the_episodes_that_are_reported():
    episodes = [
        TrainingEpisode(0, None, 1, True, 4, 1.0),
        TrainingEpisode(2, None, 2, False, 10, 0.0),
    ]
    metrics = rollout_metrics(episodes, [WORKER])
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


def ended(*returns: float, start_step: int = 0) -> list[TrainingEpisode]:
    return [TrainingEpisode(0, None, 1, r > 0, 4, r, start_step=start_step) for r in returns]


def test_ema_of_the_return_is_the_bias_corrected_average_in_the_order_of_the_starts():
    best = BestReturn(min_delta=0.0, patience=0)
    assert best.ema is None and best.mean_step is None
    best.update(ended(1.0), 1, num_steps=8)
    assert best.ema == pytest.approx(1.0) and best.mean_step == pytest.approx(1.0)
    best.update(ended(0.0, start_step=8) + ended(0.5, start_step=31), 4, num_steps=8)
    weights = [0.99**2, 0.99, 1.0]
    assert best.ema == pytest.approx((weights[0] * 1.0 + 0.5) / sum(weights))
    steps = weights[0] * 1 + weights[1] * 2 + weights[2] * 4
    assert best.mean_step == pytest.approx(steps / sum(weights))


def test_best_return_is_saved_on_a_strict_improvement_and_not_too_often():
    best = BestReturn(min_delta=0.01, patience=3)
    assert not best.update([], 1, 8)
    assert not best.update(ended(*[1.0] * 99), 1, 8), "an EMA of few episodes is noise"
    assert best.update(ended(*[0.0] * 40), 2, 8)
    first = best.ema
    assert not best.update(ended(*[1.0] * 50), 3, 8) and not best.update([], 4, 8), "patience"
    assert best.ema > first + 0.1
    assert best.update(ended(1.0), 5, 8) and best.best == best.ema
    assert not best.update(ended(0.0), 9, 8), "worse"
    assert not best.update(ended(1.0, 1.0), 12, 8), "not better by min_delta"


def test_best_return_goes_on_from_its_state():
    straight, first, second = (BestReturn(min_delta=0.01, patience=2) for _ in range(3))
    returns = [[0.5] * 100, [1.0] * 9, [], [1.0] * 9, [2.0] * 9]
    expected = [straight.update(ended(*values), s, 8) for s, values in enumerate(returns, 1)]
    got = [first.update(ended(*values), s, 8) for s, values in enumerate(returns[:3], 1)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.update(ended(*values), s, 8) for s, values in enumerate(returns[3:], 4)]
    assert got == expected and any(expected[3:]) and second == straight


# ---- what a run at LIBERO's sizes reports: the collector, and environments whose success it chooses

NUM_ENVS = 32


class Play:
    """Training steps of a policy that succeeds with a given probability."""

    def __init__(self, num_steps: int, limit: int) -> None:
        self.num_steps, self.limit, self.probability = num_steps, limit, 0.0
        self.collector = Collector(
            self.make_environments(), [[1]], self.generate, self.decode, num_groups=2, seed=(0, 0),
            time_limit=limit
        )  # fmt: skip

    def make_environments(self) -> VectorEnv:
        return VectorEnv(
            "tests.worlds:LOTTERY_SUITE", NUM_ENVS, num_processes=1, image_size=2,
            max_steps=self.limit
        )  # fmt: skip

    def generate(self, prompt_ids, images):
        tokens = np.zeros((len(images), 7), dtype=np.int64)
        return SimpleNamespace(token_ids=tokens, logprobs=tokens.astype(np.float32))

    def decode(self, token_ids):
        actions = np.zeros((len(token_ids), 7), dtype=np.float32)
        actions[:, 0] = self.probability
        return actions

    def step(self, probability: float) -> list[TrainingEpisode]:
        self.probability = probability
        return self.collector.collect(self.num_steps, itertools.repeat(0))[1]


@pytest.mark.parametrize(("num_steps", "limit", "num_updates"), [(32, 120, 60), (128, 220, 25)])
def test_best_return_of_a_policy_that_learns_is_saved_late_and_with_a_true_return(
    num_steps, limit, num_updates
):
    """Successes take 72 steps and failures the limit: the first episodes to end are successes."""
    play, best = Play(num_steps, limit), BestReturn(min_delta=0.01, patience=5)
    rates = np.linspace(0.37, 0.90, num_updates)
    saves, true_ema, weight = {}, 0.0, 0.0
    with play.collector.vector:
        for step, rate in enumerate(rates, 1):
            episodes = play.step(float(rate))
            for (
                episode
            ) in episodes:  # the EMA of the true rates at which these episodes were played
                true_rate = rates[episode.start_step // num_steps]
                true_ema, weight = 0.99 * true_ema + 0.01 * true_rate, 0.99 * weight + 0.01
            if best.update(episodes, step, num_steps):
                saves[step] = (best.ema, true_ema / weight)
            if step * num_steps < limit:
                assert not episodes, "none that can only be a success"
    assert len(saves) >= 3 and max(saves) > 0.75 * num_updates
    # An EMA of 100 returns of 0 or 1 deviates by 0.052 at most, one of very many by 0.035.
    for found, expected in saves.values():
        assert found == pytest.approx(expected, abs=3 * 0.052)
    assert best.best > 0.65


def test_the_success_rate_of_the_first_steps_is_that_of_the_policy():
    """Episodes that end within the first 96 steps of 120 are all successes, whatever the policy."""
    play = Play(num_steps=32, limit=120)
    with play.collector.vector:
        reported = [play.step(0.37) for _ in range(12)]
    assert [len(episodes) for episodes in reported[:4]] == [0, 0, 0, NUM_ENVS]
    counted = [episode.success for episodes in reported for episode in episodes]
    deviation = np.sqrt(0.37 * 0.63 / len(counted))
    assert len(counted) > 90 and np.mean(counted) == pytest.approx(0.37, abs=3 * deviation)


def test_an_evaluation_before_every_rollout_does_not_change_the_success_rate():
    """If they gave up the episodes under way, a true rate of 45 % would be reported as 100 %."""

    def reported(evaluates: bool) -> list[list[TrainingEpisode]]:
        play, found = Play(num_steps=128, limit=220), []
        for _ in range(8):
            if evaluates:
                state = play.collector.state_dict()
                play.collector.vector.close()
                play.collector.vector = play.make_environments()
                play.collector.load_state_dict(state)
            found.append(play.step(0.45))
        play.collector.vector.close()
        return found

    with_evaluations = reported(True)
    assert with_evaluations == reported(False)
    successes = [episode.success for episodes in with_evaluations for episode in episodes]
    deviation = np.sqrt(0.45 * 0.55 / len(successes))
    assert len(successes) > 100 and np.mean(successes) == pytest.approx(0.45, abs=3 * deviation)
