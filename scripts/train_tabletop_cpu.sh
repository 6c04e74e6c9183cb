#!/usr/bin/env bash
# PPO with LoRA on the embedded tabletop world, on two CPU cores: the PPO stage of scripts/quickstart.sh.
# docs/RECIPE.md says how these values were found. Flags given here are added, and win:
#
#   bash scripts/train_tabletop_cpu.sh --vla_path runs/quickstart/sft --seed 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh --quiet
exec .venv/bin/python ppo_vllm_ray_fsdp_vla.py \
    --task_suite_name tabletop \
    --device cpu \
    --use_lora \
    --lora_rank 16 \
    --total_episodes 65536 \
    --num_steps 16 \
    --local_rollout_batch_size 64 \
    --value_init_steps 3 \
    --temperature 0.4 \
    "$@"
