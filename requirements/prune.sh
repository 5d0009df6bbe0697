#!/bin/sh
# Take out of an environment what no program of babyseg reads; for the container, to be small.
#
#   prune.sh PYTHON
#
# Tests of libraries, and of torch also what only compiles extensions, and the names of functions that
# a debugger would show (nearly 100 MB; where there is a `strip`). Of other libraries these names
# stay: wheels move parts of theirs, and strip can break what was moved. Stubs (*.pyi) stay: some
# libraries read theirs when they are imported. pip leaves last: nothing is installed any more.
set -eu

python=${1:?usage: prune.sh PYTHON}
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

find "$site" -type d -name tests -prune -exec rm -rf {} +
rm -rf "$site/torch/test" "$site/torch/include"
# Shared memory between processes needs this one program.
find "$site/torch/bin" -mindepth 1 -maxdepth 1 ! -name torch_shm_manager -exec rm -rf {} +
find "$site" -type f \( -name '*.a' -o -name '*.js.map' \) -delete
if command -v strip >/dev/null; then
    strip --strip-unneeded "$site"/torch/lib/libtorch_*.so
else
    echo "prune.sh: there is no strip (Debian: binutils), so torch stays 100 MB larger" >&2
fi
"$python" -m pip --disable-pip-version-check uninstall --quiet --yes pip
