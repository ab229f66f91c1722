"""The entry point of dovetail-tpu. It registers nothing yet: the name is reserved and the package installs cleanly."""
