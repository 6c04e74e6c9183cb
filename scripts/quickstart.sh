#!/usr/bin/env bash
# The whole loop on one machine without a GPU: set-up, demonstrations, supervised fine-tuning, PPO with LoRA through
# Ray, FSDP and vLLM, merge, evaluations. Ends with a table, runs/quickstart/summary.json and report.html.
#
#   bash scripts/quickstart.sh [--seed 0] [--run_dir runs/quickstart] [--overwrite]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_env.sh
exec .venv/bin/python vla-scripts/quickstart.py "$@"
