"""The ``pipecompile`` command, a file a subcommand.

Nothing here imports torch before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings

import click

from pipecompile.cli.compile import compile_command
from pipecompile.cli.console import fail, show_warning
from pipecompile.cli.plan import plan_command
from pipecompile.cli.report import report_command
from pipecompile.cli.run import run_command
from pipecompile.errors import PipecompileError

_HELP = """Turn a PyTorch model into a pipeline that runs on several cores at once.

\b
A first try, with a class Net in mynet.py:
  pipecompile plan mynet.py:Net --input 1x3x224x224       would it be faster, and how?
  pipecompile compile mynet.py:Net --input 1x3x224x224    write Net.pipe, ready to run
  pipecompile run Net.pipe --input clip.mp4               stream a video through it
  pipecompile report Net.pipe --input clip.mp4 -o a.html  see where the time goes
"""


@click.group(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pipecompile", prog_name="pipecompile")
def cli() -> None:
    """See ``_HELP``."""


for command in (plan_command, compile_command, run_command, report_command):
    cli.add_command(command)


def main() -> None:
    """Entry point: errors of ours become one red line and exit status 1."""
    warnings.showwarning = show_warning
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PipecompileError as error:
        fail(str(error), 1)
    except BrokenPipeError:
        # Whoever read our output, such as head, has had enough; say nothing, and nothing more at exit.
        _nothing_more()
        sys.exit(1)
    except OSError as error:
        # Files are named by whoever writes them; what is left is standard output on a full disk.
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _nothing_more()
        fail(f"cannot write to standard output: {error.strerror}", 1)


def _nothing_more() -> None:
    """What standard output still holds is not written at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
