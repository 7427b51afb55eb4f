"""Where rows come from: files of many kinds, the Hub and databases, each read in a stream."""
