import json
import subprocess
import sys

import numpy as np
import pytest

from ppo.utils.curriculum import Curriculum, CurriculumManager


def with_rates(*rates, **options):
    """A curriculum whose tasks 0 .. n - 1 have exactly these success averages."""
    curriculum = Curriculum(len(rates), **options)
    curriculum.ema[:] = rates
    return curriculum


def test_probabilities_by_hand():
    # distances 0.5, 0, 0.25 from a half at tau 0.25: weights e^-2, 1, e^-1; floor 0.1 for each of three
    curriculum = with_rates(0.0, 0.5, 0.75, tau=0.25, min_prob=0.1)
    weights = np.exp([-2.0, 0.0, -1.0])
    np.testing.assert_allclose(curriculum.probabilities(), 0.1 + 0.7 * weights / weights.sum())


def test_tasks_near_half_are_sampled_most_and_none_below_the_floor():
    curriculum = with_rates(0.0, 0.2, 0.5, 0.8, 1.0, tau=1e-4, min_prob=0.05)
    probability = curriculum.probabilities()
    assert probability.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(probability, [0.05, 0.05, 0.8, 0.05, 0.05], atol=1e-9)
    equal = with_rates(
        0.0, 1.0, 0.0, tau=1e-4, min_prob=0.0
    ).probabilities()  # all far away: not 0 / 0
    np.testing.assert_allclose(equal, 1 / 3)


def test_samples_follow_the_probabilities():
    curriculum = with_rates(0.0, 0.3, 0.5, 0.9, tau=0.2, min_prob=0.02, seed=1)
    probability, num = curriculum.probabilities(), 20_000
    counts = np.bincount(curriculum.sample(num), minlength=4)
    chi_square = ((counts - num * probability) ** 2 / (num * probability)).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001
    assert probability.max() > 1.5 * probability.min()


def test_the_average_follows_results_of_its_own_task_only():
    curriculum = Curriculum([3, 7], ema_alpha=0.5)
    curriculum.update([7, 7, 7], [True, True, False])  # 0.5 -> 0.75 -> 0.875 -> 0.4375
    stats = curriculum.stats()
    assert stats[7]["success_ema"] == pytest.approx(0.4375)
    assert (stats[7]["num_episodes"], stats[7]["num_successes"]) == (3, 2)
    assert stats[3]["num_episodes"] == 0 and "success_ema" not in stats[3]  # undefined is absent
    assert stats[3]["probability"] > stats[7]["probability"]  # an unseen task counts as half solved
    assert sum(s["probability"] for s in stats.values()) == pytest.approx(1.0)


def test_sampling_shifts_from_solved_tasks_to_those_being_learned():
    curriculum = Curriculum(3, ema_alpha=0.2, tau=0.1, min_prob=0.02)
    for _ in range(30):
        curriculum.update([0, 1, 1, 2], [True, True, False, False])
    probability = curriculum.probabilities()
    assert probability[1] > 0.5 and probability[0] < 0.1 and probability[2] < 0.1
    uniform = Curriculum(3, uniform=True)
    uniform.update([0] * 50, [True] * 50)
    np.testing.assert_allclose(uniform.probabilities(), 1 / 3)


def test_only_the_given_tasks_are_sampled_and_seeds_decide():
    draws = [Curriculum([2, 5, 9], seed=seed).sample(40) for seed in (0, 0, 1)]
    assert set(draws[0]) == {2, 5, 9}
    assert draws[0] == draws[1] != draws[2]


def test_a_resumed_curriculum_samples_what_the_uninterrupted_would_have():
    curriculum = Curriculum([4, 1, 6], seed=3)
    curriculum.sample(5)
    curriculum.update([4, 6, 6], [True, False, False])
    state = json.loads(json.dumps(curriculum.state_dict()))
    expected = curriculum.sample(50), curriculum.stats()
    resumed = Curriculum([4, 1, 6], seed=99)
    resumed.load_state_dict(state)
    assert (resumed.sample(50), resumed.stats()) == expected
    with pytest.raises(ValueError, match=r"has tasks \[4, 1, 6\], this run \[0, 1\]"):
        Curriculum(2).load_state_dict(state)


def test_the_file_is_complete_and_replaces_the_last_one(tmp_path):
    manager = CurriculumManager([1, 2], ema_alpha=0.5, seed=0)
    path = tmp_path / "curriculum.json"
    manager.save(str(path))
    manager.report_results([2], [True])
    manager.save(str(path))
    content = json.loads(path.read_text())
    assert content["stats"]["2"]["success_ema"] == 0.75
    assert content["stats"] == {str(k): v for k, v in manager.stats().items()}
    other = CurriculumManager([1, 2], seed=5)
    other.load_state_dict(content["state"])
    assert other.get_batch(30) == manager.get_batch(30)
    assert [p.name for p in tmp_path.iterdir()] == ["curriculum.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task_ids": 10, "min_prob": 0.11},
            "curriculum_min_prob 0.11 for each of 10 tasks .* use at most 0.1",
        ),
        ({"task_ids": []}, "at least one"),
        ({"task_ids": [1, 1]}, "each once"),
        ({"task_ids": 3, "ema_alpha": 0.0}, "curriculum_ema_alpha 0.0"),
        ({"task_ids": 3, "tau": 0.0}, "curriculum_tau 0.0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**options)


def test_a_floor_that_just_fits_is_uniform():
    np.testing.assert_allclose(
        with_rates(*np.linspace(0, 1, 10), min_prob=0.1).probabilities(), 0.1
    )


def test_unknown_results_are_refused_and_change_nothing():
    curriculum = Curriculum([2, 3])
    with pytest.raises(ValueError, match=r"unknown tasks \[4\]"):
        curriculum.update([2, 4], [True, True])
    with pytest.raises(ValueError, match="2 results with 1 successes"):
        curriculum.update([2, 3], [True])
    assert curriculum.stats()[2]["num_episodes"] == 0


def test_the_algorithm_imports_neither_ray_nor_vllm():
    modules = "ppo.gae, ppo.losses, ppo.rollout, ppo.critic, ppo.utils.curriculum, ppo.envs.base, ppo.envs.vector"
    program = f"import sys, {modules}; print(sorted({{'ray', 'vllm', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
