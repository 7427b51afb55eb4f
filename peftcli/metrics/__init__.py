"""Sums, answers and labels to the numbers of `metrics.json`."""
