"""Training: TRL's loop with checkpoints, stops, and a log."""
