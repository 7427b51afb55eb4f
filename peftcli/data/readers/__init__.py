"""Readers: files of many formats, the Hub and databases, each read as a stream."""
