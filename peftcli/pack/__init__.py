"""Packs a run into one file for another machine, without anything that tells where it was made."""
