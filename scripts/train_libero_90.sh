#!/usr/bin/env bash
# PPO on libero_90: VLA_PATH=DIR_OR_HUB_ID bash scripts/train_libero_90.sh <gpus> <task_ids> [flags]; scripts/train_libero.sh explains them.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_libero.sh" 90 "$@"
