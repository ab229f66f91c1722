"""The entry point of dovetail-quant. It registers nothing yet."""
