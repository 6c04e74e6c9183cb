"""Continuous actions to tokens and back, by OpenVLA's rule.

An action in [-1, 1] falls into one of `num_bins` bins; the bins take the last ids of the vocabulary in descending
order, so the LARGEST action has the SMALLEST id (openvla: prismatic/vla/action_tokenizer.py).
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig


class ActionTokenizer:
    """Map actions in [-1, 1] to the last `num_bins` ids below `vocab_size`, and back to bin centres.

    `vocab_size` is without the padding rows (32000 for openvla-7b). `action_token_ids` holds the ids in ascending
    order; an action index is `id - action_token_ids[0]`.
    """

    def __init__(self, vocab_size: int, num_bins: int = 256) -> None:
        if not 2 <= num_bins <= vocab_size:
            raise ValueError(
                f"num_bins is {num_bins}: it must be at least 2 and at most vocab_size ({vocab_size})"
            )
        self.vocab_size = vocab_size
        self.num_bins = num_bins
        self.bins = np.linspace(-1.0, 1.0, num_bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0
        self.action_token_ids = np.arange(vocab_size - num_bins, vocab_size)

    @classmethod
    def from_config(cls, config: "OpenVLAConfig") -> "ActionTokenizer":
        """Return the tokenizer of a model: its ids end where the padding rows of the vocabulary begin."""
        return cls(config.action_vocab_size, config.n_action_bins)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Return the ids (int64) of actions of any shape; values outside [-1, 1] are clipped.

        Raises ValueError for NaN, which `digitize` would silently take for the largest action.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if np.isnan(actions).any():
            raise ValueError("an action is NaN: it has no token; drop or repair the transition")
        return self.vocab_size - np.digitize(np.clip(actions, -1.0, 1.0), self.bins)

    def decode(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the bin centres (float64) of ids of any shape.

        There are `num_bins - 1` centres, so the two smallest ids both decode to the last one, as in OpenVLA.
        Raises ValueError for an id that is not an action token (PITFALLS 8: it would become an extreme action).
        """
        token_ids = np.asarray(token_ids)
        outside = (token_ids < self.action_token_ids[0]) | (token_ids > self.action_token_ids[-1])
        if outside.any():
            raise ValueError(
                f"token ids {np.unique(token_ids[outside])[:5].tolist()} are not action tokens: those are "
                f"{self.action_token_ids[0]}..{self.action_token_ids[-1]}; restrict sampling to them"
            )
        return self.bin_centers[
            np.clip(self.vocab_size - token_ids - 1, 0, len(self.bin_centers) - 1)
        ]
