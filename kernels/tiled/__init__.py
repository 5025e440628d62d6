"""Local attention band by band, in tiles: linear in the tokens on any device."""
