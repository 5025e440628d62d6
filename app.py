"""The web page: `python app.py`, or `clear-dit app`."""

import sys

from clear_dit.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "app")
    main()
