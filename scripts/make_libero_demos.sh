#!/usr/bin/env bash
# Demonstrations of the scripted expert on a LIBERO suite, as RLDS in data/<SUITE>_no_noops/1.0.0.
#
#   bash scripts/make_libero_demos.sh [SUITE] [flags of vla-scripts/make_demos.py]
#
# SUITE: libero_spatial (default) or libero_goal (the tasks of it that the expert can do). One process per core, drawing
# on GPU 0 where there is one. After an interruption the same line goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suite=libero_spatial
if [[ ${1:--} != -* ]]; then
    suite=$1
    shift
fi

bash scripts/setup_env.sh --libero --quiet
machine=()
if [ "${MUJOCO_GL:-egl}" = egl ] && [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
    machine=(--env_gpu_id 0)
fi
exec .venv/bin/python vla-scripts/make_demos.py \
    --task_suite_name "$suite" \
    --output_dir data \
    --num_episodes 500 \
    --num_processes "$(nproc)" \
    "${machine[@]}" \
    "$@"
