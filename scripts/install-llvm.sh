#!/usr/bin/env bash
# Installs LLVM 22 with its headers through apt, if it is missing. Tests of the LLVM backend need it; the rest of nextc does not.
set -euo pipefail

packages=(llvm-22-dev libpolly-22-dev libzstd-dev zlib1g-dev libxml2-dev)
prefix=${LLVM_SYS_221_PREFIX:-/usr/lib/llvm-22}

fail() {
    printf 'install-llvm: %s\n' "$@" >&2
    exit 1
}

# An LLVM of one's own, named by LLVM_SYS_221_PREFIX, is taken as it is.
if [[ -n ${LLVM_SYS_221_PREFIX:-} && -x $prefix/bin/llvm-config ]]; then
    echo "LLVM $("$prefix/bin/llvm-config" --version) at $prefix"
    exit 0
fi

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null || true)
    [[ $status == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)) && [[ -x $prefix/bin/llvm-config ]]; then
    echo "LLVM $("$prefix/bin/llvm-config" --version) at $prefix"
    exit 0
fi

by_hand="to do it by hand: sudo apt-get install ${missing[*]:-${packages[*]}}"
command -v apt-get >/dev/null ||
    fail "LLVM 22 is missing, and there is no apt-get here" "install LLVM 22 with headers and set LLVM_SYS_221_PREFIX to where it is"

root=()
if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || fail "missing: ${missing[*]}" "installing them needs root, and there is no sudo" "$by_hand"
    # -n: never wait for a password where nobody can type one
    if [[ -t 0 ]]; then root=(sudo); else root=(sudo -n); fi
    "${root[@]}" true || fail "missing: ${missing[*]}" "installing them needs root, which sudo does not give" "$by_hand"
fi

echo "installing ${missing[*]}"
"${root[@]}" apt-get update --quiet || echo "install-llvm: apt-get update failed; going on with the lists there are" >&2
apt-cache show llvm-22-dev >/dev/null 2>&1 ||
    fail "apt's configured sources have no llvm-22-dev" \
        "Debian 12 has it in bookworm-security, Debian 13 and later in their own; see https://apt.llvm.org for other systems" \
        "nextc itself builds without it: make demo"
"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}" ||
    fail "apt-get could not install ${missing[*]}" "$by_hand"
echo "LLVM $("$prefix/bin/llvm-config" --version) at $prefix"
