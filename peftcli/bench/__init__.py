"""How fast this machine trains: the same rows with peftcli and with others, taking turns, at equal loss."""
