"""A gallery in a folder: append-only segments, a manifest that is replaced atomically, and a FAISS index.

    people/gallery.json         the manifest: model, distance, and the segments and the index that count
    people/lock                 held by the process that writes
    people/data/NAME.vectors    (rows, D) float32 or float16, memory-mapped
    people/data/NAME.rows       the labels of the rows, `ROW`
    people/data/NAME.sources    their sources, UTF-8, one after the other
    people/data/NAME.index      the FAISS index

What the manifest does not name does not exist: a process killed at any moment leaves the old state or the new one, and
the next writer removes the rest. A reader maps the files of its manifest when it is opened, and keeps them.
"""

import mmap
import os
import secrets
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from pmm_edge.console import Report
from pmm_edge.errors import DataError, OutputError, PmmError, absent, install
from pmm_edge.files import decode_sealed, encode_sealed, written_whole
from pmm_edge.gallery.gallery import FLAT_ROWS, Gallery, GalleryInfo, Hit, StoredType, Where
from pmm_edge.gallery.index import IndexFacts, build_index, nearest_rows, search_index
from pmm_edge.gallery.inputs import EmbeddingModel, Rows, local_time
from pmm_edge.retrieval.distances import pairwise_distances
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import Distance

ROW = np.dtype([("number", "<u8"), ("id", "<u8"), ("pid", "<i8"), ("time", "<f8"), ("end", "<u8"), ("camera", "<i4")])
"""`number` grows with every row and never changes; `end` is where the source of the row ends."""
SEGMENT_ROWS = 65_536
CHUNK = 8192
MARGIN = 10
"""More rows than wanted are compared exactly, because float32 distances may swap neighbors."""
TAIL = 10_000
"""From this number of new rows on, or 1 % of all, rows are added to the index; until then a search compares each."""
DAMAGED = "Restore it from a backup, or create the gallery again"
SUFFIXES = (".vectors", ".rows", ".sources")


@dataclass(frozen=True)
class Segment:
    """Rows in three files."""

    name: str
    rows: int = 0
    text: int = 0  # bytes of the sources
    checksums: tuple[int, int, int] = (0, 0, 0)  # CRC-32 of vectors, rows and sources


@dataclass(frozen=True)
class Manifest:
    """The model of a gallery, and the files that belong to it."""

    model: EmbeddingModel
    distance: Distance
    dtype: StoredType
    cameras: tuple[str, ...] = ("",)
    next_number: int = 0
    segments: tuple[Segment, ...] = ()
    index: IndexFacts | None = None
    schema: Literal[1] = 1


