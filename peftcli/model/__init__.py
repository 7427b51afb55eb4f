"""Everything that touches weights or the device."""
