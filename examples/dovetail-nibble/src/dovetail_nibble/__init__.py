"""4-bit weights for Dovetail."""
