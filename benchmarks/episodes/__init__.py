"""Thousands of episodes from a bank of features: ours, loops as the field writes them, and the floor.

python -m benchmarks.episodes --output benchmarks/results
"""
