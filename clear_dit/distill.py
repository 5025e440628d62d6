"""`accelerate launch -m clear_dit.distill`: the command `clear-dit distill`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "distill")
    main()
