"""What a probe says: a name, a value, whether that is good, and what to do where it is not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pmm_edge.files import with_tilde

_FOLDERS = re.compile(r"(?<![\w~.:/…])/(?:[^\s:;,'\"()|/]+/)+")
"""The folders of an absolute path, but not of a URL."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    value: str
    good: bool | None = None
    """None for a mere fact."""
    remedy: str = ""


@dataclass(frozen=True)
class Section:
    """Findings about one thing."""

    title: str
    findings: list[Finding]


def shareable(text: str) -> str:
    """Text in one line, to be shown to others: the home folder is `~`, of other paths only the file's name stays."""
    return " ".join(_FOLDERS.sub("…/", with_tilde(text)).split())
