"""The report of a run, built from its JSON files, as Markdown and as one HTML page."""
