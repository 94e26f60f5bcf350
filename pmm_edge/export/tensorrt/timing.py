"""The timing cache: what TensorRT measured of each kind of layer, kept for the next build."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from pmm_edge.errors import OutputError
from pmm_edge.files import cache_folder, written_whole

_DIGEST = hashlib.sha256().digest_size


def cache_file(tensorrt: str, gpu: str) -> Path | None:
    """Where the timings of this TensorRT on this GPU are kept: they hold for no other. None without a cache folder."""
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{tensorrt} {gpu}").strip("-")
    try:
        return cache_folder() / "tensorrt" / f"{key}.timing"
    except OutputError:  # as of one that cannot be written: it costs time
        return None


def attach(config: Any, file: Path) -> None:
    """Have a build use the kept timings and add to them; what cannot be used is as if it were not there."""
    cache = config.create_timing_cache(_kept(file))
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep(config: Any, file: Path) -> None:
    """Write the timings of a build, whole. The engine is what counts: a folder that takes no cache is no error."""
    timings = bytes(config.get_timing_cache().serialize())
    with suppress(OutputError), written_whole(file) as temporary:
        temporary.write_bytes(hashlib.sha256(timings).digest() + timings)


def _kept(file: Path) -> bytes:
    """Kept timings; nothing where there are none or the disk garbled them, which TensorRT need not notice."""
    try:
        content = file.read_bytes()
    except OSError:
        return b""
    digest, timings = content[:_DIGEST], content[_DIGEST:]
    return timings if hashlib.sha256(timings).digest() == digest else b""
