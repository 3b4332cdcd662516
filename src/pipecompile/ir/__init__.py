"""What passes hand to one another: plain frozen dataclasses. No I/O, no processes."""
