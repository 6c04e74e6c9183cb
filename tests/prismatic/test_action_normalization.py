"""Normalisation, LIBERO's gripper convention, and which statistics count."""

import json
from pathlib import Path

import numpy as np
import pytest

from prismatic.vla.action_normalization import (
    constant_dimensions,
    load_norm_stats,
    normalize_action,
    resolve_unnorm_key,
    to_env_action,
    tokens_to_env_actions,
    unnormalize_action,
)
from prismatic.vla.action_tokenizer import ActionTokenizer

STATS = {
    "q01": [-1.0, 0.0, 2.0, 0.0, 0.0, -0.5, 0.0],
    "q99": [1.0, 0.5, 4.0, 0.0, 0.0, 0.5, 1.0],
    "min": [-1.0, -0.1, 2.0, 0.0, 0.0, -0.6, 0.0],
    "max": [1.0, 0.6, 4.0, 0.0, 0.0, 0.6, 1.0],
    "mask": [True] * 6 + [False],
}


def test_normalize_by_hand() -> None:
    action = np.array([0.5, 0.125, 5.0, 0.0, 0.7, -0.5, 0.25])
    # Linear; linear; clipped; constant twice, whatever the value; the lower quantile; kept, as the mask says.
    np.testing.assert_allclose(
        normalize_action(action, STATS), [0.5, -0.5, 1.0, 0.0, 0.0, -1.0, 0.25], atol=1e-6
    )


def test_unnormalize_by_hand_and_batched() -> None:
    action = np.array([[0.5, -0.5, 1.0, 0.3, 0.0, -1.0, 0.25]])
    np.testing.assert_allclose(
        unnormalize_action(action, STATS), [[0.5, 0.125, 4.0, 0.0, 0.0, -0.5, 0.25]], atol=1e-6
    )


def test_statistics_without_a_mask_scale_everything() -> None:
    stats = {name: value for name, value in STATS.items() if name != "mask"}
    assert unnormalize_action(np.full(7, -1.0), stats)[6] == 0.0


def test_gripper_becomes_liberos_sign_and_one_half_is_not_zero() -> None:
    grippers = [0.0, 0.49, 0.5, 1.0]
    action = np.zeros((4, 7))
    action[:, -1] = grippers
    assert to_env_action(action)[:, -1].tolist() == [1.0, 1.0, -1.0, -1.0]
    assert action[:, -1].tolist() == grippers  # a copy


def test_tokens_to_env_actions() -> None:
    tokenizer = ActionTokenizer(1000)
    tokens = tokenizer.encode(np.array([[-1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.0] * 7]))
    env = tokens_to_env_actions(tokens, tokenizer, STATS)
    edge = 254 / 255
    np.testing.assert_allclose(env[0], [-edge, 0.25, 3.0, 0.0, 0.0, 0.5 * edge, -1.0], atol=1e-6)
    assert env[1, -1] == 1.0 and env.dtype == np.float32


def test_a_dimension_is_constant_if_every_token_gives_the_environment_the_same_number() -> None:
    tokenizer = ActionTokenizer(1000)
    assert constant_dimensions(tokenizer, STATS).tolist() == [False] * 3 + [True] * 2 + [False] * 2
    # what the mask keeps unscaled is not constant, whatever its quantiles; a gripper that never closes is
    stats = STATS | {"q01": [0.3] * 7, "q99": [0.3] * 7}
    assert constant_dimensions(tokenizer, stats).tolist() == [True] * 6 + [False]
    stats = {"q01": [-1.0] * 6 + [0.6], "q99": [1.0] * 7}
    assert constant_dimensions(tokenizer, stats).tolist() == [False] * 6 + [True]


def test_dataset_statistics_override_norm_stats(tmp_path: Path) -> None:
    one, two, three = ({"action": {"q01": [0.0], "q99": [high]}} for high in (1.0, 2.0, 3.0))
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": {"a": one, "b": two}}))
    assert load_norm_stats(tmp_path) == {"a": one, "b": two}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"b": three}))
    assert load_norm_stats(tmp_path) == {"a": one, "b": three}


def test_the_key_is_the_suite_then_its_no_noops_name() -> None:
    assert (
        resolve_unnorm_key({"libero_goal": {}, "libero_goal_no_noops": {}}, "libero_goal")
        == "libero_goal"
    )
    assert resolve_unnorm_key({"libero_goal_no_noops": {}}, "libero_goal") == "libero_goal_no_noops"
    assert resolve_unnorm_key({"libero_goal": {}, "mine": {}}, "libero_goal", "mine") == "mine"


def test_a_missing_key_is_refused_with_the_keys_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"'tabletop' or 'tabletop_no_noops'.*\['bridge_orig', 'fractal'\]"
    ):
        resolve_unnorm_key({"fractal": {}, "bridge_orig": {}}, "tabletop")
    with pytest.raises(ValueError, match="under 'mine'; it has none"):
        resolve_unnorm_key({}, "tabletop", "mine")
