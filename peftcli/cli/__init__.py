"""The commands: read flags, call the rooms below, print."""
