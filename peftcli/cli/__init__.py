"""The commands: parse options, call the packages below, print the results."""
