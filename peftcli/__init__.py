"""peftcli fine-tunes a language model from one recipe, and says what it did in numbers."""
