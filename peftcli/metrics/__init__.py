"""Metrics: predictions and labels to the numbers of `metrics.json`."""
