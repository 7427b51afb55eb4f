"""PEFT configurations of the methods, and the tuners that PEFT does not have."""
