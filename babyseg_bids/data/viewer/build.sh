#!/bin/sh
# Bundle the viewer of the session reports anew, from npm: niivue.js.gz and LICENSES.txt, here.
#
#   build.sh            needs node and npm; the result is the same on every machine
#
# The decoders of Zarr stores are left out, as reports hold NIfTI: they are two thirds of NiiVue.
set -eu

niivue=0.69.0 esbuild=0.28.2
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
echo '{"private": true}' >package.json
npm install --no-audit --no-fund "@niivue/niivue@$niivue" "esbuild@$esbuild" >/dev/null 2>&1

echo "export { Niivue, NVImage } from '@niivue/niivue';" >entry.js
echo 'export default { fromConfig() { throw new Error("this build reads no Zarr"); } };' >none.js
npx esbuild entry.js --bundle --minify --format=iife --global-name=niivue --target=es2020 \
    --legal-comments=none --alias:numcodecs/zstd=./none.js --alias:numcodecs/blosc=./none.js \
    --alias:numcodecs/lz4=./none.js --log-level=error --outfile=bundle.js

# Every package whose code is in the bundle, with its licence.
{
    echo 'Packages in niivue.js.gz and their licences.'
    cat "$here/LICENSE-niivue.txt"
    for name in gl-matrix nifti-reader-js fflate zarrita @zarrita/storage @ungap/structured-clone \
        @lukeed/uuid array-equal numcodecs; do
        printf '\n\n== %s %s\n\n' "$name" \
            "$(node -p "require('./node_modules/$name/package.json').version")"
        cat node_modules/"$name"/[Ll][Ii][Cc][Ee][Nn][Ss][Ee]*
    done
} >"$here/LICENSES.txt"

# Gzip without name and time gives the same bytes each time.
{ printf '/*! NiiVue %s, BSD-2-Clause; licences: LICENSES.txt of babyseg */\n' "$niivue"; cat bundle.js; } |
    gzip -9 -n >"$here/niivue.js.gz"
