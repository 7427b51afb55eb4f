"""Merging: folds an adapter into its base model tensor by tensor, and verifies that the outputs agree."""
