"""Where the command line begins."""

import sys


def main() -> None:
    """``flyweight``. Ctrl-C while the command line is imported ends it as it does afterwards."""
    try:
        from .cli import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()
