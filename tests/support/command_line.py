"""`clear-dit` in this process."""

import sys

import pytest

from clear_dit import cli


def run(*arguments) -> int:
    """Run `clear-dit` with arguments, any that have a text; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clear-dit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
    return exit_info.value.code or 0
