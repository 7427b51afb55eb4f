"""Training: TRL's loop, watched, stoppable, and written down."""
