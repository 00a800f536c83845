#!/bin/sh
# GPU tests, then benchmarks, from the source tree: needs a GPU, torch, triton and pytest in $PYTHON, and no installation.
# What cannot run here is skipped with a line that says why. Called by `make gpu`.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
PYTHONPATH=.
export PYTHONPATH

for package in torch triton pytest; do
    if ! "$PYTHON" -c "import $package" 2>/dev/null; then
        echo "skipped: $PYTHON has no working $package; install it, or name another interpreter: make PYTHON=... gpu"
        exit 0
    fi
done
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "skipped: torch sees no GPU here"
    exit 0
fi
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'

# Only files with GPU tests are collected: the others import packages that this machine need not have.
files=$(grep -l 'mark\.gpu' tests/test_*.py)
if [ -n "$files" ]; then
    # Word splitting is wanted: one argument per file.
    # shellcheck disable=SC2086
    "$PYTHON" -m pytest -m gpu $files || exit 1
else
    echo "skipped: no test is marked gpu"
fi
