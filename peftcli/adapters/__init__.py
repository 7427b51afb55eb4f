"""What a method's name stands for in PEFT: its configuration, and the tuners that PEFT does not have."""
