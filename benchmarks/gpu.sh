#!/bin/sh
# GPU tests, then benchmarks of the kernels, of the training step, and of decoding and flow, from the source tree: needs a GPU, torch,
# triton and pytest in $PYTHON, and no installation. What cannot run here is skipped with a line that says why. Called by `make gpu`.
# RESULTS names another folder for the numbers, BUDGET the seconds for all of it: what the tests leave is shared out among the benchmarks.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
BUDGET=${BUDGET:-540}
PYTHONPATH=.
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

for package in torch triton pytest; do
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

# Only files with GPU tests are collected, and of these only what can be imported: they may need packages that are not here.
status=0
for file in $(grep -l 'mark\.gpu' tests/test_*.py); do
    if ! problem=$("$PYTHON" -m pytest -q --collect-only -m gpu "$file" 2>&1) && echo "$problem" | grep -q ModuleNotFoundError; then
        echo "skipped: $file: $(echo "$problem" | grep -m 1 -o "No module named.*")"
        continue
    fi
    "$PYTHON" -m pytest -q -m gpu "$file" || { [ $? -eq 5 ] || status=1; }
done

# The parts of what is left: kernels, then the step, then decoding and flow, which alone ends at its time.
training=0 feeding=0
library="rich numpy pandas cv2 yaml safetensors torchvision"
needs "the benchmark of the training step" $library && training=1
needs "the benchmark of decoding and flow" $library av nvidia.dali && feeding=1
if needs "the kernel benchmarks" rich numpy; then
    has matplotlib || echo "skipped: the plot of the benchmarks, $PYTHON has no working matplotlib"
    for package in xformers liger_kernel; do
        has "$package" || echo "skipped: the peer $package, $PYTHON does not have it"
    done
    "$PYTHON" -m benchmarks --budget "$(share $((100 - 35 * training - 30 * feeding)))" --output "$RESULTS" || status=1
fi
if [ $training = 1 ]; then
    "$PYTHON" -m benchmarks.training --seconds 3 --budget "$(share $((100 - 50 * feeding)))" --output "$RESULTS" || status=1
fi
if [ $feeding = 1 ]; then
    "$PYTHON" -m benchmarks.feeding --seconds 1 --budget "$(share 100)" --output "$RESULTS" || status=1
fi
exit "$status"
