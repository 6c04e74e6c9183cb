#!/usr/bin/env bash
# Set-up, ruff, type check and tests: what CI runs. Arguments go to pytest:
#
#   bash scripts/test.sh                        everything but the tests marked gpu and slow, by two workers (-n 2)
#   bash scripts/test.sh tests/ppo -k gae       some of it, in one process
#
# Two workers are for two cores: tests that wait for a process to start leave one of them to others. Which tests stay
# together on one worker, and why, is in tests/conftest.py.
# The tests marked libero run where LIBERO's simulator is there or can be installed, and are skipped elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

renders_on_cpu() { [[ $(PATH=$PATH:/usr/sbin:/sbin ldconfig -p) == *libOSMesa.so* ]]; }
can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

export MUJOCO_GL=${MUJOCO_GL:-osmesa} # the same images on every machine
if [ "$MUJOCO_GL" != osmesa ] || renders_on_cpu || can_install; then
    bash scripts/setup_env.sh --libero --quiet
else
    bash scripts/setup_env.sh --quiet
    echo "test: LIBERO's tests are skipped: run 'bash scripts/setup_env.sh --libero' for what is missing"
fi

# One thread a process: the tests start several processes, and busy threads on few cores only wait for each other.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Nothing here may reach the network; W&B and vLLM would otherwise call home.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0
export TF_CPP_MIN_LOG_LEVEL=2
# Ray's workers are at nice 15 otherwise, and starve beside another pytest worker's tests.
export RAY_worker_niceness=0

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy ppo utils prismatic ./*.py
[ $# -gt 0 ] || set -- -n 2
.venv/bin/python -m pytest "$@"
