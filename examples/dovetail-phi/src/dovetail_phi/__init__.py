"""Phi models for Dovetail."""
