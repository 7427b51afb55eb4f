"""The table of the methods: what each is, takes and can do. Nothing heavy is imported."""
