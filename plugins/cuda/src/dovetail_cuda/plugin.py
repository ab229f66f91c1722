"""The entry point of dovetail-cuda. It registers nothing yet: the name is reserved and the package installs cleanly."""
