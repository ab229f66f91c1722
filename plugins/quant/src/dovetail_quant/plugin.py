"""The entry point of dovetail-quant. It registers nothing yet: the name is reserved and the package installs cleanly."""
