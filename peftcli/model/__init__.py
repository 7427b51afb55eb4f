"""Code that loads weights or uses the device."""
