"""The command line: parse, call, print."""

import os

try:
    from rpb_retrofit.cli.main import main
except KeyboardInterrupt:  # while the first lines of the program are being read
    os.write(2, b"interrupted\n")
    raise SystemExit(130) from None

__all__ = ["main"]
