"""Speculation for Dovetail from a suffix automaton of each request."""