class View:
    """The files of one manifest, mapped into memory."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder / "data", manifest
        size, stored = manifest.model.spec.embedding_size, np.dtype(manifest.dtype)
        self.maps, self.vectors, self.texts, self.files = [], [], [], list[int]()
        tables = [np.empty(0, ROW)]
        for segment in manifest.segments:
            sizes = (segment.rows * size * stored.itemsize, segment.rows * ROW.itemsize, segment.text)
            paths = [self.folder / f"{segment.name}{suffix}" for suffix in SUFFIXES]
            vectors, rows, text = map(_map, paths, sizes)
            for path, content, checksum in zip(paths[1:], (rows, text), segment.checksums[1:], strict=True):
                _verify(path, content, checksum)
            self.maps.append(vectors)
            self.files.append(os.open(paths[0], os.O_RDONLY))
            weakref.finalize(self, os.close, self.files[-1])
            self.vectors.append(np.frombuffer(vectors, stored).reshape(segment.rows, size))
            self.texts.append(text)
            tables.append(np.frombuffer(rows, ROW))
        self.table = np.concatenate(tables)
        self.pids, self.times, self.cameras = (self.table[name].copy() for name in ("pid", "time", "camera"))
        self.numbers = self.table["number"].astype(np.int64)
        self.starts = np.cumsum([0, *(segment.rows for segment in manifest.segments)])
        self._index = _map(self.folder / f"{manifest.index.name}.index") if manifest.index else b""

    def __len__(self) -> int:
        return len(self.table)

    def load_index(self) -> Any:
        """Read the index, to change it."""
        import faiss

        assert self.manifest.index
        _verify(self.folder / f"{self.manifest.index.name}.index", self._index, self.manifest.index.checksum)
        return faiss.deserialize_index(np.frombuffer(self._index, np.uint8))

    index = cached_property(load_index)  # to search it

    def take(self, positions: NDArray[np.int64]) -> Embeddings:
        """The vectors at one or more ascending positions: (N,) -> (N, D) float32.

        They are read, not mapped: the kernel maps up to 2 MB around each row, which would count as our memory.
        """
        size = self.manifest.model.spec.embedding_size
        taken = np.empty((len(positions), size), self.manifest.dtype)
        content, width = taken.data.cast("B"), size * taken.itemsize
        segments = np.searchsorted(self.starts, positions, side="right") - 1
        breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(segments) != 0)) + 1
        for first, stop in pairwise([0, *breaks.tolist(), len(positions)]):
            segment, run = int(segments[first]), content[first * width : stop * width]
            offset = int(positions[first] - self.starts[segment]) * width
            if os.preadv(self.files[segment], [run], offset) < len(run):
                raise DataError(f"the vectors of {self.manifest.segments[segment].name} are truncated", DAMAGED)
        return taken.astype(np.float32, copy=False)

    def chunks(self, positions: NDArray[np.int64] | None = None) -> Iterator[tuple[NDArray[np.int64], Embeddings]]:
        """Yield positions and vectors of all rows, or of some, in parts that fit into memory."""
        if positions is not None:
            for start in range(0, len(positions), CHUNK):
                yield (part := positions[start : start + CHUNK]), self.take(part)
            return
        for first, vectors, pages in zip(self.starts, self.vectors, self.maps, strict=False):
            for start in range(0, len(vectors), CHUNK):
                part = vectors[start : start + CHUNK]
                yield np.arange(first + start, first + start + len(part)), part.astype(np.float32, copy=False)
            if len(self) >= FLAT_ROWS:
                pages.madvise(mmap.MADV_DONTNEED)  # or all vectors would count as our memory

    def approximate(self, queries: Embeddings, want: int, mask: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """Positions of rows that include the nearest, from the index and the rows after it: (Q, C), -1 for none."""
        import faiss

        facts = self.manifest.index
        assert facts
        probes, selector = facts.probes, None
        if mask is not None:  # the neighbors that remain are farther away
            probes = min(facts.lists, ceil(probes / mask.mean()))
            bits = np.zeros(facts.below, np.bool_)
            bits[self.numbers[mask & (self.numbers < facts.below)]] = True
            selector = faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
        count = max(facts.candidates, 2 * want)
        found = search_index(self.index, queries, count, probes, selector)
        positions = np.where(found < 0, -1, np.searchsorted(self.numbers, found))
        tail = np.flatnonzero(self.numbers >= facts.below if mask is None else mask & (self.numbers >= facts.below))
        return np.concatenate([positions, nearest_rows(queries, want, self.chunks(tail))], axis=1)

    def mask(self, where: Where) -> NDArray[np.bool_] | None:
        """Which rows meet the conditions; None if there are none."""
        masks = []
        if where.cameras is not None:
            known = [number for number, name in enumerate(self.manifest.cameras) if name in where.cameras]
            masks.append(np.isin(self.cameras, known))
        if where.since is not None:
            masks.append(self.times >= where.since)
        if where.before is not None:
            masks.append(self.times < where.before)
        if where.pids is not None:
            masks.append(np.isin(self.pids, np.array(where.pids, np.int64)))
        if where.sources is not None:
            wanted = set(map(os.fsencode, where.sources))
            matches = []
            for text, (first, stop) in zip(self.texts, pairwise(self.starts), strict=True):
                content, ends = bytes(text), self.table["end"][first:stop].tolist()
                matches += [content[start:end] in wanted for start, end in pairwise([0, *ends])]
            masks.append(np.array(matches, np.bool_))
        return np.logical_and.reduce(masks) if masks else None

    def source(self, position: int) -> bytes:
        segment = int(np.searchsorted(self.starts, position, side="right")) - 1
        start = self.table["end"][position - 1] if position > self.starts[segment] else 0
        return self.texts[segment][int(start) : int(self.table["end"][position])]

    def hit(self, position: int, distance: float) -> Hit:
        row, source = self.table[position], os.fsdecode(self.source(position))
        camera = self.manifest.cameras[row["camera"]]
        return Hit.of(distance, int(row["id"]), int(row["pid"]), camera, float(row["time"]), source)


class FolderGallery(Gallery):
    """A gallery in a folder."""

    def __init__(
        self,
        folder: Path,
        model: Embedder | EmbeddingModel | None,
        distance: Distance | None = None,
        dtype: StoredType | None = None,
    ) -> None:
        if missing := absent("faiss"):
            raise PmmError(f"a gallery in a folder needs FAISS: {missing}", install("gallery"))
        super().__init__(str(folder), model)
        self.folder, self._settings = folder, (distance, dtype or "float32")
        self._view: View | None = None
        self._sorted_ids = np.empty(0, np.uint64)
        self._load()
        if self._view is None and folder.exists():
            ours = ("lock", "gallery")  # what a process leaves that was killed before the first manifest was there
            if not folder.is_dir() or any(path.name.lstrip(".").split(".")[0] not in ours for path in folder.iterdir()):
                raise DataError(f"{folder} is not a gallery", "Name a gallery, or a folder that does not exist yet")

    def _load(self) -> None:
        """Open the files of the current manifest; leave `_view` None if there is no gallery."""
        text = b""
        while True:
            try:
                before, text = text, (self.folder / "gallery.json").read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return
            manifest = decode_sealed(Manifest, text, str(self.folder / "gallery.json"), DataError, DAMAGED)
            try:
                self._view = View(self.folder, manifest)
            except FileNotFoundError as error:  # a writer replaced the manifest in between
                if text == before:
                    raise DataError(f"{error.filename} is missing", DAMAGED) from error
                continue
            self.model, self.distance, self.dtype = manifest.model, manifest.distance, manifest.dtype
            self._sorted_ids = np.sort(self._view.table["id"])
            return

    @property
    def view(self) -> View:
        self._existing()
        assert self._view is not None
        return self._view

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._reported():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock", timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                problem = f"another process is writing to {self.folder}"
                raise OutputError(problem, "Try again when it is done") from error
        try:
            self._refresh()
            yield
        except BaseException:
            self._load()  # what was written before the error stays
            raise
        finally:
            lock.release()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot write {self.folder}: {error.strerror or error}; what it contained is unchanged"
            raise OutputError(problem, "Choose a folder that is writable, or free space") from error

    def _refresh(self) -> None:
        """Load the manifest, and remove files that it does not name: of a killed process, or with deleted rows."""
        self._load()
        if self._view is None:
            return
        manifest = self._view.manifest
        named = {f"{segment.name}{suffix}" for segment in manifest.segments for suffix in SUFFIXES}
        named |= {f"{manifest.index.name}.index"} if manifest.index else set()
        with self._reported():
            (self.folder / "data").mkdir(exist_ok=True)
            for path in (self.folder / "data").iterdir():
                if path.name not in named and path.suffix in (*SUFFIXES, ".index", ".tmp"):
                    path.unlink()

    def _create(self, model: EmbeddingModel) -> None:
        distance, dtype = self._settings
        self._commit(Manifest(model, distance or model.spec.distance, dtype))
        self._refresh()

    def _commit(self, manifest: Manifest) -> None:
        with written_whole(self.folder / "gallery.json") as temporary:
            temporary.write_text(encode_sealed(manifest), encoding="utf-8")
        if self._view is not None:
            self._view.manifest = manifest

    def _known(self, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        if not len(self._sorted_ids):
            return np.zeros(len(ids), np.bool_)
        at = np.searchsorted(self._sorted_ids, ids).clip(max=len(self._sorted_ids) - 1)
        return self._sorted_ids[at] == ids

    def _append(self, rows: Rows, report: Report) -> None:
        manifest, count = self.view.manifest, len(rows.ids)
        names = {name: number for number, name in enumerate(manifest.cameras)}
        for name in dict.fromkeys(rows.cameras.tolist()):
            names.setdefault(name, len(names))
        table = np.empty(count, ROW)
        table["id"], table["pid"], table["time"] = rows.ids, rows.pids, rows.times
        table["camera"] = [names[name] for name in rows.cameras.tolist()]
        segments, start, texts = list(manifest.segments), 0, [os.fsencode(source) for source in rows.sources]
        while start < count:
            if not segments or segments[-1].rows >= SEGMENT_ROWS:
                segments.append(Segment(secrets.token_hex(8)))
            part = slice(start, start + SEGMENT_ROWS - segments[-1].rows)
            piece = table[part]
            piece["number"] = manifest.next_number + np.arange(len(piece))
            with self._reported():
                segments[-1] = self._extend(segments[-1], rows.embeddings[part], piece, texts[part])
            start += len(piece)
            end = manifest.next_number + len(piece)
            manifest = replace(manifest, cameras=tuple(names), next_number=end, segments=tuple(segments))
            self._commit(manifest)
            report(f"adding to {self.folder.name}", start, count)
        new = np.sort(rows.ids)
        self._sorted_ids = np.insert(self._sorted_ids, np.searchsorted(self._sorted_ids, new), new)

    def _extend(self, segment: Segment, vectors: Embeddings, table: NDArray[Any], texts: list[bytes]) -> Segment:
        """Write rows after those of a segment, where their sources end as well."""
        table["end"] = segment.text + np.cumsum([len(text) for text in texts])
        vectors = np.ascontiguousarray(vectors, self.dtype)
        contents: list[Any] = [vectors.reshape(-1).view(np.uint8), table.tobytes(), b"".join(texts)]
        offsets = (segment.rows * vectors.itemsize * vectors.shape[1], segment.rows * ROW.itemsize, segment.text)
        checksums = []
        for suffix, offset, content, checksum in zip(SUFFIXES, offsets, contents, segment.checksums, strict=True):
            path = self.folder / "data" / f"{segment.name}{suffix}"
            with path.open("r+b" if segment.rows else "wb", buffering=0) as file:
                if file.seek(0, os.SEEK_END) < offset:
                    raise DataError(f"{path} is truncated", DAMAGED)
                file.truncate(offset)
                file.seek(offset)
                try:
                    left = memoryview(content)
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError:
                    with suppress(OSError):
                        file.truncate(offset)
                    raise
            checksums.append(zlib.crc32(content, checksum))
        return Segment(segment.name, segment.rows + len(table), segment.text + len(contents[2]), tuple(checksums))  # type: ignore[arg-type]

    def _finish(self, report: Report) -> None:
        self._load()
        view, facts = self.view, self.view.manifest.index
        count, new = len(view), facts
        if count < FLAT_ROWS:
            new = None
        elif facts is None or count >= 4 * facts.trained or facts.removed > facts.trained // 4:
            new = self._write_index(*build_index(view, f"indexing {self.folder.name}", report))
        elif len(tail := np.flatnonzero(view.numbers >= facts.below)) >= max(TAIL, count // 100):
            index = view.load_index()
            for positions, vectors in view.chunks(tail):
                index.add_with_ids(vectors, view.numbers[positions])
            new = self._write_index(index, replace(facts, below=view.manifest.next_number))
        if new != facts:
            self._commit(replace(view.manifest, index=new))
            self._refresh()

    def _write_index(self, index: Any, facts: IndexFacts) -> IndexFacts:
        """Write an index, which counts once a manifest has the facts that are returned."""
        import faiss

        content, name = memoryview(faiss.serialize_index(index)), secrets.token_hex(8)
        with written_whole(self.folder / "data" / f"{name}.index") as temporary:
            temporary.write_bytes(content)
        return replace(facts, name=name, checksum=zlib.crc32(content))

    def _nearest(self, queries: Embeddings, top: int, where: Where, exact: bool) -> tuple[int, list[list[Hit]]]:
        view = self.view
        mask = view.mask(where)
        count = len(view) if mask is None else int(mask.sum())
        top = min(top, count)
        if exact or view.manifest.index is None or count < FLAT_ROWS:
            rows = view.chunks(None if mask is None else np.flatnonzero(mask))
            candidates = nearest_rows(queries, top + MARGIN, rows)
        else:
            candidates = view.approximate(queries, top, mask)
        rankings: list[list[Hit]] = []
        for query, row in zip(queries, candidates, strict=True):
            positions, order = np.sort(row[row >= 0]), np.empty(0, np.int64)
            if len(positions):
                distances = pairwise_distances(query[None], view.take(positions), self.distance)[0]
                order = np.argsort(distances, kind="stable")[:top]
            rankings.append([view.hit(int(positions[one]), float(distances[one])) for one in order])
        return count, rankings

    def _remove(self, where: Where, report: Report) -> int:
        view, manifest = self.view, self.view.manifest
        mask = view.mask(where)
        assert mask is not None
        if not mask.any():
            return 0
        kept: list[Segment] = []
        spans = list(pairwise(view.starts.tolist()))
        for done, (segment, (first, stop)) in enumerate(zip(manifest.segments, spans, strict=True)):
            report(f"deleting from {self.folder.name}", done, len(spans))
            if not mask[first:stop].any():
                kept.append(segment)
                continue
            new = Segment(secrets.token_hex(8))
            positions = first + np.flatnonzero(~mask[first:stop])
            with self._reported():
                for part, vectors in view.chunks(positions):
                    new = self._extend(new, vectors, view.table[part], [view.source(one) for one in part.tolist()])
            kept += [new] if new.rows else []
        numbers, facts = view.numbers[mask], manifest.index
        if facts and (gone := numbers[numbers < facts.below]).size:
            import faiss

            index = view.load_index()
            index.remove_ids(faiss.IDSelectorBatch(gone))
            facts = self._write_index(index, replace(facts, removed=facts.removed + gone.size))
        self._commit(replace(manifest, segments=tuple(kept), index=facts))
        self._refresh()
        left = self.view.mask(where)
        if left is not None and left.any():
            raise OutputError(f"{int(left.sum())} rows of {self.folder} were not deleted", "Delete them again")
        report(f"deleting from {self.folder.name}", len(spans), len(spans))
        self._finish(report)
        return int(mask.sum())

    def info(self, check: bool = False) -> GalleryInfo:
        view, model = self.view, self._existing()
        if check:
            for segment, pages in zip(view.manifest.segments, view.maps, strict=True):
                _verify(view.folder / f"{segment.name}.vectors", pages, segment.checksums[0])
            if view.manifest.index:
                view.load_index()
        oldest, newest = map(local_time, (view.times.min(), view.times.max())) if len(view) else (None, None)
        cameras = sorted(filter(None, (view.manifest.cameras[number] for number in np.unique(view.cameras))))
        size = sum(map(len, (*view.maps, *view.texts, view._index))) + view.table.nbytes
        identities = int((np.unique(view.pids) >= 0).sum())
        counts = len(view), identities, cameras, oldest, newest, size, view.manifest.index
        return GalleryInfo(self.location, model, self.distance, self.dtype, *counts)


def _verify(path: Path, content: Any, checksum: int) -> None:
    if zlib.crc32(content) != checksum:
        raise DataError(f"{path} is damaged: its checksum does not match", DAMAGED)


def _map(path: Path, size: int | None = None) -> Any:
    """Map a file, or its first `size` bytes; raise DataError if it is shorter."""
    with path.open("rb") as file:
        available = os.fstat(file.fileno()).st_size
        if size is not None and available < size:
            raise DataError(f"{path} is truncated", DAMAGED)
        wanted = available if size is None else size
        return mmap.mmap(file.fileno(), wanted, access=mmap.ACCESS_READ) if wanted else b""
