"""The table of PEFT methods: what each is, takes and supports. Nothing heavy is imported."""
