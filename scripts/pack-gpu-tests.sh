#!/usr/bin/env bash
# Packs tests/gpu.rs with executables and golden files into a folder, for a machine that has a GPU and no compiler:
#     scripts/pack-gpu-tests.sh FOLDER [MODEL ...]     models are fixtures of tests/oracle, or demo-model
# There: cd FOLDER && NEXTC_GPU_TESTS=. ./gpu-tests --nocapture --test-threads 1
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?the folder to pack into}
shift
models=${*:-tiny odd dense-mix yarn demo-model}
mkdir -p "$folder"
cargo build --features llvm --locked --bin nextc
nextc=${CARGO_TARGET_DIR:-target}/debug/nextc
for model in $models; do
    source=tests/oracle/$model
    [ "$model" = demo-model ] && source=examples/demo-model
    mkdir -p "$folder/$model"
    "$nextc" build "$source" --target cuda -o "$folder/$model/exe"
    cp "$source"/golden* "$folder/$model/"
    [ "$model" = demo-model ] || continue
    # what it is compared with: the logits of its first tokens in float32 (tests/gpu.rs)
    cpu=$(mktemp -d)
    "$nextc" build "$source" --activations f32 -o "$cpu/exe"
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["tokens"][:256])' "$source/golden_nll.json" > "$cpu/ids.json"
    "$cpu/exe" eval --tokens "$cpu/ids.json" --out "$folder/$model/float32.safetensors"
    rm -r "$cpu"
done
tests=$(cargo test --features llvm --locked --test gpu --no-run --message-format json |
    sed -n 's/.*"executable":"\([^"]*\/gpu-[^"]*\)".*/\1/p' | tail -n 1)
cp "$tests" "$folder/gpu-tests"
echo "packed: cd $folder && NEXTC_GPU_TESTS=. ./gpu-tests --nocapture --test-threads 1"
