"""Stylising pictures."""
