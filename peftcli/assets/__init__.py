"""Files that the package ships: the text that tiny:llama learns, and the tables of the quickstart."""
