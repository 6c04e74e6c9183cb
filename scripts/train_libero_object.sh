#!/usr/bin/env bash
# PPO on libero_object: bash scripts/train_libero_object.sh <gpus> <task_ids> [flags]; scripts/train_libero.sh explains them.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_libero.sh" object "$@"
