"""Benchmarks: one runnable module a question, each with its own control in the same run."""
