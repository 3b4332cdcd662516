"""What users hold, one file a mode, and the drivers that make it: they put the passes in order."""
