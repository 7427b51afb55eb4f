"""Checks of this machine, in general or for one recipe."""
