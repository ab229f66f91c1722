"""A plugin for Dovetail."""
