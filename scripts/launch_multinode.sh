#!/usr/bin/env bash
# PPO on several nodes: one Ray cluster, started by role, with the driver on its head. docs/MULTINODE.md has the layouts.
#
#   bash scripts/launch_multinode.sh head HEAD_IP[:PORT] NUM_NODES -- <flags of ppo_vllm_ray_fsdp_vla.py>
#   bash scripts/launch_multinode.sh worker HEAD_IP[:PORT]
#   bash scripts/launch_multinode.sh ssh HEAD_IP[:PORT] HOST,HOST,... -- <flags>
#
# head    on the node whose address the others reach: starts Ray there, waits for NUM_NODES nodes in all, runs the
#         driver, and ends that Ray afterwards. A Ray cluster that runs at this address already is used, and left alone.
# worker  on every other node, in any order: joins, and ends when the head has gone.
# ssh     on the head: as head, and starts a worker on each HOST by ssh (no password asked; this folder at the same path).
#
# The port is 6379 unless given. Environment: RAY_NUM_CPUS (CPU slots of this node; default its cores), NODE_IP (a
# worker's own address where Ray picks the wrong one), JOIN_TIMEOUT_S (300). Nodes prove that they belong to the cluster by
# a token in RAY_AUTH_TOKEN_PATH (default runs/.ray_auth_token, made by the head); RAY_AUTH_MODE=disabled goes without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "launch_multinode: $*" >&2; }
fail() {
    say "$@"
    exit 2
}
usage() {
    sed -n 's/^#   \(bash .*\)/\1/p' "scripts/launch_multinode.sh" >&2
    exit 2
}

# Whether something listens at the head's address.
head_answers() { timeout 3 bash -c ": </dev/tcp/$head_ip/$port" 2>/dev/null; }

ray_pid=""
ssh_pids=()
# shellcheck disable=SC2317 # called by the trap
end_own_processes() {
    [ -z "$ray_pid" ] || { kill "$ray_pid" 2>/dev/null && wait "$ray_pid"; } || true
    [ "${#ssh_pids[@]}" = 0 ] || wait "${ssh_pids[@]}" || true # they end with the head
}

# start_node ARGUMENTS...: this node's Ray in the background, as a process whose end is the end of this Ray and no other.
start_node() {
    log=runs/ray_${role}_$(hostname).log
    mkdir -p runs
    [ -z "${RAY_NUM_CPUS:-}" ] || set -- "$@" --num-cpus "$RAY_NUM_CPUS"
    trap end_own_processes EXIT
    .venv/bin/ray start --block --disable-usage-stats "$@" >"$log" 2>&1 &
    ray_pid=$!
}

node_runs() { kill -0 "$ray_pid" 2>/dev/null; }

node_failed() {
    tail -n 20 "$log" >&2
    fail "$1 (all of it: $PWD/$log)"
}

prepare_token() {
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$PWD/runs/.ray_auth_token}
    [ "$RAY_AUTH_MODE" = token ] || return 0
    if [ "$role" = worker ]; then
        wait_for "the head's token $RAY_AUTH_TOKEN_PATH (is this folder shared by all nodes?)" test -s "$RAY_AUTH_TOKEN_PATH"
    elif [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    fi
}

# wait_for WHAT COMMAND...
wait_for() {
    local what=$1 deadline=$((SECONDS + ${JOIN_TIMEOUT_S:-300}))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "waited ${JOIN_TIMEOUT_S:-300} s for $what"
        sleep 1
    done
}

run_worker() {
    wait_for "Ray at $head_ip:$port (start the head, and let the nodes reach each other's ports)" head_answers
    say "joining $head_ip:$port"
    start_node --address "$head_ip:$port" ${NODE_IP:+--node-ip-address "$NODE_IP"}
    while node_runs; do
        sleep 2
        # Ray itself would notice after a minute.
        head_answers || { sleep 3 && head_answers; } || { say "the head has gone: the run is over" && return; }
    done
    node_failed "this node lost the cluster"
}

head_answers_or_failed() { head_answers || ! node_runs; }

start_head() {
    start_node --head --node-ip-address "$head_ip" --port "$port" --include-dashboard false
    wait_for "Ray's head to start ($log)" head_answers_or_failed
    node_runs || node_failed "Ray's head did not start at $head_ip:$port"
}

start_workers_by_ssh() {
    local host command
    printf -v command 'cd %q && RAY_AUTH_MODE=%q RAY_AUTH_TOKEN_PATH=%q exec bash scripts/launch_multinode.sh worker %q' \
        "$PWD" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN_PATH" "$head_ip:$port"
    for host in "${hosts[@]}"; do
        ssh -o BatchMode=yes "$host" "$command" &
        ssh_pids+=($!)
    done
}

run_head() {
    if head_answers; then
        say "using the Ray cluster at $head_ip:$port, which stays when the run ends"
    else
        start_head
    fi
    start_workers_by_ssh
    .venv/bin/python -m utils.wait_for_nodes "$head_ip:$port" "$num_nodes" "${JOIN_TIMEOUT_S:-300}"
    .venv/bin/python ppo_vllm_ray_fsdp_vla.py "$@" --ray_address "$head_ip:$port"
}

[ $# -ge 2 ] || usage
role=$1 head_ip=${2%%:*} port=6379 hosts=()
[[ $2 != *:* ]] || port=${2##*:}
[[ -n $head_ip && $port =~ ^[0-9]+$ ]] || fail "'$2' is not HEAD_IP or HEAD_IP:PORT"
case $role in
worker)
    [ $# = 2 ] || usage
    prepare_token
    run_worker
    exit
    ;;
head)
    [[ $# -ge 4 && $3 =~ ^[1-9][0-9]*$ && $4 == -- ]] || usage
    num_nodes=$3
    ;;
ssh)
    [[ $# -ge 4 && $4 == -- ]] || usage
    IFS=, read -r -a hosts <<<"$3"
    num_nodes=$((1 + ${#hosts[@]}))
    ;;
*) usage ;;
esac
shift 4
bash scripts/setup_env.sh --quiet
prepare_token
run_head "$@"
