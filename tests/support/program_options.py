"""Commands as a shell or a manifest has them, read as the program reads them."""

import shlex

import typer

from clear_dit.cli import app

# How the program may be called, after a launcher and its options or alone.
_PROGRAMS = (["clear-dit"], ["-m", "clear_dit"])


def arguments_of(words):
    """What a command gives to clear-dit; None where it does not call it."""
    words = [str(word) for word in words]
    for program in _PROGRAMS:
        for start in range(len(words) - len(program) + 1):
            if words[start : start + len(program)] == program:
                return words[start + len(program) :]
    return None


def parse(arguments):
    """Read arguments as the program would, and run nothing.

    Returns:
        The command's name and its parameters.

    Raises:
        click.UsageError: there is no such command or option, or a value is not of its type.
    """
    program = typer.main.get_command(app)
    context = program.make_context("clear-dit", list(arguments), resilient_parsing=False)
    path = []
    while hasattr(program, "commands"):
        rest = [*context._protected_args, *context.args]
        name, program, rest = program.resolve_command(context, rest)
        path.append(name)
        context = program.make_context(name, rest, parent=context)
    return " ".join(path), context.params


def shell_commands(text):
    """The commands of a shell text, as words; lines that go on are joined, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words
