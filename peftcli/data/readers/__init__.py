"""Streaming readers for files of many formats, the Hub and databases."""
