#!/usr/bin/env bash
# PPO with LoRA on the embedded tabletop world, on two CPU cores: the PPO stage of scripts/quickstart.sh.
# docs/RECIPE.md says how these values were found. Flags given here are added, and win:
#
#   bash scripts/train_tabletop_cpu.sh --vla_path runs/quickstart/sft --seed 1
# PYTHON names an interpreter that has everything; without it .venv is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh --quiet
    PYTHON=.venv/bin/python
fi
exec "$PYTHON" ppo_vllm_ray_fsdp_vla.py \
    --task_suite_name tabletop \
    --device cpu \
    --actor_num_gpus_per_node "[2]" \
    --vllm_num_engines 2 \
    --num_env_processes 1 \
    --use_lora \
    --lora_rank 32 \
    --freeze_vision_backbone \
    --total_episodes 32768 \
    --num_steps 16 \
    --local_rollout_batch_size 32 \
    --local_mini_batch_size 128 \
    --per_device_train_batch_size 32 \
    --value_init_steps 2 \
    --learning_rate 1.2e-3 \
    --policy_lr_scheduler_type linear \
    --policy_lr_warmup_steps 3 \
    --value_learning_rate 3e-3 \
    --gamma 0.99 \
    --lam 0.95 \
    --temperature 1.0 \
    "$@"
