"""Discrete-event run of a Program: when would each device do what?"""

from pipecompile.simulate.clock import clock_table, ticks
from pipecompile.simulate.run import simulate

__all__ = ["clock_table", "simulate", "ticks"]
