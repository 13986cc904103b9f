#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU, in one call of less than 35 minutes, without a network:
#     bench/gpu_check.sh [FOLDER for results, default bench/results]
# PYTHON names a python with a CUDA build of torch; STEPS the steps to run, of: build info test test-cpu memcheck
# racecheck initcheck kernels steps. Only a failed build stops the others; the exit status is 1 if any failed.
set -u
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-build info test test-cpu memcheck racecheck initcheck kernels steps}
OUT=$(realpath -m "${1:-$(dirname "$0")/results}")
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
if [[ $PYTHON == */* ]]; then PYTHON=$(realpath -s "$PYTHON"); fi
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if ! there=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())'); then
    echo "gpu_check: $PYTHON cannot import torch: set PYTHON to one that can" >&2
    exit 1
fi
if [[ $there != True ]]; then
    echo "gpu_check: no CUDA device: torch.cuda.is_available() is false in $PYTHON" >&2
    exit 1
fi

summary=()
failed=0

has() { # MODULE...: whether python has all of them
    "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"
}

note() { # STEP OUTCOME SECONDS
    summary+=("$(printf '%-12s %-18s %5s' "$1" "$2" "$3")")
}

step() { # NAME SECONDS COMMAND...: run it with its output in NAME.log, and remember how it ended
    local name=$1 limit=$2 begin=$SECONDS status outcome=ok
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return 0
    echo "== $name: $*"
    # An interrupt lets the benchmark write what it has.
    timeout --signal=INT --kill-after=20 "$limit" "$@" >"$OUT/gpu-$name.log" 2>&1
    status=$?
    tail -n 30 "$OUT/gpu-$name.log"
    if [[ $status -ne 0 ]]; then
        outcome="failed ($status)"
        [[ $status -ne 124 ]] || outcome="over ${limit} s"
        failed=1
    fi
    note "$name" "$outcome" "$((SECONDS - begin))"
}

absent() { # NAME TOOL: a step whose tool is missing
    [[ " $STEPS " == *" $1 "* ]] || return 0
    echo "== $1: $2 is not there"
    note "$1" "not there" 0
}

finish() {
    printf '\n%-12s %-18s %5s\n' step outcome s
    printf '%s\n' "${summary[@]}"
    exit "$failed"
}

mkdir -p "$OUT"
"$PYTHON" -m bench.environment "$OUT/gpu-environment.json" && cat "$OUT/gpu-environment.json"

# setup.py rather than pip: it writes nothing outside this folder, and asks no network.
step build 360 env RGD_EXT_BUILD=cuda "$PYTHON" setup.py egg_info build_ext --inplace
step info 30 "$PYTHON" -c 'import sys, rgd_ext; i = rgd_ext.build_info(); print(i); sys.exit(not i["cuda"])'

[[ $failed -eq 0 ]] || finish

if has pytest; then
    # The files that have GPU tests: others import what may not be there.
    files=(tests/test_cuda.py tests/test_ops.py tests/test_unfolding.py)
    ! has matplotlib || files+=(tests/test_monitor.py)
    step test 200 "$PYTHON" -m pytest -m gpu "${files[@]}"
    step test-cpu 120 "$PYTHON" -m pytest -m "not gpu" tests/test_ops.py
else
    absent test pytest
    absent test-cpu pytest
fi

for tool in memcheck racecheck initcheck; do
    if command -v compute-sanitizer >/dev/null; then
        # Without the allocator's cache, or an access past a tensor would land in its neighbour unseen.
        step "$tool" 180 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --target-processes all --error-exitcode 1 --print-limit 20 "$PYTHON" -m bench.sanitized_run
    else
        absent "$tool" compute-sanitizer
    fi
done

step kernels 470 "$PYTHON" -m bench kernels --device cuda --json "$OUT/gpu-kernels.json" --plot "$OUT/gpu-kernels.png"
step steps 300 "$PYTHON" -m bench steps --device cuda --json "$OUT/gpu-steps.json"

finish
