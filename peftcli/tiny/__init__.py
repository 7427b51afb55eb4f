"""Tiny models built on this machine: one really pretrained, some random, and stand-ins for real ones."""
