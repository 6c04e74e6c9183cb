#!/usr/bin/env bash
# Makes .venv with the pinned packages. Does nothing, in well under a second, when nothing changed.
#
#   bash scripts/setup_env.sh            GPU packages where nvidia-smi lists a GPU, else CPU packages;
#                                        an existing .venv keeps its kind
#   bash scripts/setup_env.sh --cpu      CPU packages            --gpu    GPU packages
#   bash scripts/setup_env.sh --libero   LIBERO's simulator as well: its packages, the GL libraries that it renders with
#                                        (installed as root, else the line to run is shown), and the assets where
#                                        ../shared has them; an existing .venv that has LIBERO keeps it
#   bash scripts/setup_env.sh --force    make .venv anew         --quiet  say nothing when nothing changed
#
# PPO_VLA_PYTHON=/path/to/python chooses the interpreter (3.11 or 3.12). With --libero: MUJOCO_GL=osmesa or egl asks for
# that one's libraries only (unset: osmesa, and egl where there is a GPU); LIBERO_ASSETS names the folder of the assets.
# Several runs at once wait for each other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv STAMP=.venv/.setup_stamp UV_PIN=uv==0.13.9
readonly PYTHON_RANGE='>=3.11,<3.13'
readonly CPU_DISK_GIB=12 GPU_DISK_GIB=22
readonly LIBERO_PINS=requirements-libero.txt LIBERO_STAMP=.venv/.libero_stamp
readonly ASSET_PACK=../shared/libero_assets/assets_spatial_goal.tar.xz ASSET_CACHE=.cache/libero_assets/assets

say() { echo "setup: $*"; }
fail() {
    echo "setup: $1" >&2
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

parse_options() {
    forced_kind="" force=0 quiet=0 libero_asked=0
    for option in "$@"; do
        case $option in
        --cpu | --gpu) forced_kind=${option#--} ;;
        --libero) libero_asked=1 ;;
        --force) force=1 ;;
        --quiet) quiet=1 ;;
        -h | --help)
            sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0"
            exit 0
            ;;
        *)
            echo "setup: unknown option $option: use --cpu, --gpu, --libero, --force or --quiet" >&2
            exit 2
            ;;
        esac
    done
}

# No `program | grep -q`: grep ends first, the program may die of SIGPIPE, and pipefail makes that a "no".
has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }
list_libraries() { PATH=$PATH:/usr/sbin:/sbin ldconfig -p; }
has_library() { [[ $(list_libraries) == *"$1"* ]]; }
requirements_of() { if [ "$1" = gpu ]; then echo requirements.txt; else echo requirements-cpu.txt; fi; }
stamped_kind() { if [ -f "$STAMP" ]; then head -n 1 "$STAMP"; fi; }

choose_kind() {
    kind=${forced_kind:-$(stamped_kind)}
    if [ -z "$kind" ]; then
        if has_gpu; then kind=gpu; else kind=cpu; fi
    fi
    if [ -f "$LIBERO_STAMP" ]; then had_libero=1; else had_libero=0; fi
    libero=$((libero_asked || had_libero))
}

# What an installed .venv is the result of. The path counts because a virtual environment cannot be moved.
expected_stamp() {
    echo "$kind"
    { pwd -P && cat "$(requirements_of "$kind")" pyproject.toml; } | sha256sum
}

