"""The project's description on a package index: README.md, with links that work there.

An index shows the README without the files beside it, so its relative links must become absolute.
The address is `Repository` under [project.urls] in pyproject.toml; as long as none is stated there,
links stay as they are. pyproject.toml holds everything else.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


def description() -> str:
    """README.md; links and pictures absolute if pyproject.toml states the repository's address."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    stated = re.search(r'^\[project\.urls\]\n(?:[^\[].*\n)*?Repository = "([^"]+)"', project, re.M)
    if stated is None:
        return text
    address = stated[1].rstrip("/")

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}{link[2]}({address}/{kind}/main/{link[3]})"

    return LINK.sub(absolute, text)


setup(long_description=description(), long_description_content_type="text/markdown")
