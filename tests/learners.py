"""Learners over the tiny model and hand-made rollouts, for the tests of the update."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ppo.critic import ValueHead
from ppo.learner import PPOLearner, Trainable
from ppo.rollout import Rollout
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from utils import fsdp_utils, peft_utils

T, B, SIZE = 6, 4, 28


def flags(**changes) -> SimpleNamespace:
    """The update's flags at their plain values: one epoch, one minibatch of everything."""
    values = {
        "seed": 0, "temperature": 1.3, "num_epochs": 1, "num_value_epochs": None, "local_mini_batch_size": T * B,
        "per_device_train_batch_size": 4, "per_device_forward_batch_size": None, "max_grad_norm": 1.0,
        "cliprange": 0.2, "cliprange_high": None, "ratio_level": "action", "gamma": 0.9, "lam": 0.8, "norm_adv": True,
        "bootstrap_truncated": True, "entropy_coef": 0.01, "beta": 0.0, "max_approx_kl": None,
        "old_logprobs": "recompute", "value_model_type": "shared", "value_init_steps": 0, "cliprange_value": 0.2,
        "vf_coef": 0.5, "freeze_vision_backbone": False, "async_depth": 0, "importance_weight_cap": 2.0,
        "compile": False, "sharding_strategy": "full-shard", "offload": False, "enable_gradient_checkpointing": False,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


AFTER_ONE = (2, 0, 6, 4)
"""Steps that the running episodes of `make_rollout` have taken at its end."""


def make_rollout(
    model_dir: str, seed: int = 0, episode_step_B: tuple[int, ...] = (0, 0, 0, 0)
) -> Rollout:
    """Random observations and actions; an episode that ends well, two cut by the time limit, and a dropped one."""
    rng = np.random.default_rng(seed)
    first = OpenVLAConfig.from_pretrained(model_dir).first_action_token_id
    processor = load_processor(model_dir)
    terminated, truncated = torch.zeros(T, B, dtype=torch.bool), torch.zeros(T, B, dtype=torch.bool)
    valid = torch.ones(T, B, dtype=torch.bool)
    terminated[2, 0] = truncated[3, 0] = truncated[5, 1] = True
    valid[:2, 3], terminated[1, 3] = False, True

    def images(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, (*shape, SIZE, SIZE, 3), dtype=np.uint8))

    return Rollout(
        prompts=[
            processor.prompt_ids("pick up the red block"),
            processor.prompt_ids("push the plate"),
        ],
        images_TBHWC=images(T, B),
        action_ids_TBA=torch.from_numpy(rng.integers(0, 256, (T, B, 7))) + first,
        logprob_TBA=torch.from_numpy(rng.normal(-5.5, 0.1, (T, B, 7)).astype(np.float32)),
        reward_TB=terminated.float() * valid,
        terminated_TB=terminated,
        truncated_TB=truncated,
        task_id_TB=torch.from_numpy(rng.integers(0, 2, (T, B))),
        valid_TB=valid,
        last_images_BHWC=images(B),
        last_task_id_B=torch.tensor([0, 1, 1, 0]),
        episode_step_B=torch.tensor(episode_step_B),
        final_images_KHWC=images(2),
        final_t_K=torch.tensor([3, 5]),
        final_b_K=torch.tensor([0, 1]),
    )


def make_learner(
    model_dir: str,
    args: SimpleNamespace,
    lora: bool = False,
    dropout: float = 0.0,
    checkpointing: bool = False,
    *,
    adam: bool = False,
    dtype: torch.dtype = torch.float32,
    compile_backend: str | None = None,
    memory_budget: float = 1.0,
) -> PPOLearner:
    """Policy, critic and optimizers as the driver builds them; SGD unless `adam`, so that weights show the gradients.

    On the GPU where the process group has one.
    """
    device = torch.device("cuda" if "nccl" in dist.get_backend_config() else "cpu")
    torch.manual_seed(3)
    model = load_model(model_dir, dtype=dtype if lora else torch.float32, device=device)
    if checkpointing:
        model.recompute_activations()
    if lora:
        peft_utils.add_lora(model, rank=4, dropout=dropout, freeze_vision_backbone=True)
    critic = ValueHead(model.config.text_config.hidden_size)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    fsdp_utils.cast_frozen(model, dtype)

    def trainable(module: torch.nn.Module, param_dtype: torch.dtype) -> Trainable:
        module = fsdp_utils.shard_model(
            module,
            param_dtype=param_dtype,
            min_unit_params=1,
            offload=args.offload,
            reshard_after_forward=args.sharding_strategy == "full-shard",
        )
        parameters = peft_utils.trainable_parameters(module)
        fused = (
            torch.optim.AdamW(parameters, lr=1e-3, fused=device.type == "cuda") if adam else None
        )
        optimizer = fused or torch.optim.SGD(parameters, lr=0.1)
        rate = optimizer.param_groups[0]["lr"]
        return Trainable(module, parameters, optimizer, lambda place: rate)

    policy, value = trainable(model, dtype), trainable(critic.to(device), torch.float32)
    if compile_backend is not None:
        fsdp_utils.compile_blocks(policy.model, compile_backend, memory_budget=memory_budget)
    return PPOLearner(args, policy, value, load_processor(model_dir), dtype=dtype)


def weights(learner) -> dict[str, torch.Tensor]:
    parts = {"policy": learner.policy.model, "critic": learner.critic.model}
    return {
        f"{k}.{n}": fsdp_utils.full_tensor(p.detach()).clone()
        for k, m in parts.items()
        for n, p in m.named_parameters()
    }


def assert_same_update(one: dict, two: dict) -> None:
    for name in one["metrics"]:
        if name.startswith("train/"):
            assert two["metrics"][name] == pytest.approx(
                one["metrics"][name], rel=1e-5, abs=1e-6
            ), name
    changes = []
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=name)
        changes.append(float((weight - one["before"][name]).abs().max()))
    assert max(changes) > 1e-3, "the update changed nothing: the comparison shows nothing"
