"""PEFT configurations of the methods, and our own tuners for methods that PEFT does not have."""
