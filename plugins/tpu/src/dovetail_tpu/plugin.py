"""The entry point of dovetail-tpu. It registers nothing yet."""
