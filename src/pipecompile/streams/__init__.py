"""Between the caller and the runtime: sources, admission, accounting, results in order."""
