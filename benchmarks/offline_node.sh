#!/usr/bin/env bash
# Everything a bare GPU node without network needs beside this checkout, in pieces that travel one by one.
#
#   bash benchmarks/offline_node.sh pack [--tensorflow]    here: .gpu/p1, .gpu/p2, ... of at most 52 MiB, and .gpu/ex
#   cp .gpu/p1/* /tmp/bundle/                              there, once for each piece, as it arrives
#   bash benchmarks/offline_node.sh unpack                 there, when all pieces and .gpu/ex are there: 15 s
#   . benchmarks/offline_node.env                          there, in each call
#
# --tensorflow: needed where demonstrations are recorded or read; without it there are 5 pieces, with it 9.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SHARED=${SHARED:-../shared}
PIECE_BYTES=54000000

download() { # for Python 3.12, which the node has
    local platforms=() name
    for name in manylinux_2_28 manylinux_2_17 manylinux2014; do platforms+=(--platform "${name}_x86_64"); done
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 "${platforms[@]}" -d .gpu/ex "$@"
}

pack() {
    rm -rf .gpu/bundle .gpu/ex .gpu/p[0-9]*
    mkdir -p .gpu/ex
    PATH=$PWD/.uv/bin:$PATH python3 "$SHARED/gpu_bundle/make_bundle.py" .gpu/bundle --libero "$@" \
        --extra tyro typeguard omegaconf antlr4-python3-runtime
    cat .gpu/bundle/part*/bundle.xz.* | split -b "$PIECE_BYTES" -d - .gpu/bundle/piece.
    local number=1 piece
    for piece in .gpu/bundle/piece.*; do
        mkdir ".gpu/p$number"
        mv "$piece" ".gpu/p$number/"
        number=$((number + 1))
    done
    rm -rf .gpu/bundle
    download simplejpeg
    (cd .gpu/ex && apt-get -q download libegl1 libglvnd0 libgl1 libglx0)
    cp "$SHARED/libero_assets/assets_spatial_goal.tar.xz" .gpu/ex/
    # The ffmpeg of this version is a single file of 74 MB.
    local work
    work=$(mktemp -d)
    python3 -m pip download -q --no-deps -d "$work" imageio-ffmpeg==0.4.9
    unzip -q -o "$work"/*.whl -d "$work"
    xz -T0 -3 -c "$work"/imageio_ffmpeg/binaries/ffmpeg-* >.gpu/ex/ffmpeg.xz
    rm -rf "$work"
    du -sm .gpu/p[0-9]* .gpu/ex
}

unpack() {
    mkdir -p /tmp/site /tmp/extra
    (cat /tmp/bundle/piece.* | xz -T0 -dc | tar xf - -C /tmp/site) &
    xz -dc .gpu/ex/ffmpeg.xz >/tmp/extra/ffmpeg
    chmod +x /tmp/extra/ffmpeg
    local package
    for package in .gpu/ex/*.deb; do dpkg -x "$package" /; done
    ldconfig
    tar xf .gpu/ex/assets_spatial_goal.tar.xz -C /tmp/extra
    wait -n
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site2 .gpu/ex/*.whl
    nvidia-smi -L
    nproc
    free -g | head -2
}

"$@"
