"""Tests that need a GPU, or the rehearsal on a CPU: a package, since other folders have tests of the same names."""
