#!/usr/bin/env bash
# Compiles examples/demo-model and lets it answer a prompt: `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

nextc=${NEXTC:-target/release/nextc}
out=${DEMO_DIR:-target/demo}
prompt=${PROMPT:-What is a compiler?}
mkdir -p "$out"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "\$ nextc build examples/demo-model -o $out/demo"
"$nextc" build examples/demo-model -o "$out/demo"
say "\$ $out/demo generate -p '$prompt'"
"$out/demo" generate -p "$prompt" --max-new-tokens 96 --seed 1
say "\$ $out/demo bench"
"$out/demo" bench --prefill 256 --decode 64 --profile
say "\$ nextc explain examples/demo-model"
"$nextc" explain examples/demo-model
