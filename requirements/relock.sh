#!/bin/sh
# Write the lock files anew: the newest versions that setup.cfg allows, resolved in an empty
# environment. Plain pins, no hosts: pip's own configuration says where to look.
#
#   relock.sh PYTHON TORCH_VERSION
set -eu

usage='usage: relock.sh PYTHON TORCH_VERSION'
python=${1:?$usage}
torch=torch==${2:?$usage}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/venv"
venv=$scratch/venv/bin/python

install() {
    "$venv" -m pip install --quiet "$@"
}

pins() {
    # The package itself and pip are not pinned; the local version (+cpu) is install.sh's to choose.
    "$venv" -m pip list --format=freeze |
        grep -v -E '^(babyseg|pip)==' | sed 's/^\(torch==[^+]*\).*/\1/' | LC_ALL=C sort -f
}

header() {
    echo "# Written by make lock; the ranges are in setup.cfg."
}

install --upgrade setuptools
install "$torch+cpu" 2>/dev/null ||
    install --index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch"
install --no-build-isolation --editable "$root"
pins >"$scratch/run"
{ header; cat "$scratch/run"; } >"$here/lock.txt"

# Each of the others is complete when it is installed after lock.txt.
for extra in test docs; do
    lock=$here/lock-$extra.txt
    install --no-build-isolation --constraint "$here/lock.txt" --editable "$root[$extra]"
    { header; pins | grep -v -x -F -f "$scratch/run"; } >"$lock"
    "$venv" -m pip uninstall --quiet --yes --requirement "$lock"
done
