"""``dovetail bench``: measurements of this machine, offline and over HTTP."""
