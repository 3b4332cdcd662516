"""Draws a compiled model and its timelines: HTML, JSON, Chrome trace, terminal.

Everything starts from :func:`~pipecompile.report.summary.summarise`, which holds what was predicted
beside what was measured.
"""
