"""``dovetail doctor``: is everything here in order, and if not, what to do."""
