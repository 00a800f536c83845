"""Whether reading videos keeps up with training: clips decoded and flow computed per second, and how long a training step waits for data.

python -m benchmarks.feeding --output benchmarks/results
"""
