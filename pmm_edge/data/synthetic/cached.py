"""The built-in data set: drawn once for a user, then found again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from pmm_edge.data.synthetic.dataset import VERSION, SyntheticConfig, make_synthetic
from pmm_edge.errors import OutputError
from pmm_edge.files import cache_folder
from pmm_edge.progress import Report, silent


def cached_synthetic(config: SyntheticConfig | None = None, *, report: Report = silent) -> Path:
    """The folder of a synthetic data set under the user's cache folder, drawn where it is not there yet.

    Raises:
        OutputError: it cannot be written.
    """
    config = config or SyntheticConfig()
    recipe = json.dumps([VERSION, asdict(config)])
    folder = cache_folder() / f"synthetic-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        try:
            make_synthetic(folder, config, report=report)
        except OutputError:
            if not folder.exists():  # else another process finished it first, with the same bytes
                raise
    return folder
