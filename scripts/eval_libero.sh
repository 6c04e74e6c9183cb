#!/usr/bin/env bash
# Greedy evaluation of a checkpoint, a folder or a hub id, on all fixed initial states of a LIBERO suite.
#
#   bash scripts/eval_libero.sh CHECKPOINT [SUITE] [flags of run_libero_eval_vllm.py]
#
# SUITE: libero_spatial (default), libero_object, libero_goal, libero_10 or libero_90. Draws on GPU 0 where there
# is one, or on those in CUDA_VISIBLE_DEVICES (others: --env_gpu_id N), else on the CPU; MUJOCO_GL=osmesa asks for the CPU
# anywhere. The policy sees the centre crop that openvla-7b's fine-tuned models want; --no_center_crop is for a policy
# fine-tuned without random crops.
# PYTHON names an interpreter that has everything; without it .venv is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

checkpoint=${1:?"give the checkpoint: a folder or a hub id"}
shift
suite=libero_spatial
if [[ ${1:--} != -* ]]; then
    suite=$1
    shift
fi

if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh --libero --quiet
    PYTHON=.venv/bin/python
fi
# The simulators' models lie in GPU memory too: the engine leaves room.
machine=()
if [ "${MUJOCO_GL:-egl}" = egl ] && [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
    export MUJOCO_GL=egl
    machine=(--gpu_memory_utilization 0.5)
fi
exec "$PYTHON" run_libero_eval_vllm.py \
    --pretrained_checkpoint "$checkpoint" \
    --task_suite_name "$suite" \
    --center_crop \
    "${machine[@]}" \
    --save_video failures \
    --max_videos_per_task 2 \
    "$@"