has_base() { [ "$force" = 0 ] && [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(expected_stamp)" ]; }
has_libero() { [ "$(cat "$LIBERO_STAMP" 2>/dev/null)" = "$(sha256sum <"$LIBERO_PINS")" ]; }

has_packages() { has_base && { [ "$libero" = 0 ] || has_libero; }; }

is_current() {
    has_packages && { [ "$libero_asked" = 0 ] || { [ -z "$(missing_gl_packages)" ] && ! assets_to_unpack; }; }
}

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

# Debian packages of the libraries that are missing to render: one line, empty if none is.
missing_gl_packages() {
    local needs=() libraries need missing=()
    if [ "${MUJOCO_GL:-osmesa}" != egl ]; then
        needs+=(libOSMesa.so:libosmesa6)
    fi
    if [ "${MUJOCO_GL:-}" = egl ] || { [ -z "${MUJOCO_GL:-}" ] && has_gpu; }; then
        needs+=(libEGL.so.1:libegl1 libGLdispatch.so.0:libglvnd0 libGL.so.1:libgl1 libGLX.so.0:libglx0)
        has_gpu || needs+=(libEGL_mesa.so.0:"libegl-mesa0 libgl1-mesa-dri")
    fi
    libraries=$(list_libraries)
    for need in "${needs[@]}"; do
        [[ $libraries == *"${need%%:*}"* ]] || missing+=("${need#*:}")
    done
    echo "${missing[*]}"
}

install_gl() {
    local packages messages
    packages=$(missing_gl_packages)
    if [ -n "$packages" ]; then
        local install="apt-get install -y --no-install-recommends $packages"
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            fail "LIBERO renders with system libraries that are missing here" \
                "$install   (as root), then run this again"
        fi
        say "installing $packages"
        export DEBIAN_FRONTEND=noninteractive
        install+=" -o DPkg::Lock::Timeout=300"
        # The package lists of a fresh container are empty or old: fetched only when the first try fails.
        messages=$({ $install || { apt-get update && $install; }; } 2>&1) ||
            fail "apt-get could not install $packages (its messages follow)" "$messages" \
                "install them by hand, or set up without --libero"
        packages=$(missing_gl_packages)
        [ -z "$packages" ] || fail "apt-get installed $packages, but ldconfig does not list the libraries" "$messages"
    fi
    if has_gpu && [ "${MUJOCO_GL:-egl}" = egl ] && ! has_library libEGL_nvidia.so.0; then
        say "warning: no libEGL_nvidia.so.0 of the NVIDIA driver: EGL will not find the GPU" \
            "(a container needs NVIDIA_DRIVER_CAPABILITIES=all)"
    fi
}

package_has_assets() { compgen -G "$VENV/lib/python3*/site-packages/libero/libero/assets" >/dev/null; }

assets_to_unpack() {
    [ -z "${LIBERO_ASSETS:-}" ] && [ -f "$ASSET_PACK" ] && ! package_has_assets &&
        [ "$(cat "$ASSET_CACHE/.pack" 2>/dev/null)" != "$(sha256sum <"$ASSET_PACK")" ]
}

unpack_assets() {
    local partial=${ASSET_CACHE%/*}.partial
    rm -rf "$partial"
    mkdir -p "$partial"
    # Python's own module: a container may lack xz. 3.12 warns that a later version will filter by default.
    "$VENV/bin/python" -W ignore -m tarfile -e "$ASSET_PACK" "$partial" ||
        fail "$ASSET_PACK could not be unpacked into $partial (see above)" "free some space, or set LIBERO_ASSETS"
    sha256sum <"$ASSET_PACK" >"$partial/assets/.pack"
    rm -rf "${ASSET_CACHE%/*}"
    mv "$partial" "${ASSET_CACHE%/*}"
}

# In the order in which ppo/envs/libero_install.py looks.
name_assets() {
    if [ -n "${LIBERO_ASSETS:-}" ]; then
        say "LIBERO's assets: $LIBERO_ASSETS (LIBERO_ASSETS)"
    elif package_has_assets; then
        say "LIBERO's assets: the package's own"
    elif [ -d "$ASSET_CACHE" ]; then
        say "LIBERO's assets: $ASSET_CACHE, for libero_spatial and libero_goal;" \
            "three files are stand-ins: success rates are not comparable with published ones"
    else
        say "LIBERO's assets are not here:" \
            "set LIBERO_ASSETS=/path/to/assets, or let the package download them on first use"
    fi
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

# uv_install REQUIREMENTS...
uv_install() {
    local install=("$UV" pip install --python "$VENV/bin/python" --no-deps)
    [ -t 2 ] || install+=(--quiet) # on a terminal uv shows its progress
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
    "${install[@]}" "$@" ||
        fail "the packages could not be installed (uv's message is above)" \
            "no network: nothing can be installed; behind a proxy set HTTPS_PROXY, with a mirror UV_DEFAULT_INDEX" \
            "slow network: set UV_HTTP_TIMEOUT=600; disk full: point UV_CACHE_DIR elsewhere" \
            "run this again: what was downloaded is kept"
}

# Byte code now (--compile-bytecode): else each of the dozen processes of a run compiles torch, vllm and tensorflow for
# itself where PYTHONDONTWRITEBYTECODE is set or .venv is read-only (6 s of CPU for tensorflow alone).
install_base() {
    local requirements
    requirements=$(requirements_of "$kind")
    say "installing $requirements ($(wc -l <"$requirements") packages; several GB to download the first time)"
    uv_install --compile-bytecode -r "$requirements"
    uv_install --no-build-isolation --editable .
}

install_libero() {
    say "installing $LIBERO_PINS ($(wc -l <"$LIBERO_PINS") packages; 0.3 GB to download the first time)"
    uv_install --compile-bytecode -r "$LIBERO_PINS"
}

install_packages() {
    local check=(--kind none)
    if has_base; then
        find_uv
    else
        check=(--kind "$kind")
        check_system
        find_uv
        [ -f "$STAMP" ] || check_disk
        make_venv
        # A new .venv shall get LIBERO again, also when this run does not come so far.
        [ "$had_libero" = 0 ] || : >"$LIBERO_STAMP"
        install_base
    fi
    if [ "$libero" = 1 ]; then
        check+=(--libero)
        install_libero
    fi
    check_imports "${check[@]}"
    expected_stamp >"$STAMP"
    [ "$libero" = 0 ] || sha256sum <"$LIBERO_PINS" >"$LIBERO_STAMP"
}

check_imports() {
    local messages
    say "checking that everything imports"
    # TensorFlow and robosuite greet on stderr: shown only when something fails.
    messages=$("$VENV/bin/python" -m utils.check_install "$@" 2>&1 </dev/null) || fail "the installed packages do not work" "$messages"
}

describe() { if [ "$libero" = 1 ]; then echo "$kind, with LIBERO"; else echo "$kind"; fi; }

report_current() {
    say "$VENV is up to date ($(describe))"
    [ "$libero_asked" = 0 ] || name_assets
}

main() {
    parse_options "$@"
    if [ "$libero_asked" = 1 ] && [ ! -d "${LIBERO_ASSETS:-/}" ]; then
        fail "LIBERO_ASSETS=$LIBERO_ASSETS is not a folder" "name the folder of LIBERO's assets, or unset it"
    fi
    choose_kind
    if is_current; then
        [ "$quiet" = 1 ] || report_current
        return
    fi
    exec 9>.venv.lock
    if ! flock --nonblock 9; then
        say "another set-up of this checkout is running; waiting for it"
        flock 9
    fi
    is_current && return # the other run did it
    local start=$SECONDS
    if [ "$libero_asked" = 1 ]; then install_gl; fi
    if ! has_packages; then install_packages; fi
    if [ "$libero_asked" = 1 ]; then
        if assets_to_unpack; then unpack_assets; fi
        name_assets
    fi
    say "done in $((SECONDS - start)) s: $VENV ($(describe))"
}

main "$@"
