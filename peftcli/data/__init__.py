"""What will be trained: sources, joins, formats, splits and tokens, with every row counted."""
