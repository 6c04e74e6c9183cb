import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ppo.envs.base import ResetRequest
from ppo.held_out import check_task, nearest_distances, object_places, summarize_distances

SPEC = importlib.util.spec_from_file_location(
    "check_held_out", Path(__file__).parents[2] / "vla-scripts/check_held_out.py"
)
script = importlib.util.module_from_spec(SPEC)
sys.modules["check_held_out"] = script  # dataclasses look their module up
SPEC.loader.exec_module(script)


def test_places_are_cut_out_of_positions():
    qpos = np.arange(20.0)
    np.testing.assert_array_equal(object_places(qpos, [3, 10]), [[3, 4], [10, 11]])
    assert object_places(np.zeros((5, 20)), [3, 10]).shape == (5, 2, 2)


def test_distance_is_that_of_the_object_that_moved_farthest_from_the_nearest_state():
    states = np.array([[[0, 0], [1, 0]], [[5, 5], [6, 5]]], dtype=float)
    layouts = np.array([[[0, 0.3], [1, 0.4]], [[5, 5], [6, 5]], [[0, 0], [6, 5]]], dtype=float)
    np.testing.assert_allclose(nearest_distances(layouts, states), [0.4, 0.0, 50**0.5])


def test_summary_counts_equal_ones():
    summary = summarize_distances({3: np.array([0.004, 0.002]), 5: np.array([0.0])})
    assert summary["num_layouts"] == 3 and summary["num_equal"] == 1
    assert (
        summary["smallest_distance_mm"] == 0.0
        and summary["per_task"][0]["smallest_distance_mm"] == 2.0
    )
    assert (
        summary["per_task"][0]["median_distance_mm"] == 3.0
        and summary["per_task"][0]["num_equal"] == 0
    )


def test_wrong_flags_are_all_named():
    with pytest.raises(ValueError) as error:
        script.validate(script.Args(task_suite_name="tabletop", num_layouts=0, seed=-1))
    assert all(text in str(error.value) for text in ("tabletop", "--num_layouts 0", "--seed -1"))


@pytest.mark.libero
def test_random_layouts_are_none_of_the_fixed_states_and_a_fixed_one_is_found(tmp_path):
    from ppo.envs.libero import LiberoEnv

    assert script.main(script.Args(task_ids=(3,), num_layouts=4, output=tmp_path / "out.json")) == 0
    summary = json.loads((tmp_path / "out.json").read_text())
    assert (
        summary["num_layouts"] == 4
        and summary["num_equal"] == 0
        and summary["smallest_distance_mm"] > 1
    )

    class Fixed(LiberoEnv):
        """Every layout is the fixed state of the seed's number."""

        def reset(self, request):
            return super().reset(ResetRequest(request.task_id, request.seed, 0))

    env = Fixed("libero_spatial", 16, images=False, num_steps_wait=0)
    assert check_task(env, 3, [0, 49]) == pytest.approx([0.0, 0.0], abs=1e-9)
    env.close()


@pytest.mark.libero
def test_an_evaluation_seed_moves_the_fixtures_and_nothing_else():
    from ppo.envs.libero import LiberoEnv

    env = LiberoEnv("libero_spatial", 16, images=False, num_steps_wait=0)
    found = []
    for seed in (7, 8):
        env.reset(ResetRequest(3, 11, seed))
        fixtures = [env.domain.obj_body_id[name] for name in env.domain.fixtures_dict]
        others = np.ones(env.simulator.model.nbody, bool)
        for body in fixtures:
            others &= env.simulator.model.body_rootid != env.simulator.model.body_rootid[body]
        data = env.simulator.data
        found.append(
            (
                data.qpos.copy(),
                data.qvel.copy(),
                data.xpos[others].copy(),
                data.xpos[fixtures].copy(),
            )
        )
    (qpos, qvel, places, cabinet), (other_qpos, other_qvel, other_places, other_cabinet) = found
    assert (
        (qpos == other_qpos).all() and (qvel == other_qvel).all() and (places == other_places).all()
    )
    moved = np.linalg.norm(cabinet - other_cabinet, axis=-1)
    assert (moved > 1e-4).all() and (moved < 0.05).all()  # a few millimetres to centimetres
    env.close()
