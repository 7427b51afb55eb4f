"""How fast this machine trains: peftcli and other tools on the same rows, interleaved, at equal loss."""
