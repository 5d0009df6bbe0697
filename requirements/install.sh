#!/bin/sh
# Install the pinned dependencies into the environment of one Python; make and Docker both use it.
#
#   install.sh PYTHON cpu|cuda LOCK_FILE...
#
# On Linux the default index serves torch with CUDA, several gigabytes that a CPU never uses, so
# `cpu` asks for the local version `+cpu`: first where pip is already told to look, then in the
# wheel index of PyTorch ($TORCH_CPU_INDEX). No pip call here takes dependencies that are not
# pinned, but for the CUDA libraries, which torch itself pins.
set -eu

usage='usage: install.sh PYTHON cpu|cuda LOCK_FILE...'
python=${1:?$usage}
flavour=${2:?$usage}
shift 2
here=$(dirname "$0")
torch=$(sed -n '/^torch==/p' "$here/lock.txt")

pip() {
    "$python" -m pip --disable-pip-version-check "$@"
}

# Say which torch is installed: none, other (not the pinned version), cpu or cuda.
installed() {
    "$python" - "$torch" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, requires, version

try:
    public, _, local = version('torch').partition('+')
except PackageNotFoundError:
    print('none')
    sys.exit()
if public != sys.argv[1].split('==')[1]:
    print('other')
# Outside Linux there is one build only; it names no CUDA library and is what `cpu` means there.
elif local == 'cpu' or not any('nvidia' in r or 'cuda' in r for r in requires('torch') or ()):
    print('cpu')
else:
    print('cuda')
PY
}

now=$(installed)
case $flavour in
cpu)
    if [ "$now" = cpu ]; then
        echo "torch: already there"
    elif [ "$(uname -s)" != Linux ]; then
        pip install --no-deps "$torch"
    elif pip install --no-deps "$torch+cpu" 2>/dev/null; then
        :
    else
        index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
        echo "torch: the CPU build is not in pip's own index, taking it from $index"
        pip install --no-deps --force-reinstall --index-url "$index" "$torch"
    fi
    ;;
cuda)
    # To pip the CPU build is the same version, so it would stay.
    [ "$now" != cpu ] || pip uninstall --yes torch
    # Its CUDA libraries differ by platform, so they are left to the pins inside torch.
    pip install --constraint "$here/lock.txt" "$torch"
    ;;
*)
    echo "install.sh: '$flavour' is neither cpu nor cuda" >&2
    exit 2
    ;;
esac

for lock in "$@"; do
    echo "Installing what $lock pins; the first time this takes a minute or two"
    pip install --quiet --no-deps --requirement "$lock"
done
