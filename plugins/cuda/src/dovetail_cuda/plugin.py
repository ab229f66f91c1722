"""The entry point of dovetail-cuda. It registers nothing yet."""
