#!/bin/sh
# Take out of an environment what no program of babyseg reads; for the container, to be small.
#
#   prune.sh PYTHON
#
# Tests of libraries, and of torch also what only compiles extensions. Stubs (*.pyi) stay: some
# libraries read theirs when they are imported. pip leaves last: nothing is installed any more.
set -eu

python=${1:?usage: prune.sh PYTHON}
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

find "$site" -type d -name tests -prune -exec rm -rf {} +
rm -rf "$site/torch/test" "$site/torch/include"
# Shared memory between processes needs this one program.
find "$site/torch/bin" -mindepth 1 -maxdepth 1 ! -name torch_shm_manager -exec rm -rf {} +
"$python" -m pip --disable-pip-version-check uninstall --quiet --yes pip
