"""Benchmarks of the kernels against named peers; part of the source tree, not of an installation.

``python -m benchmarks`` (or ``amd-fast bench``) runs them, ``pytest benchmarks/`` profiles single calls with pytest-benchmark.
"""
