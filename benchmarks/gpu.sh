#!/bin/sh
# GPU tests, then the kernel benchmarks, from the source tree: needs a GPU, torch, triton and pytest in $PYTHON, and no installation.
# What cannot run here is skipped with a line that says why. Called by `make gpu`; takes under ten minutes.
# RESULTS names another folder for the numbers, BUDGET the seconds for the benchmarks.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
BUDGET=${BUDGET:-330}
PYTHONPATH=.
export PYTHONPATH

has() {
    "$PYTHON" -c "import $1" 2>/dev/null
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

for package in rich numpy; do
    if ! has "$package"; then
        echo "skipped: the kernel benchmarks, $PYTHON has no working $package"
        exit "$status"
    fi
done
has matplotlib || echo "skipped: the plot of the benchmarks, $PYTHON has no working matplotlib"
for package in xformers liger_kernel; do
    has "$package" || echo "skipped: the peer $package, $PYTHON does not have it"
done
"$PYTHON" -m benchmarks --budget "$BUDGET" --output "$RESULTS" || status=1

for package in nvidia.dali av; do
    has "$package" || echo "skipped: benchmarks of video decoding with $package, $PYTHON does not have it"
done
exit "$status"
