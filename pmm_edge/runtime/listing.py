"""What `pmm embed` reads: images in folders, lists and data sets, and images in tar files."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path, PurePath
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from pmm_edge.data.dataset import ReidDataset, is_dataset, no_images, read, walk_files, warn_ignored
from pmm_edge.errors import DataError
from pmm_edge.files import NOT_UTF8, decode_json
from pmm_edge.images import IMAGE_SUFFIXES
from pmm_edge.runtime.storage import Storage

_LABELS = "pids", "camids", "split"  # of a data set
MEMBER_LIMIT = 64 << 20  # bytes of one file in a tar file that are read into memory


@dataclass(frozen=True, eq=False)
class ImageList:
    """N image files to embed."""

    source: str  # `image`, `folder`, `list`, `paths`, or the layout of a data set
    paths: list[Path]
    names: list[str]  # the paths as they are stored: relative to the folder or data set, or the lines of a list
    labels: dict[str, NDArray[Any]] | None = None
    """Of a data set, (N,) each: `pids` (-1 is junk, 0 a distractor), `camids`, and `split`: query, gallery or train;
    `tracks`, the number of the tracklet, if it has tracklets; `frames` of pooled tracklets."""
    dataset: ReidDataset | None = None


def find_images(source: str | Path | Sequence[str | Path], layout: str | None = None) -> ImageList:
    """Find the images to embed, without opening them.

    `source` is an image; a folder, searched by `walk_files`; a data set (`layout`, if it is not recognized); a text
    file with one path per line, relative to its folder; or a sequence of paths. Raises DataError if it does not exist,
    cannot be read, or contains no images.
    """
    if not isinstance(source, str | Path):
        return ImageList("paths", [Path(path) for path in source], [str(path) for path in source])
    source, ignored = Path(source), Counter[str]()
    if layout or is_dataset(source):
        dataset = read(source, layout)
        splits = {name: dataset.splits[name] for name in ("query", "gallery", "train")}
        paths = [path for split in splits.values() for path in split.paths]
        labels = {name: np.concatenate([getattr(one, name) for one in splits.values()]) for name in ("pids", "camids")}
        labels["split"] = np.repeat(list(splits), [len(split) for split in splits.values()])
        tracks = [split.tracks for split in splits.values() if split.tracks is not None]
        if len(tracks) == len(splits):
            labels["tracks"] = np.concatenate(tracks)
        root = dataset.root.parent if dataset.root.is_file() else dataset.root
        names = [(path.relative_to(root) if path.is_relative_to(root) else path).as_posix() for path in paths]
        images, ignored = ImageList(dataset.layout, paths, names, labels, dataset), Counter(dataset.ignored)
    elif source.is_dir():
        paths = list(_files_below(source, ignored))
        images = ImageList("folder", paths, [path.relative_to(source).as_posix() for path in paths])
    elif source.suffix.lower() in IMAGE_SUFFIXES and source.is_file():
        images = ImageList("image", [source], [source.name])
    else:
        names = list(read_list(source))
        images = ImageList("list", [source.parent / name for name in names], names)
    if not images.paths:
        raise no_images(source, ignored)
    warn_ignored(source, ignored)
    return images


def _files_below(folder: Path, ignored: Counter[str], suffixes: Collection[str] = IMAGE_SUFFIXES) -> Iterator[Path]:
    try:
        yield from walk_files(folder, True, ignored, suffixes)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}", "Check its permissions") from error


def read_list(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with one image path per line; raise DataError if it is none."""
    problem = "is not a text file with one path per line" if path.exists() else "does not exist"
    wrong = DataError(f"{path} {problem}", "Name an image, a folder, a data set or a list of paths")
    if not path.is_file():  # reading a pipe would block
        raise wrong
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
            for line in lines:
                name = line.strip()
                # Names that are not UTF-8 must exist, or this is not a text file.
                if "\0" in line or (NOT_UTF8.search(name) and not os.path.lexists(path.parent / name)):
                    raise wrong
                if name:
                    yield name
    except OSError as error:
        raise wrong from error


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


Number = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # int64, as it is stored


@dataclass(frozen=True)
class Labels:
    """The JSON file of an image in a tar file."""

    pid: Number | None = None
    camid: Number | None = None
    split: str | None = None


class ImageListing:
    """The images of a source, cut into shards; it is read again for each pass, so that no list is kept in memory."""

    def __init__(self, source: str | Path | Sequence[str | Path], layout: str | None, shard_rows: int) -> None:
        self.source, self.layout, self.shard_rows = source, layout, shard_rows
        self.files = self.count = 0  # of the last complete pass
        self.storage = Storage.of(source) if isinstance(source, str | Path) else Storage(Path())
        self.digest = ""

    def shards(self) -> Iterator[list[Item]]:
        """Yield each shard: its images or its tar file; raise DataError if there are none."""
        self.files, number, shard = 0, 0, list[Item]()
        digest, ignored = hashlib.sha256(), Counter[str]()
        for item in self._items(ignored):
            in_tar = is_tar(item.path)
            size = self.storage.size(item.path) if in_tar else ""
            digest.update(os.fsencode(f"{item.name}\0{item.pid}\0{item.camid}\0{item.split}\0{size}\n"))
            if shard and (in_tar or len(shard) == self.shard_rows or is_tar(shard[0].path)):
                yield shard
                number, shard = number + 1, []
            shard.append(item._replace(shard=number))
            self.files += 1
        if not shard:
            raise no_images(Path(str(self.source)), ignored)
        yield shard
        if not self.count:  # it was not reported in an earlier pass
            warn_ignored(self.storage.root, ignored)
        self.count, self.digest = number + 1, digest.hexdigest()

    def _items(self, ignored: Counter[str]) -> Iterator[Item]:
        source, path, suffixes = self.source, self.storage.root, {*IMAGE_SUFFIXES, ".tar"}
        if self.storage.remote:
            for file in [path] if self.storage.size(path) is not None else self.storage.files(deep=True):
                if file.suffix.lower() in suffixes:
                    yield Item(file, file.relative_to(path).as_posix() if file != path else file.name)
            return
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        if not isinstance(source, str | Path) or self.layout or is_image or is_dataset(path):
            found = find_images(path if isinstance(source, str) else source, self.layout)
            columns = [found.labels[name].tolist() if found.labels else repeat(None) for name in _LABELS]
            yield from map(Item, found.paths, found.names, *columns)
        elif path.is_dir():
            for file in _files_below(path, ignored, suffixes):
                yield Item(file, file.relative_to(path).as_posix())
        elif is_tar(path) and path.is_file():
            yield Item(path, path.name)
        else:
            yield from (Item(path.parent / name, name) for name in read_list(path))


def is_tar(path: Path) -> bool:
    """Whether a file is named as a tar file of images."""
    return path.suffix.lower() == ".tar"


def unpacked(items: Iterable[Item], storage: Storage) -> Iterator[Item]:
    """Yield the images; a tar file is replaced by the images in it."""
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
                    label = replace(label, pid=msgspec.convert(int(content or b""), Number))
            except (DataError, ValueError, msgspec.ValidationError) as wrong:
                error = f"wrong labels in {member.name}: {wrong}"
        for member, content in images:
            problem = "" if problem == empty else problem
            too_large = "" if content is not None else f"it has {member.size:,} bytes, more than {MEMBER_LIMIT:,}"
            path, name = source.path / member.name, f"{source.name}/{member.name}"
            yield Item(path, name, label.pid, label.camid, label.split, source.shard, content, too_large or error)
    if problem:
        yield source._replace(error=problem)
