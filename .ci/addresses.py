"""Make the checkout one of a repository with an address, for a release: `addresses.py URL TAG`.

PyPI shows README.md and has no files beside it: links in it to the repository's files become
addresses of the tag, and pyproject.toml gets `project.urls`. What is built from that is the same
wherever it is built.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def with_addresses(markdown: str, repository: str, tag: str) -> str:
    """Markdown whose links to files of the repository are addresses; images are raw files."""

    def address(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/{tag}/{target})"

    return LINK.sub(address, markdown)


def urls(repository: str, tag: str) -> str:
    """The table `project.urls` of pyproject.toml."""
    return (
        "\n[project.urls]\n"
        f'Documentation = "{repository}/blob/{tag}/docs/index.md"\n'
        f'Source = "{repository}"\n'
        f'Changelog = "{repository}/blob/{tag}/CHANGELOG.md"\n'
        f'Issues = "{repository}/issues"\n'
        f'Security = "{repository}/security/policy"\n'
    )


def main(root: Path, repository: str, tag: str) -> None:
    pyproject, readme = root / "pyproject.toml", root / "README.md"
    project = tomllib.loads(pyproject.read_text())["project"]
    if tag != f"v{project['version']}":
        raise SystemExit(
            f"addresses: the tag must be v and the version in pyproject.toml, "
            f"v{project['version']}, got {tag}"
        )
    if "urls" in project:
        raise SystemExit("addresses: pyproject.toml has project.urls already")
    readme.write_text(with_addresses(readme.read_text(), repository, tag))
    with pyproject.open("a") as file:
        file.write(urls(repository, tag))


if __name__ == "__main__":
    main(Path.cwd(), *sys.argv[1:])
