#!/usr/bin/env bash
# Makes .venv with the pinned packages. Does nothing, in well under a second, when nothing changed.
#
#   bash scripts/setup_env.sh            GPU packages where nvidia-smi lists a GPU, else CPU packages;
#                                        an existing .venv keeps its kind
#   bash scripts/setup_env.sh --cpu      CPU packages            --gpu    GPU packages
#   bash scripts/setup_env.sh --force    make .venv anew         --quiet  say nothing when nothing changed
#
# PPO_VLA_PYTHON=/path/to/python chooses the interpreter (3.11 or 3.12). Several runs at once wait for each other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv STAMP=.venv/.setup_stamp UV_PIN=uv==0.13.9
readonly PYTHON_RANGE='>=3.11,<3.13'
readonly CPU_DISK_GIB=12 GPU_DISK_GIB=22

say() { echo "setup: $*"; }
fail() {
    echo "setup: $1" >&2
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

parse_options() {
    forced_kind="" force=0 quiet=0
    for option in "$@"; do
        case $option in
        --cpu | --gpu) forced_kind=${option#--} ;;
        --force) force=1 ;;
        --quiet) quiet=1 ;;
        -h | --help)
            sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0"
            exit 0
            ;;
        *) fail "unknown option $option: use --cpu, --gpu, --force or --quiet" ;;
        esac
    done
}

# No `program | grep -q`: grep ends first, the program may die of SIGPIPE, and pipefail makes that a "no".
has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }
has_library() { [[ $(PATH=$PATH:/usr/sbin:/sbin ldconfig -p) == *"$1"* ]]; }
requirements_of() { if [ "$1" = gpu ]; then echo requirements.txt; else echo requirements-cpu.txt; fi; }
stamped_kind() { if [ -f "$STAMP" ]; then head -n 1 "$STAMP"; fi; }

choose_kind() {
    kind=${forced_kind:-$(stamped_kind)}
    if [ -z "$kind" ]; then
        if has_gpu; then kind=gpu; else kind=cpu; fi
    fi
}

# What an installed .venv is the result of. The path counts because a virtual environment cannot be moved.
expected_stamp() {
    echo "$kind"
    { pwd -P && cat "$(requirements_of "$kind")" pyproject.toml; } | sha256sum
}

is_current() { [ "$force" = 0 ] && [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(expected_stamp)" ]; }

check_system() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
        fail "this is $(uname -s) on $(uname -m); the pinned packages are for Linux on x86_64" \
            "use such a machine, or a container on one"
    if [ "$kind" = gpu ] && ! has_gpu; then
        say "warning: nvidia-smi lists no GPU here; the GPU packages will not run on this machine"
    fi
    # vLLM's CPU build is linked to libnuma and only warns when it cannot load its kernels.
    if [ "$kind" = cpu ] && ! has_library libnuma.so.1; then
        fail "libnuma.so.1 is missing; vLLM's CPU build needs it" "apt-get install -y libnuma1   (as root), then run this again"
    fi
}

check_disk() {
    local need=$CPU_DISK_GIB free
    [ "$kind" = cpu ] || need=$GPU_DISK_GIB
    free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
    [ "$free" -ge "$need" ] ||
        fail "$free GiB are free under $PWD; the $kind packages and their download cache need about $need GiB" \
            "make room, or move the checkout (and UV_CACHE_DIR) to a larger disk"
}

find_uv() {
    if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
        UV=uv
        return
    fi
    UV=.uv/bin/uv
    [ ! -x "$UV" ] || return 0
    say "installing uv into .uv"
    python3 -m pip install --quiet --target .uv "$UV_PIN" ||
        fail "uv is missing and pip could not install it" \
            "install uv (https://docs.astral.sh/uv), or pip (apt-get install -y python3-pip), then run this again" \
            "behind a proxy set HTTPS_PROXY; with a package mirror set PIP_INDEX_URL and UV_DEFAULT_INDEX"
}

find_python() {
    if [ -n "${PPO_VLA_PYTHON:-}" ]; then
        python=$PPO_VLA_PYTHON
        "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
            fail "PPO_VLA_PYTHON=$python is not a Python 3.11 or 3.12"
        return
    fi
    python=$("$UV" python find --system --no-python-downloads "$PYTHON_RANGE" 2>/dev/null) ||
        { "$UV" python install --quiet 3.12 2>/dev/null && python=$("$UV" python find "$PYTHON_RANGE" 2>/dev/null); } ||
        fail "no Python 3.11 or 3.12 here, and uv could not download one" \
            "apt-get install -y python3.11   (Debian 12; python3.12 on Ubuntu 24.04)," \
            "or name one: PPO_VLA_PYTHON=/path/to/python3.11 bash scripts/setup_env.sh"
}

venv_is_usable() {
    [ "$force" = 0 ] && { [ ! -f "$STAMP" ] || [ "$(stamped_kind)" = "$kind" ]; } &&
        "$VENV/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

make_venv() {
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
        fail "$PWD/$VENV exists and is not a virtual environment" "move it away, then run this again"
    fi
    if venv_is_usable; then
        rm -f "$STAMP"
        return
    fi
    find_python
    say "making $VENV with $("$python" --version) ($python)"
    "$UV" venv --quiet --clear --python "$python" "$VENV" || fail "uv could not make $VENV with $python (its message is above)"
}

install_packages() {
    local requirements
    requirements=$(requirements_of "$kind")
    say "installing $requirements ($(wc -l <"$requirements") packages; several GB to download the first time)"
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
    local install=("$UV" pip install --python "$VENV/bin/python" --no-deps)
    [ -t 2 ] || install+=(--quiet) # on a terminal uv shows its progress
    # Byte code now: else each of the dozen processes of a run compiles torch, vllm and tensorflow for itself where
    # PYTHONDONTWRITEBYTECODE is set or .venv is read-only (6 s of CPU for tensorflow alone).
    { "${install[@]}" --compile-bytecode -r "$requirements" && "${install[@]}" --no-build-isolation --editable .; } ||
        fail "the packages could not be installed (uv's message is above)" \
            "no network: nothing can be installed; behind a proxy set HTTPS_PROXY, with a mirror UV_DEFAULT_INDEX" \
            "slow network: set UV_HTTP_TIMEOUT=600; disk full: point UV_CACHE_DIR elsewhere" \
            "run this again: what was downloaded is kept"
}

main() {
    parse_options "$@"
    choose_kind
    if is_current; then
        [ "$quiet" = 1 ] || say "$VENV is up to date ($kind)"
        return
    fi
    exec 9>.venv.lock
    if ! flock --nonblock 9; then
        say "another set-up of this checkout is running; waiting for it"
        flock 9
    fi
    is_current && return # the other run did it
    local start=$SECONDS
    check_system
    find_uv
    [ -f "$STAMP" ] || check_disk
    make_venv
    install_packages
    say "checking that everything imports"
    # TensorFlow greets on stderr whatever its log level: shown only when something fails.
    local messages
    messages=$("$VENV/bin/python" -m utils.check_install --kind "$kind" 2>&1) ||
        fail "the installed packages do not work" "$messages"
    expected_stamp >"$STAMP"
    say "done in $((SECONDS - start)) s: $VENV ($kind)"
}

main "$@"
