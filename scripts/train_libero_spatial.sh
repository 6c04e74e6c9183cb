#!/usr/bin/env bash
# PPO with LoRA for openvla-7b on libero_spatial, with the values that this model's users report (docs in README.md).
#
#   bash scripts/train_libero_spatial.sh 0,1,2,3 "0 1 2 3 4 5 6 7 8 9" [flags of ppo_vllm_ray_fsdp_vla.py]
#
# First argument: the GPUs (2, 3, 4 or 8 of them): 1 or 2 run an engine each, the others train. Second: the task ids.
# VLA_PATH names the checkpoint folder. The simulators draw on the last of the GPUs (another: --env_gpu_id N): an
# engine's, which takes 0.4 of its memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=${1:?"give the GPUs, e.g. 0,1,2,3"}
read -r -a task_ids <<<"${2:?"give the task ids, e.g. \"0 1 2\""}"
shift 2
num_gpus=$(awk -F, '{print NF}' <<<"$gpus")
case $num_gpus in
2 | 3 | 4) num_engines=1 ;;
8) num_engines=2 ;;
*)
    echo "$num_gpus GPUs ($gpus): use 2, 3, 4 or 8, so that 48 environments an engine divide among the trainers" >&2
    exit 1
    ;;
esac

MUJOCO_GL=egl bash scripts/setup_env.sh --libero --quiet
export CUDA_VISIBLE_DEVICES=$gpus
exec .venv/bin/python ppo_vllm_ray_fsdp_vla.py \
    --vla_path "${VLA_PATH:-openvla/openvla-7b-finetuned-libero-spatial}" \
    --task_suite_name libero_spatial \
    --task_ids "${task_ids[@]}" \
    --env_gpu_id "${gpus##*,}" \
    --center_crop \
    --actor_num_gpus_per_node "[$((num_gpus - num_engines))]" \
    --vllm_num_engines "$num_engines" \
    --gpu_memory_utilization 0.4 \
    --local_rollout_batch_size 48 \
    --num_steps 128 \
    --total_episodes 2000000 \
    --temperature 1.5 \
    --use_lora \
    --lora_rank 32 \
    --learning_rate 2e-5 \
    --value_learning_rate 1e-3 \
    --value_init_steps 5 \
    --local_mini_batch_size 1024 \
    --per_device_train_batch_size 16 \
    --num_epochs 1 \
    --cliprange 0.2 \
    --cliprange_high 0.28 \
    --gamma 0.99 \
    --lam 0.95 \
    --max_grad_norm 1.0 \
    --enable_gradient_checkpointing \
    --save_freq 20 \
    "$@"
