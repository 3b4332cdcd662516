"""Schedules as pure functions from a Plan to a compute-only order."""
