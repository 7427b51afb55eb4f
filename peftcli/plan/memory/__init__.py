"""The forecast of memory and time: arithmetic on the dimensions of a model, nothing heavy."""
