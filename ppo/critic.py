"""Value functions: a head on a policy's features, and one with a backbone of its own.

Both read the hidden state of the last real prompt token, which has seen the image and the instruction and is the
state the first action token is predicted from. The last position of a right-padded batch would be a padding token.
Shapes: B batch, L prompt tokens, P patches, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """LayerNorm and a two-layer perceptron: prompt features (B, D) -> values (B,) float32.

    The last layer starts at zero, so V = 0 everywhere at first: the first advantages are the rewards-to-go and not
    the noise of an untrained critic. The LayerNorm makes the learning rate independent of the features' scale.

    Args:
        hidden_dim: D.
        mlp_dim: width of the middle layer; None: D, at most 1024.
    """

    def __init__(self, hidden_dim: int, mlp_dim: int | None = None) -> None:
        super().__init__()
        mlp_dim = mlp_dim or min(hidden_dim, 1024)
        self.norm = nn.LayerNorm(hidden_dim)
        self.fc1 = nn.Linear(hidden_dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, 1)
        nn.init.orthogonal_(self.fc1.weight, gain=2**0.5)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, prompt_hidden_BD: Tensor) -> Tensor:
        """Return the values, (B,) float32; features of another dtype than the weights' are cast."""
        hidden_BD = self.norm(prompt_hidden_BD.to(self.norm.weight.dtype))
        return self.fc2(nn.functional.gelu(self.fc1(hidden_BD))).squeeze(-1).float()


class VLACritic(nn.Module):
    """A value function with an OpenVLA backbone of its own, which nothing shares with the policy.

    Args:
        model: an OpenVLAForActionPrediction that the critic takes over: load a second one or copy the policy (before
            sharding). It may carry an injected LoRA; then only that and the head train. lm_head, which a value
            does not need, is frozen.
        mlp_dim: see `ValueHead`.
    """

    def __init__(self, model: Any, mlp_dim: int | None = None) -> None:
        super().__init__()
        self.backbone = model
        self.backbone.get_output_embeddings().requires_grad_(False)
        self.value_head = ValueHead(model.config.text_config.hidden_size, mlp_dim)

    def forward(
        self,
        prompt_ids_BL: Tensor,
        prompt_mask_BL: Tensor,
        *,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
    ) -> Tensor:
        """Return the values of B observations, (B,) float32.

        Args:
            prompt_ids_BL: right-padded prompts.
            prompt_mask_BL: 1 at real tokens.
            pixel_values: (B, 6, H, W) normalised images, or
            vision_features: (B, P, vision_dim) of *this* critic's `encode_vision`.
        """
        output = self.backbone.forward_actions(
            prompt_ids_BL,
            prompt_mask_BL,
            pixel_values=pixel_values,
            vision_features=vision_features,
        )
        return self.value_head(output.prompt_hidden_BD)

    @torch.no_grad()
    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Return the frozen vision features of the critic's own backbone, (B, P, vision_dim)."""
        return self.backbone.encode_vision(pixel_values)
