#!/usr/bin/env bash
# LIBERO on a GPU node, what scripts/libero_spatial_from_scratch.sh does not measure: environment steps/s with EGL, and
# whether recorded demonstrations succeed again.
#
#   bash benchmarks/gpu_libero.sh envs replay
#
# PYTHON names the interpreter (default: .venv/bin/python); DATA the demonstrations of a from-scratch run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
SUITE=${SUITE:-libero_spatial}
DATA=${DATA:-runs/libero_spatial_from_scratch/data}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

envs() {
    "$PYTHON" benchmarks/libero_envs.py --env_gpu_id 0 --num_processes 16 32 --num_rounds 1 --num_steps 100 --episode_length 60
}

replay() {
    "$PYTHON" benchmarks/libero_replay.py --data_root_dir "$DATA" --dataset_name "${SUITE}_no_noops" --num_processes 16
}

for stage in "$@"; do
    echo "== $stage"
    SECONDS=0
    "$stage"
    echo "== $stage took $SECONDS s"
done
