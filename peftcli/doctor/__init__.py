"""What this machine can do, in general or for one recipe: one verdict for each question."""
