"""Evaluation: feature bank, episodic protocol, metrics and statistics, baselines, report."""
