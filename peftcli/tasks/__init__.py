"""The tasks a recipe can name: what each reads, trains, scores, generates and shows."""
