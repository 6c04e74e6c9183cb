#!/usr/bin/env bash
# PPO on libero_goal: bash scripts/train_libero_goal.sh <gpus> <task_ids> [flags]; scripts/train_libero.sh explains them.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_libero.sh" goal "$@"
