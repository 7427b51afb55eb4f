"""The recipe: from a YAML file to a checked, frozen object; light, `validate` never waits for torch."""
