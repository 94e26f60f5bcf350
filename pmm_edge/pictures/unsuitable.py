"""The error of a kind of picture that this model or these images do not allow, where another kind can be drawn."""

from __future__ import annotations

from pmm_edge.errors import PmmError


class UnsuitableError(PmmError):
    """Asked for every kind of picture, those that raise this are left out and the reason is told."""
