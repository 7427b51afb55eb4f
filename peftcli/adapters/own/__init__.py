"""Tuners that PEFT does not have, behind PEFT's own interface."""
