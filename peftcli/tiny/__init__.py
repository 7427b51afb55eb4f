"""Tiny models: one that is pretrained and shipped, some with random weights, and stand-ins for real models."""
