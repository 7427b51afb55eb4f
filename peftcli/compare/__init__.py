"""Several runs held against each other: a matrix of variants trained one by one, or runs that are there already."""
