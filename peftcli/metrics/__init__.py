"""Metrics: computes the numbers of `metrics.json` from predictions and labels."""
