"""A folder on this machine or in object storage, such as `s3://bucket/prefix`, through the file systems of pyarrow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pmm_edge.errors import DataError, OutputError, PmmError, absent, install
from pmm_edge.files import written_whole


@dataclass(frozen=True)
class Storage:
    """Where files are: `remote` is a pyarrow file system, or None for local paths."""

    root: Path  # in a remote file system: bucket and prefix
    remote: Any = None

    @staticmethod
    def of(location: str | Path) -> Storage:
        """Open a path or URL; raise PmmError if no file system of pyarrow knows it, or its bucket cannot be found."""
        if "://" not in (text := str(location)):
            return Storage(Path(location))
        require_pyarrow(text)
        from pyarrow.fs import FileSystem

        try:
            remote, path = FileSystem.from_uri(text)
        except (OSError, ValueError, NotImplementedError) as error:
            raise PmmError(f"cannot open {text}: {error}", "Name a folder, s3://BUCKET/PREFIX or gs://...") from error
        return Storage(Path(path), None if remote.type_name == "local" else remote)

    def absolute(self) -> Storage:
        """The same place for processes with another current folder."""
        return self if self.remote else Storage(self.root.absolute())

    def open(self, path: Path) -> BinaryIO:
        """Open a file to read; OSError if that is impossible."""
        return path.open("rb") if self.remote is None else self.remote.open_input_file(path.as_posix())

    def check(self, error: OSError, path: Path) -> None:
        """Raise DataError if an error is that of a network, which says nothing about the file and may pass."""
        if self.remote and not isinstance(error, FileNotFoundError):
            problem = f"cannot read {path}: {str(error).splitlines()[0]}"
            raise DataError(problem, "Repeat the command; finished shards are kept") from error

    def size(self, path: Path) -> int | None:
        """Size of a file in bytes, or None if there is none."""
        if self.remote is None:
            return path.stat().st_size if path.is_file() else None
        return self.remote.get_file_info(path.as_posix()).size

    def files(self, deep: bool) -> list[Path]:
        """The files of the folder, sorted, without names that start with a dot; none if it does not exist."""
        if self.remote is None:
            found = [path for path in (self.root.rglob("*") if deep else self.root.glob("*")) if path.is_file()]
        else:
            from pyarrow import fs

            selector = fs.FileSelector(self.root.as_posix(), allow_not_found=True, recursive=deep)
            found = [Path(info.path) for info in self.remote.get_file_info(selector) if info.is_file]
        return sorted(path for path in found if not path.name.startswith("."))

    @contextmanager
    def written(self, path: Path) -> Iterator[BinaryIO]:
        """Write a file as a whole: yield a temporary one or, for object storage, a buffer that is sent at the end."""
        if self.remote is None:
            with written_whole(path) as temporary, temporary.open("wb") as file:
                yield file
            return
        buffer = io.BytesIO()
        yield buffer
        try:
            self.remote.create_dir(path.parent.as_posix(), recursive=True)
            with self.remote.open_output_stream(path.as_posix()) as file:
                file.write(buffer.getbuffer())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error}", "Check the bucket and its permissions") from error


def require_pyarrow(location: str | Path) -> None:
    """Raise PmmError if pyarrow, which a URL or Parquet file requires, is not installed."""
    if missing := absent("pyarrow"):
        raise PmmError(f"{location} requires pyarrow: {missing}", f"{install('parquet')}, or use local .npz files")
