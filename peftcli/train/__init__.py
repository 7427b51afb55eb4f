"""Training: TRL's loop with checkpoints, early stops and a log."""
