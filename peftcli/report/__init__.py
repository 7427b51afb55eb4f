"""The report of a run: what its JSON files say, written for a person as Markdown and as one HTML page."""
