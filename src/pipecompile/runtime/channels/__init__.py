"""How a device talks to another: one protocol, several carriers."""
