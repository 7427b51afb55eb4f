"""Files that the package ships: tiny:llama, the text it learned, and the tables of the quickstart."""
