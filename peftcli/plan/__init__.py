"""From recipe and machine to Plan: what will happen, each choice with its reason."""
