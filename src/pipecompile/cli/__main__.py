"""``python -m pipecompile.cli``."""

from pipecompile.cli import main

main()
