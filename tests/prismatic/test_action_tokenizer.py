"""OpenVLA's action tokens: hand-worked ids and centres."""

import numpy as np
import pytest

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.vla.action_tokenizer import ActionTokenizer


def test_encode_gives_openvlas_ids() -> None:
    tokenizer = ActionTokenizer(32000)
    # 255 intervals of 2/255: -1 is in the first (id 31999), 1 is past the last edge (31744), 0 is in the 128th.
    actions = np.array([[-1.0, -1.0 + 1.5 * 2 / 255, 0.0, 1.0 - 1e-6, 1.0, 5.0, -5.0]])
    assert tokenizer.encode(actions).tolist() == [[31999, 31998, 31872, 31745, 31744, 31744, 31999]]
    assert tokenizer.action_token_ids[[0, -1]].tolist() == [31744, 31999]


def test_decode_gives_bin_centres_and_two_ids_share_the_last() -> None:
    tokenizer = ActionTokenizer(32000)
    decoded = tokenizer.decode(np.array([31999, 31998, 31872, 31745, 31744]))
    np.testing.assert_allclose(
        decoded, [-254 / 255, -252 / 255, 0.0, 254 / 255, 254 / 255], atol=1e-12
    )


def test_round_trip_is_within_half_a_bin() -> None:
    tokenizer = ActionTokenizer(768)
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 7))
    assert np.abs(tokenizer.decode(tokenizer.encode(actions)) - actions).max() <= 1 / 255 + 1e-12


def test_ids_of_a_config_leave_out_the_padding_rows() -> None:
    config = OpenVLAConfig(text_config={"model_type": "llama", "vocab_size": 32064})
    tokenizer = ActionTokenizer.from_config(config)
    assert (
        (tokenizer.vocab_size, tokenizer.action_token_ids[0])
        == (32000, config.first_action_token_id)
        == (32000, 31744)
    )


@pytest.mark.parametrize("bad_id", [31743, 32000, 2])
def test_an_id_that_is_no_action_is_refused(bad_id: int) -> None:
    with pytest.raises(ValueError, match=f"{bad_id}.*31744..31999"):
        ActionTokenizer(32000).decode(np.array([31800, bad_id]))


def test_a_nan_action_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ActionTokenizer(32000).encode(np.array([0.0, np.nan]))
