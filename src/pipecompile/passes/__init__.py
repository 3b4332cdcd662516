"""Compiler passes, one a file: IR in, IR out."""
