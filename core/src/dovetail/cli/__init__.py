"""The command line. Every command lives in its own module, imported when it is called."""
