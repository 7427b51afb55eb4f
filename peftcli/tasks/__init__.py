"""The tasks of a recipe: the data, training, metrics, outputs and titles of each."""
