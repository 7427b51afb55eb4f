"""Compares runs: a matrix of variants that are trained one after the other, or existing runs."""
