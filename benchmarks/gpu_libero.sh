#!/usr/bin/env bash
# LIBERO on a GPU node, stage by stage: environment steps/s with EGL, demonstrations, a supervised policy, its
# evaluation, PPO. Each stage goes on from what the ones before it left in WORK, so that a node that is lent in pieces
# will do.
#
#   bash benchmarks/gpu_libero.sh envs demos sft eval ppo
#
# PYTHON names the interpreter (default: .venv/bin/python); sizes are variables below, to be set before the call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
WORK=${WORK:-runs/gpu_libero}
SUITE=${SUITE:-libero_spatial}
NUM_DEMOS=${NUM_DEMOS:-600}
IMPERFECTION=${IMPERFECTION:-0.2}
IMAGE_SIZE=${IMAGE_SIZE:-140}
SFT_STEPS=${SFT_STEPS:-3000}
NUM_TRIALS=${NUM_TRIALS:-20}
PPO_STEPS=${PPO_STEPS:-40960}
NUM_ENVS=${NUM_ENVS:-32}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
mkdir -p "$WORK"

envs() {
    "$PYTHON" benchmarks/libero_envs.py --env_gpu_id 0 --num_processes 16 32 --num_rounds 1 --num_steps 100 --episode_length 60
}

demos() {
    "$PYTHON" vla-scripts/make_demos.py --task_suite_name "$SUITE" --output_dir "$WORK/data" --env_gpu_id 0 \
        --num_episodes "$NUM_DEMOS" --num_processes 32 --imperfection "$IMPERFECTION" --seed 0
}

# About 22 M parameters: 100 patches of 14 pixels, two ViTs of 6 blocks, a Llama of 6 layers.
sft() {
    [ -e "$WORK/base" ] || "$PYTHON" vla-scripts/make_tiny_vla.py --output_dir "$WORK/base" --image_size "$IMAGE_SIZE" \
        --vision_dim 256 --vision_depth 7 --vision_heads 4 --llm_dim 384 --llm_depth 6 --llm_heads 6 --llm_mlp_dim 1024
    OMP_NUM_THREADS=8 "$PYTHON" vla-scripts/finetune.py --vla_path "$WORK/base" --data_root_dir "$WORK/data" \
        --dataset_name "${SUITE}_no_noops" --output_dir "$WORK/sft" --overwrite --max_steps "$SFT_STEPS" \
        --per_device_train_batch_size 256 --learning_rate 6e-4 --lr_scheduler_type cosine --warmup_steps "$((SFT_STEPS / 10))" \
        --weight_decay 0.05 --data_num_threads 12 --cache_gib 16 --save_freq 0 --log_freq 200
}

eval() {
    "$PYTHON" run_libero_eval_vllm.py --pretrained_checkpoint "${CHECKPOINT:-$WORK/sft}" --task_suite_name "$SUITE" \
        --env_gpu_id 0 --num_envs "$NUM_ENVS" --num_trials_per_task "$NUM_TRIALS" --center_crop \
        --gpu_memory_utilization 0.3 --save_video all --max_videos_per_task 1 --video_fps 20 \
        --local_log_dir "$WORK/eval"
}

ppo() {
    "$PYTHON" ppo_vllm_ray_fsdp_vla.py --vla_path "$WORK/sft" --task_suite_name "$SUITE" --env_gpu_id 0 --center_crop \
        --colocate --gpu_memory_utilization 0.3 --local_rollout_batch_size "$NUM_ENVS" --num_steps 64 \
        --total_episodes "$PPO_STEPS" --num_epochs 2 --local_mini_batch_size 512 --per_device_train_batch_size 256 \
        --learning_rate 5e-5 --value_learning_rate 1e-3 --value_init_steps 2 --cliprange_high 0.28 --gamma 0.99 \
        --run_root_dir "$WORK/ppo" --exp_id run --overwrite --eval_final --num_trials_per_task 5 --save_video
}

for stage in "$@"; do
    echo "== $stage"
    SECONDS=0
    "$stage"
    echo "== $stage took $SECONDS s"
done
