"""The command line: `clear-dit COMMAND`, joined from the rooms' commands.

A command imports its work when it runs: `--help` loads neither torch nor diffusers.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from .app.commands import serve_app, serve_programs
from .bench.commands import bench
from .calibration.commands import calibrate
from .distillation.commands import distill, sample
from .errors import RequestError, first_line, is_out_of_memory
from .evaluation.commands import evaluation
from .generation.commands import generate
from .log_levels import quiet_chatter
from .malloc import keep_freed_memory
from .options import Json, fail, print_json
from .render.commands import render
from .versions import __version__

app: typer.Typer = typer.Typer(
    help="CLEAR: high-resolution images from diffusion transformers, in time linear in the pixels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables leave 24 columns of 80 to the help
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main() -> None:
    """Run the command line; a bad request is one line on standard error and status 2."""
    keep_freed_memory()
    quiet_chatter()
    handler = logging.StreamHandler()
    if not sys.stderr.isatty():  # in a pipe or a log only what is wrong
        handler.setLevel(logging.WARNING)
    form = "%(levelname)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler])
    logging.getLogger("clear_dit").setLevel(logging.INFO)
    try:
        app()
    except RequestError as error:
        fail(error, 2)
    except (OSError, FloatingPointError) as error:
        fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory: {first_line(error)}", 1)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"clear-dit {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None: ...


def doctor(
    check: Annotated[
        bool, typer.Option("--check", help="Also run every kernel that can run, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what can run on this machine, and why the rest cannot."""
    from tqdm import tqdm

    from .doctor import check as check_all
    from .doctor import examine, report, report_checks
    from .progress import bar_options

    found = examine()
    if not as_json:
        print(report(found), flush=True)
    checks = list(tqdm(check_all(), "checking", **bar_options())) if check else []
    if as_json:
        print_json(found | {"checks": checks} if check else found)
    elif check:
        print(f"\n{report_checks(checks)}")
    if any(row["wrong"] for row in checks):
        raise typer.Exit(1)


# In the order of `--help`, which puts groups last.
app.command()(generate)
app.command()(doctor)
app.command()(render)
app.command()(sample)
app.command()(distill)
app.command()(calibrate)
app.command("app")(serve_app)
app.command("serve")(serve_programs)
app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="evaluate")


if __name__ == "__main__":
    main()
