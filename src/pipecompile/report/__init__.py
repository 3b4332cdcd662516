"""Draws plans and timelines."""
