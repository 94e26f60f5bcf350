"""One SHA-256 for many images: whether two benches saw the same data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from pmm_edge.errors import DataError
from pmm_edge.files import sha256
from pmm_edge.progress import Report, silent

_REPORTED_EVERY = 256


def data_sha256(paths: Sequence[Path], root: Path, report: Report = silent) -> str:
    """The SHA-256 over the names and contents of images, in their order.

    Names are relative to `root`, so that a data set that was moved or copied keeps its hash.

    Raises:
        DataError: an image cannot be read.
    """
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        if number % _REPORTED_EVERY == 0:
            report("hashing the data", number, len(paths))
        try:
            line = f"{Path(os.path.relpath(path, root)).as_posix()}\0{sha256(path)}\n"
        except OSError as error:
            raise DataError(f"cannot hash {path} ({error})", "Check the data set with pmm data --verify") from error
        digest.update(line.encode("utf-8", "surrogateescape"))
    report("hashing the data", len(paths), len(paths))
    return digest.hexdigest()
