"""How Sphinx makes the site: `python -m sphinx -W docs site`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "clear-dit"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "clear-dit"
html_favicon = "images/favicon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 3

# Docstrings are plain text in which `this` is code.
default_role = "literal"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
# "height, width: in pixels" stands for two.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]


def print_commands(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the reference of every command where command-line.md asks for it, from the program."""
    arguments = ["typer", "clear_dit.cli", "utils", "docs", "--name", "clear-dit"]
    if page == "command-line":
        printed = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE
        ).stdout.decode()
        commands = printed[printed.index("\n## ") :]
        source[0] = source[0].replace("<!-- commands -->", commands)


def setup(app: Sphinx) -> None:
    app.connect("source-read", print_commands)
