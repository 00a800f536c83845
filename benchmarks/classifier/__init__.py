"""The classifier on real clips: accuracy beside baselines, and where the time of one answer goes."""
