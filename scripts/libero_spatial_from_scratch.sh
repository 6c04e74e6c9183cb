#!/usr/bin/env bash
# libero_spatial from files of this repository alone, on one GPU or two: demonstrations of the scripted expert, a small
# random model, supervised fine-tuning, PPO with LoRA, merge, evaluations before and after, a report. The same line goes
# on after an interruption; exit code 75: --time_limit_s ran out, give it again. docs/LIBERO.md, "From scratch".
#
#   bash scripts/libero_spatial_from_scratch.sh [--run_dir runs/libero_spatial] [--time_limit_s 580] [--variants base seed1]
#
# PYTHON names an interpreter that has everything; without it .venv is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh --libero --quiet
    PYTHON=.venv/bin/python
fi
exec "$PYTHON" vla-scripts/libero_from_scratch.py "$@"
