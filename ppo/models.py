"""What one FSDP rank trains: policy, critic and the frozen reference, loaded, sharded and with their optimizers."""

from typing import Any

import torch
from transformers import get_scheduler

from ppo.critic import ValueHead, VLACritic
from ppo.learner import Reference, Trainable
from prismatic.extern.hf.modeling_prismatic import load_model
from utils import fsdp_utils, peft_utils


class ModelBuilder:
    """Builds the run's models on this rank. Every method is called on every rank, in the same order.

    Args:
        args: the driver's flags.
        device: where the models compute.
        dtype: of compute; what trains has float32 masters.
    """

    def __init__(self, args: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.args, self.device, self.dtype = args, device, dtype

    def policy(self) -> tuple[Any, Any]:
        """The sharded policy and, with LoRA, the peft wrapper around it (else None)."""
        args, adapter = self.args, None
        model = self._load(trained=not args.use_lora)
        if args.use_lora and args.load_adapter_checkpoint:
            adapter = peft_utils.load_lora(
                model, args.load_adapter_checkpoint,
                freeze_vision_backbone=args.freeze_vision_backbone,
            )  # fmt: skip
        elif args.use_lora:
            adapter = peft_utils.add_lora(
                model, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout,
                freeze_vision_backbone=args.freeze_vision_backbone, base_name=args.vla_path,
            )  # fmt: skip
        if args.freeze_vision_backbone:
            model.vision_backbone.requires_grad_(False)
        return self._shard(model), adapter

    def reference(self, policy: Any, adapter: Any) -> Reference | None:
        """The frozen initial policy for the KL term: the policy with a fresh adapter off, else a second model."""
        args = self.args
        if not args.beta:
            return None
        if args.use_lora and not args.load_adapter_checkpoint:
            return Reference(policy, adapter.disable_adapter)
        model = self._load(trained=False)
        if args.load_adapter_checkpoint:
            peft_utils.load_lora(model, args.load_adapter_checkpoint)
        return Reference(self._shard(model.requires_grad_(False)))

    def critic(self, hidden_size: int) -> Any:
        """The sharded critic: a head on the policy's features of `hidden_size`, or a backbone of its own."""
        args = self.args
        if args.value_model_type == "shared":
            return self._shard(ValueHead(hidden_size).to(self.device), torch.float32)
        model = self._load(trained=not args.value_use_lora)
        if args.value_use_lora:
            peft_utils.add_lora(model, rank=args.lora_rank, alpha=args.lora_alpha)
        return self._shard(VLACritic(model).to(self.device))

    def _load(self, *, trained: bool) -> Any:
        """The model on this rank's device: float32 if it `trained` itself, else in the compute dtype."""
        model = load_model(
            self.args.vla_path, dtype=torch.float32 if trained else self.dtype, device=self.device
        )
        if self.args.enable_gradient_checkpointing:
            model.recompute_activations()
        return model

    def _shard(self, model: torch.nn.Module, dtype: torch.dtype | None = None) -> Any:
        """Frozen weights in the compute dtype, float32 masters of what trains, shards; then compiled blocks."""
        args, dtype = self.args, dtype or self.dtype
        model.eval()  # an adapter comes in training mode: its dropout would act on the first old log-probs
        fsdp_utils.cast_frozen(model, dtype)
        reshard = args.sharding_strategy == "full-shard"
        fsdp_utils.shard_model(
            model, param_dtype=dtype, offload=args.offload, reshard_after_forward=reshard
        )
        if args.compile:
            fsdp_utils.compile_blocks(model, memory_budget=args.activation_memory_budget)
        return model


def make_trainable(
    model: Any, learning_rate: float, schedule: str, warmup: int, total: int
) -> Trainable:
    """AdamW without weight decay; the schedule's `warmup` and `total` count minibatches, done or skipped."""
    parameters = peft_utils.trainable_parameters(model)
    fused = fsdp_utils.compute_device(model).type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, eps=1e-5, weight_decay=0.0, fused=fused
    )
    name = "constant_with_warmup" if schedule == "constant" else schedule
    # Only the formula is taken from the scheduler: its own counter would lag behind wherever a minibatch is skipped.
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    (peak,), (factor,) = scheduler.base_lrs, scheduler.lr_lambdas
    return Trainable(model, parameters, optimizer, lambda place: peak * factor(place))
