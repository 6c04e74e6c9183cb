#!/usr/bin/env bash
# openvla-7b's shape on a node with one or two GPUs, stage by stage: every stage is one of the gpu_*.py, its output and
# results go to OUT, and one that fails does not keep the next from running.
#
#   OUT=runs/gpu_node bash benchmarks/gpu_node.sh model tests sync update layouts learn faults fault_costs
#
# PYTHON names the interpreter (default: .venv/bin/python), SMALL_POLICY the folder of the quick start's supervised policy.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/gpu_node}
MODEL=${MODEL:-/dev/shm/vla-7b}
WORK=${WORK:-/tmp/gpu_node}
SMALL_POLICY=${SMALL_POLICY:-runs/quickstart/sft}
NUM_GPUS=${NUM_GPUS:-$(nvidia-smi -L | wc -l)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
mkdir -p "$OUT" "$WORK"

model() {
    "$PYTHON" -c "from benchmarks.gpu_common import ensure_model; ensure_model('$MODEL', '7b')"
}

tests() {
    timeout 400 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/prismatic/test_vllm_gpu.py \
        tests/prismatic/test_vllm_tensor_parallel.py tests/utils/weights/test_channel.py tests/ppo/test_memory.py
}

# Some runs at a time: each takes little of a GPU. One log a row.
faults() {
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --collect-only tests/test_faults_gpu.py | grep :: | tac >"$WORK/rows"
    xargs -d '\n' -P "${LANES:-4}" -I ROW timeout 400 "$PYTHON" -m pytest -q -rA -m gpu -p no:cacheprovider ROW <"$WORK/rows"
}

# What a rollout worker costs that dies within a rollout, and one that dies within an update: 1,024 samples a step. With four
# GPUs the runs without and with a spare go side by side.
fault_costs() {
    local shape="--lora_rank 32 --local_mini_batch_size 256 --per_device_train_batch_size 32 --compile --num_env_processes 4"
    local gpus=(0,1 $((NUM_GPUS > 2 ? 2 : 0)),$((NUM_GPUS > 2 ? 3 : 1))) index=0 spare
    for spare in "" --spare_workers; do
        CUDA_VISIBLE_DEVICES=${gpus[$index]} timeout "${LIMIT_S:-900}" "$PYTHON" benchmarks/faults.py --device cuda \
            --vla_path "$MODEL" --num_ranks 1 --num_envs 64 --rollout_steps 16 --num_steps 9 --at 4.1 7.45 $spare \
            --extra="$shape" >"$OUT/fault_costs$spare.log" 2>&1 &
        [ "$NUM_GPUS" -gt 2 ] || wait
        index=$((index + 1))
    done
    wait
    tail -n 6 "$OUT"/fault_costs*.log
}

# Without CUDA graphs: what it measures does not depend on them, and the engine starts sooner.
sync() {
    timeout 300 "$PYTHON" benchmarks/gpu_sync.py --model_dir "$MODEL" --bucket_mib 256 512 --receivers copy vllm \
        --enforce_eager --output "$OUT/sync.json"
}

update() {
    timeout 400 "$PYTHON" -m torch.distributed.run --nproc_per_node "$NUM_GPUS" benchmarks/gpu_update.py \
        --cases ${CASES:-full-budget} --budgets ${BUDGETS:-0.1 0.25} --micros ${MICROS:-32} --minibatch 128 --num_samples 256 \
        --output "$OUT/update.json"
}

layouts() {
    timeout 590 "$PYTHON" benchmarks/gpu_end_to_end.py --vla_path "$MODEL" --work_dir "$WORK/layouts" \
        --num_gpus "$NUM_GPUS" --cases ${LAYOUTS:-lockstep async sleep} --num_envs 64 --rollout_steps 8 --train_steps 5 \
        --extra "--compile" --output "$OUT/layouts.json"
}

learn() {
    timeout 400 "$PYTHON" benchmarks/gpu_end_to_end.py --vla_path "$SMALL_POLICY" --work_dir "$WORK/learn" \
        --num_gpus "$NUM_GPUS" --cases learn --output "$OUT/learn.json"
}

engine() {
    timeout 590 "$PYTHON" benchmarks/gpu_engine.py --model_dir "$MODEL" --batch_sizes 32 64 --hf_batch_sizes 32 64 \
        --output "$OUT/engine.json"
}

for stage in "$@"; do
    echo "== $stage"
    SECONDS=0
    "$stage" >"$OUT/$stage.log" 2>&1
    echo "== $stage: exit code $?, $SECONDS s"
    tail -n "${TAIL:-40}" "$OUT/$stage.log"
done
