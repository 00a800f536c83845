#!/bin/sh
# GPU tests, then benchmarks of the kernels, of the training step, and of decoding and flow, from the source tree: needs a GPU, torch
# and triton in $PYTHON, and no installation. What cannot run here is skipped with a line that says why. Called by `make gpu`.
# RESULTS names another folder for the numbers, BUDGET the seconds for all of it: what the first tests leave is shared out.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
BUDGET=${BUDGET:-540}
PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
started=$(date +%s)

has() {
    "$PYTHON" -c "import $1" 2>/dev/null
}

# Whether all packages that follow are here; says of what they are needed for that it is skipped, and why.
needs() {
    what=$1
    shift
    for package in "$@"; do
        if ! has "$package"; then
            echo "skipped: $what, $PYTHON has no working $package"
            return 1
        fi
    done
}

# A share, in percent, of the seconds that are left; a benchmark without any still says what it leaves out.
share() {
    seconds=$(((BUDGET - $(date +%s) + started) * $1 / 100))
    echo $((seconds > 0 ? seconds : 0))
}

# Runs a command that is ended after so many seconds, where the system has a program for that.
limited() {
    if command -v timeout >/dev/null; then
        timeout "$@"
    else
        shift
        "$@"
    fi
}

# The GPU tests of some files, as far as what they import is here: they may need packages that are not. Each is named as it ends, so that
# a run that is cut short has said which failed.
run_tests() {
    for file in "$@"; do
        left=$(share 100)
        if [ "$left" = 0 ]; then
            echo "left out: $file: the budget of $BUDGET s was spent"
            continue
        fi
        if ! problem=$("$PYTHON" -m pytest -q --collect-only -m gpu "$file" 2>&1) && echo "$problem" | grep -q ModuleNotFoundError; then
            echo "skipped: $file: $(echo "$problem" | grep -m 1 -o "No module named.*")"
            continue
        fi
        limited "$left" "$PYTHON" -m pytest -v -m gpu "$file"
        case $? in
            0 | 5) ;;
            124) echo "cut short: $file: the budget of $BUDGET s was spent" ;;
            *) status=1 ;;
        esac
    done
}

for package in torch triton; do
    if ! has "$package"; then
        echo "skipped: $PYTHON has no working $package; install it, or name another interpreter: make PYTHON=... gpu"
        exit 0
    fi
done
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "skipped: torch sees no GPU here"
    exit 0
fi
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'

# The tests that say whether the numbers can be right come first; the others, which compile many small variants, take what is left.
status=0 training=0 feeding=0 tests=0
needs "the GPU tests" pytest && tests=1
[ $tests = 0 ] || run_tests tests/test_gpu.py
library="numpy pandas cv2 yaml safetensors torchvision rich"
needs "the benchmark of the training step" $library && training=1
needs "the benchmark of decoding and flow" $library av nvidia.dali && feeding=1
has matplotlib || echo "skipped: the plot of the benchmarks, $PYTHON has no working matplotlib"
for package in xformers liger_kernel; do
    has "$package" || echo "skipped: the peer $package, $PYTHON does not have it"
done
# A GPU that stopped answering ends the process with status 3, or the process dies: another one goes on with the next shape.
"$PYTHON" -m benchmarks --budget "$(share $((80 - 20 * training - 15 * feeding)))" --output "$RESULTS"
code=$? again=0
while [ $code -ge 3 ] && [ $code -ne 130 ] && [ $again -lt 3 ]; do
    again=$((again + 1))
    "$PYTHON" -m benchmarks --budget "$(share $((80 - 20 * training - 15 * feeding)))" --output "$RESULTS" --resume
    code=$?
done
[ $code = 0 ] || status=1
if [ $training = 1 ]; then
    "$PYTHON" -m benchmarks.training --seconds 3 --budget "$(share $((50 - 14 * feeding)))" --output "$RESULTS" || status=1
fi
if [ $feeding = 1 ]; then
    "$PYTHON" -m benchmarks.feeding --seconds 1 --budget "$(share 50)" --output "$RESULTS" || status=1
fi
[ $tests = 0 ] || run_tests $(grep -l 'mark\.gpu' tests/test_*.py | grep -v 'tests/test_gpu')
exit "$status"
