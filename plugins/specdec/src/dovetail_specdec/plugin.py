"""The entry point of dovetail-specdec. It registers nothing yet: the name is reserved and the package installs cleanly."""
