"""A Dovetail plugin of the first version, kept as it was."""
