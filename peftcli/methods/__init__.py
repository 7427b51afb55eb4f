"""The table of PEFT methods: what each one is, takes and supports. Imports nothing heavy."""
