#!/usr/bin/env bash
# Greedy evaluation of a checkpoint folder on all fixed initial states of a LIBERO suite.
#
#   bash scripts/eval_libero.sh CHECKPOINT [SUITE] [flags of run_libero_eval_vllm.py]
#
# SUITE: libero_spatial (default), libero_object, libero_goal, libero_10. Not run yet: the LIBERO world is not part of
# this version. For the embedded world: python run_libero_eval_vllm.py --task_suite_name tabletop.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

checkpoint=${1:?"give the checkpoint folder"}
suite=${2:-libero_spatial}
shift "$(($# < 2 ? $# : 2))"

bash scripts/setup_env.sh --quiet
export MUJOCO_GL=${MUJOCO_GL:-egl}
exec .venv/bin/python run_libero_eval_vllm.py \
    --pretrained_checkpoint "$checkpoint" \
    --task_suite_name "$suite" \
    --center_crop \
    --save_video failures \
    --max_videos_per_task 2 \
    "$@"
