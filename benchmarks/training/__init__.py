"""A training step: eager float32 as the field writes it, ours as ``amd_fast.train`` runs it, and ours without one thing at a time.

python -m benchmarks.training --output benchmarks/results
"""
