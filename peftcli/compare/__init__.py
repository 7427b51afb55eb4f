"""Compares several runs: a matrix of variants trained one by one, or existing runs."""
