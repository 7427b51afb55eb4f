"""All that touches weights or the device."""
