#!/usr/bin/env bash
# PPO with LoRA for a small policy on libero_spatial without a GPU: two cores, drawn by OSMesa. It shows that everything
# works together; a policy that solves LIBERO wants a GPU (scripts/train_libero_spatial.sh). Flags given here win:
#
#   bash scripts/train_libero_cpu.sh --vla_path runs/libero_sft --task_ids 0 1
# PYTHON names an interpreter that has everything; without it .venv is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh --libero --quiet
    PYTHON=.venv/bin/python
fi
export MUJOCO_GL=${MUJOCO_GL:-osmesa}
exec "$PYTHON" ppo_vllm_ray_fsdp_vla.py \
    --task_suite_name libero_spatial \
    --device cpu \
    --actor_num_gpus_per_node "[1]" \
    --vllm_num_engines 1 \
    --use_lora \
    --lora_rank 32 \
    --freeze_vision_backbone \
    --total_episodes 8192 \
    --num_steps 64 \
    --local_rollout_batch_size 4 \
    --local_mini_batch_size 64 \
    --per_device_train_batch_size 32 \
    --value_init_steps 2 \
    --learning_rate 3e-4 \
    --policy_lr_warmup_steps 3 \
    --value_learning_rate 1e-3 \
    --gamma 0.99 \
    --lam 0.95 \
    --temperature 1.0 \
    "$@"
