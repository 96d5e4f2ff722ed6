#!/usr/bin/env bash
# Fetches NVIDIA's PTX assembler into the target directory, if it is missing: tests assemble the PTX that nextc emits. It is a part of the Python
# package nvidia-cuda-nvcc; nothing is installed, and no other part of CUDA is needed. The GPU's driver has an assembler of its own.
set -euo pipefail

package=nvidia-cuda-nvcc==13.0.88
member=nvidia/cu13/bin/ptxas
target=${CARGO_TARGET_DIR:-$(dirname "$0")/../target}
ptxas=$target/ptxas/$member

fail() {
    printf 'install-ptxas: %s\n' "$@" >&2
    exit 1
}

# A ptxas of one's own, named by NEXTC_PTXAS, is taken as it is.
if [[ -n ${NEXTC_PTXAS:-} ]]; then
    "$NEXTC_PTXAS" --version >/dev/null || fail "NEXTC_PTXAS is $NEXTC_PTXAS, which does not run"
    echo "ptxas at $NEXTC_PTXAS"
    exit 0
fi
if [[ -x $ptxas ]]; then
    echo "ptxas at $ptxas"
    exit 0
fi

by_hand="to do it by hand: install CUDA 13.0 and set NEXTC_PTXAS to its ptxas"
command -v python3 >/dev/null || fail "ptxas is missing, and there is no python3 to fetch it with" "$by_hand"
python3 -m pip --version >/dev/null 2>&1 || fail "ptxas is missing, and python3 has no pip to fetch it with" "$by_hand"

mkdir -p "$target/ptxas"
wheels=$(mktemp -d "$target/ptxas/wheel.XXXXXX")
trap 'rm -rf "$wheels"' EXIT
echo "fetching $package"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$wheels" "$package" ||
    fail "pip could not download $package" "$by_hand"
python3 -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2], sys.argv[3])' "$wheels"/*.whl "$member" "$wheels" ||
    fail "the package has no $member" "$by_hand"
chmod +x "$wheels/$member"
mkdir -p "$(dirname "$ptxas")"
mv "$wheels/$member" "$ptxas"
echo "ptxas at $ptxas"
