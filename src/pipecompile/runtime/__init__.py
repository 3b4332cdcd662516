"""Runs a Package: worker processes, channels, the inline executor."""
