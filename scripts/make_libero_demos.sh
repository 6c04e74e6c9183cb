#!/usr/bin/env bash
# Demonstrations of the scripted expert on a LIBERO suite, as RLDS in data/<SUITE>_no_noops/1.0.0.
#
#   bash scripts/make_libero_demos.sh [SUITE] [flags of vla-scripts/make_demos.py]
#
# SUITE: libero_spatial (default) or libero_goal (the tasks of it that the expert can do). One process per core. They draw
# on GPU 0 where there is one, or on those in CUDA_VISIBLE_DEVICES in turns; MUJOCO_GL=osmesa asks for the CPU. After an
# interruption the same line continues.
# PYTHON names an interpreter that has everything; without it .venv is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suite=libero_spatial
if [[ ${1:--} != -* ]]; then
    suite=$1
    shift
fi

if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh --libero --quiet
    PYTHON=.venv/bin/python
fi
if [ "${MUJOCO_GL:-egl}" = egl ] && [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
    export MUJOCO_GL=egl
fi
exec "$PYTHON" vla-scripts/make_demos.py \
    --task_suite_name "$suite" \
    --output_dir data \
    --num_episodes 500 \
    --num_processes "$(nproc)" \
    "$@"
