"""Ordered temporal alignment of two frame sequences (OTAM)."""
