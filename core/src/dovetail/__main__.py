"""``python -m dovetail`` is the same as ``dovetail``."""

from dovetail.cli.main import main

main()
