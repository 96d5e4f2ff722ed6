#!/usr/bin/env bash
# Packs tests/gpu.rs with executables and golden files into a folder, for a machine that has a GPU and no compiler:
#     scripts/pack-gpu-tests.sh FOLDER [MODEL ...]     models are fixtures of tests/oracle, or demo-model; all of them unless some are named
# There: cd FOLDER && NEXTC_GPU_TESTS=. ./gpu-tests --nocapture --test-threads 1
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?the folder to pack into}
shift
models=${*:-tiny odd dense-mix yarn long fp8 int4 gptq-int4 demo-model}
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
    # what it is compared with: logits of the first 2000 tokens of its text in float32, the last of each 20 (tests/gpu.rs)
    cpu=$(mktemp -d)
    "$nextc" build "$source" --activations f32 -o "$cpu/exe"
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["tokens"][:2000])' "$source/golden_nll.json" > "$cpu/ids.json"
    "$cpu/exe" eval --tokens "$cpu/ids.json" --out "$cpu/all.safetensors"
    python3 - "$cpu/all.safetensors" "$folder/$model/float32.safetensors" <<'END'
import json, struct, sys
with open(sys.argv[1], "rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    rows, width = header["logits"]["shape"]
    first = file.tell() + header["logits"]["data_offsets"][0]
    kept = []
    for row in range(19, rows, 20):
        file.seek(first + row * width * 4)
        kept.append(file.read(width * 4))
data = b"".join(kept)
header = json.dumps({"logits": {"dtype": "F32", "shape": [len(kept), width], "data_offsets": [0, len(data)]}}).encode()
with open(sys.argv[2], "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + data)
END
    rm -r "$cpu"
done
tests=$(cargo test --features llvm --locked --test gpu --no-run --message-format json |
    sed -n 's/.*"executable":"\([^"]*\/gpu-[^"]*\)".*/\1/p' | tail -n 1)
cp "$tests" "$folder/gpu-tests"
echo "packed: cd $folder && NEXTC_GPU_TESTS=. ./gpu-tests --nocapture --test-threads 1"
