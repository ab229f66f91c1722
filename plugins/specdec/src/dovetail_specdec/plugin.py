"""The entry point of dovetail-specdec. It registers nothing yet."""
