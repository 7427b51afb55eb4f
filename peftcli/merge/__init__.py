"""Merging: folds an adapter into its base tensor by tensor and verifies that the outputs agree."""
