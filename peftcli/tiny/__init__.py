"""Tiny models: one pretrained and shipped, some random, and stand-ins for real ones."""
