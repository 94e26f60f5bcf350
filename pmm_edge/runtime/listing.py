"""What `pmm embed` reads into shards: images in folders, lists and data sets, and images in tar files."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path, PurePath
from typing import NamedTuple

from pmm_edge.data.dataset import is_dataset, no_images, walk_files, warn_ignored
from pmm_edge.errors import DataError
from pmm_edge.files import decode_json
from pmm_edge.images import IMAGE_SUFFIXES
from pmm_edge.runtime.embed_files import find_images, read_list
from pmm_edge.runtime.storage import Storage

_LABELS = "pids", "camids", "split"  # of a data set
MEMBER_LIMIT = 64 << 20  # bytes of one file in a tar file that are read into memory


class Item(NamedTuple):
    """An image to embed, or a tar file of images."""

    path: Path
    name: str  # as it is stored
    pid: int | None = None
    camid: int | None = None
    split: str | None = None
    shard: int = 0
    content: bytes | None = None  # of an image in a tar file
    error: str = ""  # why it cannot be read


@dataclass(frozen=True)
class Labels:
    """The JSON file of an image in a tar file."""

    pid: int | None = None
    camid: int | None = None
    split: str | None = None


class ImageListing:
    """The images of a source, cut into shards; it is read again for each pass, so that no list is kept in memory."""

    def __init__(self, source: str | Path | Sequence[str | Path], layout: str | None, shard_rows: int) -> None:
        self.source, self.layout, self.shard_rows = source, layout, shard_rows
        self.files = self.count = 0  # of the last complete pass
        self.storage = Storage.of(source) if isinstance(source, str | Path) else Storage(Path())
        self.digest = ""

    def shards(self) -> Iterator[list[Item]]:
        """Yield each shard: its images or its tar file."""
        self.files, number, shard, digest = 0, 0, list[Item](), hashlib.sha256()
        for item in self._items():
            in_tar = is_tar(item.path)
            size = self.storage.size(item.path) if in_tar else ""
            digest.update(os.fsencode(f"{item.name}\0{item.pid}\0{item.camid}\0{item.split}\0{size}\n"))
            if shard and (in_tar or len(shard) == self.shard_rows or is_tar(shard[0].path)):
                yield shard
                number, shard = number + 1, []
            shard.append(item._replace(shard=number))
            self.files += 1
        if shard:
            yield shard
        self.count, self.digest = number + 1, digest.hexdigest()

    def _items(self) -> Iterator[Item]:
        source, path, ignored, empty = self.source, self.storage.root, Counter[str](), True
        if self.storage.remote:
            files = [path] if self.storage.size(path) is not None else self.storage.files(deep=True)
            files = [file for file in files if file.suffix.lower() in (*IMAGE_SUFFIXES, ".tar")]
            if not files:
                raise no_images(Path(str(source)), ignored)
            yield from (Item(file, file.relative_to(path).as_posix() if file != path else file.name) for file in files)
            return
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        if not isinstance(source, str | Path) or self.layout or is_image or is_dataset(path):
            found = find_images(path if isinstance(source, str) else source, self.layout)
            columns = [found.labels[name].tolist() if found.labels else repeat(None) for name in _LABELS]
            yield from map(Item, found.paths, found.names, *columns)
        elif path.is_dir():
            for file in walk_files(path, True, ignored, {*IMAGE_SUFFIXES, ".tar"}):
                empty = False
                yield Item(file, file.relative_to(path).as_posix())
            if empty:
                raise no_images(path, ignored)
            warn_ignored(path, ignored)
        elif is_tar(path) and path.is_file():
            yield Item(path, path.name)
        else:
            yield from (Item(path.parent / name, name) for name in read_list(path))


def is_tar(path: Path) -> bool:
    """Whether a file is named as a tar file of images."""
    return path.suffix.lower() == ".tar"


def unpacked(items: Iterable[Item], storage: Storage) -> Iterator[Item]:
    """Yield images, in place of a tar file those in it."""
    for item in items:
        yield from _read_tar(item, storage) if is_tar(item.path) else (item,)


def _read_tar(source: Item, storage: Storage) -> Iterator[Item]:
    """Yield the images of a tar file in WebDataset naming, without extracting it; damage becomes an item with an error.

    Neighbors with the same name up to the first dot of the base name belong together.
    """
    problem = empty = "the tar file contains no images"

    def members() -> Iterator[tuple[str, str, tarfile.TarInfo, bytes | None]]:
        nonlocal problem
        try:
            with storage.open(source.path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every member
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.lower().partition(".")
                    if member.isreg() and key:
                        file = tar.extractfile(member) if member.size <= MEMBER_LIMIT else None
                        yield f"{folder}/{key}", PurePath(f"_.{suffix}").suffix, member, file.read() if file else None
                stream.seek(tar.offset)  # tarfile takes a damaged header for the end of the file
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no end, or a damaged header, at byte {tar.offset:,}")
        except (tarfile.TarError, OSError, EOFError, ValueError) as damage:
            if isinstance(damage, OSError):
                storage.check(damage, source.path)
            problem = f"the tar file is damaged, and its images after the damage are missing: {damage}"

    for _, sample in groupby(members(), key=itemgetter(0)):
        images, label, error = [], Labels(source.pid, source.camid, source.split), ""
        for _, suffix, member, content in sample:
            try:
                if suffix in IMAGE_SUFFIXES:
                    images.append((member, content))
                elif suffix == ".json":
                    label = decode_json(Labels, content or b"", member.name)
                elif suffix == ".cls":
                    label = replace(label, pid=int(content or b""))
            except (DataError, ValueError) as wrong:
                error = f"wrong labels in {member.name}: {wrong}"
        for member, content in images:
            problem = "" if problem == empty else problem
            if content is None:
                error = f"it has {member.size:,} bytes, more than {MEMBER_LIMIT:,}"
            path, name = source.path / member.name, f"{source.name}/{member.name}"
            yield Item(path, name, label.pid, label.camid, label.split, source.shard, content, error)
    if problem:
        yield source._replace(error=problem)
