#!/usr/bin/env bash
# PPO with LoRA for openvla-7b on a LIBERO suite, with the values that this model's users report (docs in README.md).
# The suites' own lines, train_libero_{spatial,object,goal,10,90}.sh, call this one:
#
#   bash scripts/train_libero_spatial.sh <gpus> <task_ids> [flags of ppo_vllm_ray_fsdp_vla.py]
#   bash scripts/train_libero_spatial.sh 0,1,2,3 0,1,2,3,4,5,6,7,8,9
#   bash scripts/train_libero_goal.sh 0 all --seed 1
#   LAYOUT=colocate bash scripts/train_libero_10.sh 0,1 0,4
#
# <gpus>: their numbers, 1, 2, 3, 4, 6 or 8 of them. <task_ids>: numbers in the suite, or all. Flags given here win.
# LAYOUT: separate (default; trainers | engines: 1|1, 2|1, 3|1, 4|2, 6|2) or colocate (default with one GPU: a trainer
# and an engine on each). VLA_PATH: a model folder or hub id, by default openvla/openvla-7b-finetuned-libero-<suite>.
# Each engine's simulators draw on that engine's GPU (others: --env_gpu_id N ..., by nvidia-smi's numbers); engines leave
# them room. MUJOCO_GL=osmesa draws on the CPU.
# PYTHON names an interpreter that has everything; without it .venv is set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "train_libero: $*" >&2
    exit 2
}

usage="bash scripts/train_libero_${1:-spatial}.sh <gpus> <task_ids> [flags], e.g. 0,1,2,3 0,1,2"
[ $# -ge 3 ] || fail "$usage"
suite=$1 gpus=$2
IFS=', ' read -r -a task_ids <<<"$3"
shift 3
[[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "GPUs '$gpus': give their numbers, e.g. 0,1,2,3 ($usage)"
IFS=, read -r -a gpu_list <<<"$gpus"
num_gpus=${#gpu_list[@]}

case ${LAYOUT:-$([ "$num_gpus" = 1 ] && echo colocate || echo separate)}:$num_gpus in
colocate:[123468]) placement=("$num_gpus" "$num_gpus" --colocate --gpu_memory_utilization 0.35) ;;
separate:[234]) placement=($((num_gpus - 1)) 1 --gpu_memory_utilization 0.4) ;;
separate:[68]) placement=($((num_gpus - 2)) 2 --gpu_memory_utilization 0.4) ;;
separate:1) fail "LAYOUT=separate needs two GPUs or more, $gpus is one: use LAYOUT=colocate" ;;
colocate:* | separate:*) fail "$num_gpus GPUs ($gpus): use 1, 2, 3, 4, 6 or 8, so that 48 environments an engine divide" ;;
*) fail "LAYOUT=$LAYOUT: use separate or colocate" ;;
esac

tasks=()
if [ "${task_ids[*]}" != all ]; then
    [[ ${task_ids[*]} =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail "task ids '${task_ids[*]}': give numbers, e.g. 0,1,2, or all"
    tasks=(--task_ids "${task_ids[@]}")
fi
case $suite in
90) # nobody has published a checkpoint for it, and 90 tasks share the curriculum's floor
    : "${VLA_PATH:?"train_libero: set VLA_PATH to a checkpoint fine-tuned on libero_90"}"
    suite_flags=(--curriculum_min_prob 0.002)
    ;;
*) suite_flags=() ;;
esac

export MUJOCO_GL=${MUJOCO_GL:-egl} # each engine's simulators draw on its GPU
if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup_env.sh --libero --quiet
    PYTHON=.venv/bin/python
fi
export CUDA_VISIBLE_DEVICES=$gpus
exec "$PYTHON" ppo_vllm_ray_fsdp_vla.py \
    --vla_path "${VLA_PATH:-openvla/openvla-7b-finetuned-libero-$suite}" \
    --task_suite_name "libero_$suite" \
    "${tasks[@]}" \
    "${suite_flags[@]}" \
    --center_crop \
    --actor_num_gpus_per_node "[${placement[0]}]" \
    --vllm_num_engines "${placement[1]}" \
    "${placement[@]:2}" \
    --local_rollout_batch_size 48 \
    --num_steps 128 \
    --total_episodes 2000000 \
    --temperature 1.5 \
    --use_lora \
    --lora_rank 32 \
    --learning_rate 2e-5 \
    --value_learning_rate 1e-3 \
    --value_init_steps 5 \
    --local_mini_batch_size 1024 \
    --per_device_train_batch_size 16 \
    --num_epochs 1 \
    --cliprange 0.2 \
    --cliprange_high 0.28 \
    --gamma 0.99 \
    --lam 0.95 \
    --max_grad_norm 1.0 \
    --enable_gradient_checkpointing \
    --save_freq 20 \
    "$@"
