#!/usr/bin/env bash
# The first run on a machine with an NVIDIA GPU: builds, checks and measures in one call of less than ten minutes,
# without a network:
#     bench/gpu_check.sh [FOLDER]
# writes gpu_check.tar.gz, with all logs and records, and summary.txt to FOLDER, by default bench/results, and updates
# both after every step.
#
# PYTHON names a python with a CUDA build of torch, and STEPS the steps to run. Each step has a mark, in seconds after
# the start, by which it has to end. Time that a step does not use is left to the next one, and a step that is late or
# fails does not stop the others, except that nothing is checked if the CUDA kernels cannot be built. SCALE multiplies
# the marks, for a slower machine. The exit status is 1 if anything failed.
set -u
PYTHON=${PYTHON:-python3}
ALL="build info environment smoke tests memcheck racecheck initcheck"
ALL+=" kernels steps operators distributed ncu compile goals compiled_steps"
STEPS=${STEPS:-$ALL}
SCALE=${SCALE:-1}
OUT=$(realpath -m "${1:-$(dirname "$0")/results}")
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
if [[ $PYTHON == */* ]]; then PYTHON=$(realpath -s "$PYTHON"); fi
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

now() { # milliseconds
    echo $((${EPOCHREALTIME/[.,]/} / 1000))
}

seconds() { # MILLISECONDS
    printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000))
}

begin=$(now)
unit=$(awk "BEGIN { print int(1000 * $SCALE) }") # milliseconds of a second of the marks
grace=$((4 * unit))                              # from the interrupt, when a benchmark writes what it has, to the kill

if ! there=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())'); then
    echo "gpu_check: $PYTHON cannot import torch: set PYTHON to one that can" >&2
    exit 1
fi
if [[ $there != True ]]; then
    echo "gpu_check: no CUDA device: torch.cuda.is_available() is false in $PYTHON" >&2
    exit 1
fi

mkdir -p "$OUT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
trap interrupted INT TERM HUP
failed=0
running=() # PID:NAME of each step that was started

missing() { # MODULE...: those that python lacks
    "$PYTHON" -c 'import sys, importlib.util as u; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))' "$@"
}

say() { # LINE: on the screen and in the summary
    echo "$1" | tee -a "$WORK/summary.txt"
}

pack() { # everything so far: the old archive, or the new one
    cp "$WORK/summary.txt" "$OUT/summary.txt"
    tar --warning=no-file-changed -czf "$OUT/partial.tar.gz" -C "$WORK" .
    [[ $? -gt 1 ]] || mv "$OUT/partial.tar.gz" "$OUT/gpu_check.tar.gz" # 1: a step beside was writing
}

chosen() { # NAME[-PART]: whether the step is among those to run
    [[ " $STEPS " == *" ${1%%-*} "* ]]
}

limited() { # NAME MILLISECONDS COMMAND...: the command with its output in NAME.log; how it ended in NAME.end
    local name=$1 limit=$2 start child status told=
    start=$(now)
    shift 2
    # A background process ignores interrupts, but timeout catches them, so its command has the default action again.
    timeout --signal=INT --kill-after="$(seconds $grace)" "$(seconds "$limit")" "$@" >"$WORK/$name.log" 2>&1 &
    child=$!
    trap 'told=1; kill -INT $child' TERM # timeout passes it on to all that the command started
    wait $child
    status=$?
    [[ -z $told ]] || wait $child
    echo "$status $(($(now) - start))" >"$WORK/$name.end"
}

start() { # NAME UNTIL COMMAND...: begin a step, if it is chosen
    local name=$1 limit=$(($2 * unit + begin - grace - $(now)))
    shift 2
    chosen "$name" || return 0
    if ((limit <= 0)); then
        outcome "$name" "no time left" 0
        failed=1
        return
    fi
    echo "== $name, $(seconds $limit) s: $*"
    limited "$name" $limit "$@" &
    running+=("$!:$name")
}

finish_started() { # wait for the steps that were started, and note how they ended
    local name status duration
    while ((${#running[@]})); do
        name=${running[0]#*:}
        wait "${running[0]%:*}"
        running=("${running[@]:1}")
        read -r status duration <"$WORK/$name.end"
        rm "$WORK/$name.end"
        tail -n 30 "$WORK/$name.log"
        case $status in
            0) status=ok ;;
            124) status="over its mark" ;;
            137) status=killed ;;
            *) status="failed ($status)" ;;
        esac
        [[ $status == ok ]] || failed=1
        outcome "$name" "$status" "$duration"
        pack
    done
}

step() { # NAME UNTIL COMMAND...
    start "$@"
    finish_started
}

outcome() { # NAME OUTCOME MILLISECONDS
    say "$(printf '%-16s %-16s %8s s' "$1" "$2" "$(seconds "$3")")"
}

absent() { # NAME WHAT: a step that cannot run
    ! chosen "$1" || outcome "$1" "no $2" 0
}

finish() {
    pack
    echo
    cat "$WORK/summary.txt"
    exit "$failed"
}

interrupted() {
    trap '' INT TERM HUP
    [[ ${#running[@]} -eq 0 ]] || kill -TERM "${running[@]%:*}"
    wait
    say "interrupted in: ${running[*]#*:}"
    failed=1
    finish
}

say "$(printf '%-16s %-16s %8s s' step outcome "")"

# setup.py rather than pip: it writes nothing outside this folder, and asks no network.
step build 110 env -u TORCH_CUDA_ARCH_LIST RGD_EXT_BUILD=cuda MAX_JOBS="$(nproc)" \
    "$PYTHON" setup.py egg_info build_ext --inplace
step info 130 "$PYTHON" -c 'import sys, rgd_ext; i = rgd_ext.build_info(); print(i); sys.exit(not i["cuda"])'
[[ $failed -eq 0 ]] || finish

start environment 130 "$PYTHON" -m bench.measuring.environment "$WORK/environment.json"
step smoke 130 env OMP_NUM_THREADS=1 "$PYTHON" -m bench.gpu.smoke

# No times are measured in these steps, so they run in parallel.
if [[ -n $(missing pytest) ]]; then
    absent tests pytest
elif chosen tests; then
    files=()
    shopt -s globstar
    for file in $(grep -lE 'mark\.gpu|\bDEVICES\b' tests/**/test_*.py); do
        # shellcheck disable=SC2046
        without=$(PYTHONPATH=$PYTHONPATH:$PWD/tests missing $(sed -nE 's/^(import|from) ([A-Za-z_]+).*/\2/p' "$file"))
        if [[ -z $without ]]; then files+=("$file"); else say "tests: without $file: no $without"; fi
    done
    # A worker whose device has failed ends itself (tests/conftest.py), and gets a successor.
    workers=(-n 5 --max-worker-restart 40)
    if [[ -n $(missing xdist) ]]; then
        workers=()
        say "tests: in one process, which a failure of the device ends: no xdist"
    fi
    start tests 260 env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m gpu -rfEs --durations=10 "${workers[@]}" "${files[@]}"
fi
for tool in memcheck racecheck initcheck; do
    if ! command -v compute-sanitizer >/dev/null; then
        absent "$tool" compute-sanitizer
        continue
    fi
    for dtypes in "float32 float64" "bfloat16 float16"; do
        # Without the allocator's cache, an access past the end of a tensor does not hit another tensor unnoticed.
        # shellcheck disable=SC2086
        start "$tool-${dtypes%% *}" 260 env OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 --print-limit 20 \
            "$PYTHON" -m bench.gpu.sanitized_run cuda $dtypes
    done
done
finish_started

# Large gradients first, then the others for which bench/tabulating/goals.py has goals.
step kernels 360 "$PYTHON" -m bench kernels --device cuda --no-compile --json "$WORK/kernels.json" --only \
    "d = 1e+07, B = 128," ResNet-50 "d = 3e+07, B = 4," "d = 1e+07, B = 8," "d = 1e+07, B = 16," "d = 1e+07, B = 32," \
    "d = 1e+06, B = 512," "d = 1e+06, B = 1024," "d = 1e+06, B = 128," GPT-2
step steps 460 "$PYTHON" -m bench steps --device cuda --json "$WORK/steps.json" --only \
    "MLP 784-2048" "ResNet-GN 0.3M" "GPT-2 small's shape, bfloat16" "GPT 4 x 256" "GPT-2 small's shape, autocast" \
    "ResNet-16-8, GN" "MLP 784-1024"
step operators 480 "$PYTHON" -m bench operators --device cuda --json "$WORK/operators.json"
step distributed 510 "$PYTHON" -m bench distributed --quick --device cuda --json "$WORK/distributed.json"
if command -v ncu >/dev/null; then
    step ncu 540 ncu --clock-control none --profile-from-start off --section SpeedOfLight --section LaunchStats \
        --section Occupancy --section SchedulerStats --section WarpStateStats --section MemoryWorkloadAnalysis \
        --section MemoryWorkloadAnalysis_Tables "$PYTHON" -m bench.gpu.ncu_run
else
    absent ncu ncu
fi
step compile 575 "$PYTHON" -m bench kernels --device cuda --json "$WORK/kernels-compile.json" --only "d = 1e+07, B = 128,"
step goals 580 "$PYTHON" -m bench.tabulating.goals "$WORK"
# Last, in the time that is left, since it compiles each model several times.
step compiled_steps 590 "$PYTHON" -m bench compile --device cuda --json "$WORK/compile.json" --only \
    "MLP 784-2048" "GPT 4 x 256" "GPT-2 small's shape, bfloat16"

finish
