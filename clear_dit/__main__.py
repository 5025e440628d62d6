"""`python -m clear_dit` is the command line."""

from .cli import main

main()
