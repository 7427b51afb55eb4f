"""The memory and time forecast: arithmetic on the dimensions of a model, without heavy imports."""
