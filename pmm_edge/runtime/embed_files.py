"""Embed image files: find them, decode them on threads, embed them in a fixed order, save or evaluate the result."""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, find_files, is_dataset, no_images, read, warn_ignored
from pmm_edge.errors import CheckFailedError, DataError, PmmError, install
from pmm_edge.files import NOT_UTF8, check_output, sha256, written_whole
from pmm_edge.images import IMAGE_SUFFIXES, IN_FIGURES, BadImage, Pixels, try_crop
from pmm_edge.machine import threads
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID, RetrievalResult, evaluate
from pmm_edge.retrieval.thresholds import FoundThresholds, find_thresholds
from pmm_edge.retrieval.tracklets import pool
from pmm_edge.runtime.embedder import Embedder, Embeddings
from pmm_edge.spec import METADATA_KEY, Distance, ModelSpec, RetrievalFigures

T = TypeVar("T")


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

    `source` is an image; a folder, searched by `find_files`; a data set (`layout`, if it is not recognized); a text
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
        try:
            paths = find_files(source, deep=True, ignored=ignored)
        except OSError as error:
            raise DataError(f"cannot read {source}: {error.strerror}", "Check its permissions") from error
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


@dataclass(frozen=True, eq=False)
class EmbeddedFiles:
    """Embeddings of N image files, or of N tracklets: then `images` has the folder of each, or its first image."""

    spec: ModelSpec
    images: ImageList
    embeddings: Embeddings  # (N, D) float32
    flipped: Embeddings | None  # same shape: the mean of the embeddings of each image and of its mirror image
    skipped: list[BadImage]
    backend: str
    device: str
    seconds: float  # from the first file to the last embedding

    def save(self, path: Path) -> None:
        r"""Write the embeddings atomically.

        `.npz`: arrays `embeddings`, `paths` (text), `spec` (JSON text), and the labels of a data set: `pids`, `camids`,
        `split` and `tracks`; for pooled tracklets the number of `frames`. `.parquet`: the same columns, `spec` in the
        schema metadata under `pmm_edge.spec`; bytes of paths that are not UTF-8 are escaped there, as in JSON
        (`\udce9`).
        """
        columns: dict[str, ArrayLike] = {"paths": self.images.names, "embeddings": self.embeddings}
        columns |= self.images.labels or {}
        if path.suffix.lower() != ".parquet":
            save_npz(path, {"spec": self.spec.to_json()} | columns)
            return
        import pyarrow as pa
        import pyarrow.parquet

        columns["paths"] = [name.encode("utf-8", "backslashreplace").decode() for name in self.images.names]
        table = pa.table(columns | {"embeddings": list(self.embeddings)}, metadata={METADATA_KEY: self.spec.to_json()})
        with written_whole(path) as temporary, temporary.open("wb") as file:
            pyarrow.parquet.write_table(table, file)


def save_npz(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write arrays atomically to a file that `numpy.load` opens without pickle."""
    with written_whole(path) as temporary, temporary.open("wb") as file:  # np.savez would append .npz to a name
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes any of them for allow_pickle


def embed_files(
    model: Embedder | str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    layout: str | None = None,
    device: str | int | None = None,
    batch: int | None = None,
    skip_bad: bool = False,
    flip: bool = False,
    tracklets: bool = False,
    report: Report = silent,
) -> EmbeddedFiles:
    """Embed image files in order.

        embedded = pmm_edge.embed_files("model.onnx", "crops/", "embeddings.npz")
        embedded.embeddings         # (N, D) float32
        embedded.images.names       # N paths relative to crops/

    Args:
        model: an embedder, or a file for `pmm_edge.load`, on `device`.
        images: see `find_images`, also for `layout`.
        out: write the result to this `.npz` or `.parquet` file.
        batch: number of images per call of the network; None for `embedder.chunk`.
        skip_bad: list unreadable images in `skipped` instead of raising DataError; CheckFailedError if all are.
        flip: also embed the mirror images, for `flipped`.
        tracklets: pool the images of each tracklet to one row, see `pmm_edge.pool`: those of one folder, or the
            tracklets of a data set.

    Raises DataError if there are no images, one is unreadable, or a data set has no tracklets to pool, ModelError if
    the model cannot be loaded, OutputError if `out` cannot be written.
    """
    from pmm_edge.runtime import load

    if out is not None:
        check_output(Path(out), (".npz", ".parquet"))
        if Path(out).suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
            problem = f"writing {out} requires pyarrow, which is not installed"
            raise PmmError(problem, f"{install('parquet')}, or write a .npz file")
    found = find_images(images, layout)
    if tracklets and found.dataset:
        require_tracklets(found.dataset)
    embedder = model if isinstance(model, Embedder) else load(model, device)
    batch = embedder.chunk if batch is None else batch
    if batch < 1:
        raise PmmError(f"a batch of {batch} images cannot be embedded", "Choose 1 or more")
    size, total = embedder.spec.input, len(found.paths)
    embeddings = np.empty((1 + flip, total, embedder.spec.embedding_size), np.float32)
    rows: list[int] = []
    skipped: list[BadImage] = []
    what, done, start = f"embedding with {embedder.path.name}", 0, time.perf_counter()
    report(what, done, total)
    batches = (found.paths[first : first + batch] for first in range(0, total, batch))
    for _, decoded in decode_ahead(batches, lambda path: try_crop(path, size.height, size.width)):
        crops = []
        for row, image in enumerate(decoded, start=done):
            if not isinstance(image, BadImage):
                rows.append(row)
                crops.append(image)
            elif skip_bad:
                skipped.append(image)
            else:
                raise image.error()
        if crops:
            pixels, target = np.stack(crops), embeddings[:, len(rows) - len(crops) : len(rows)]
            target[0] = embedder.embed_prepared(pixels)
            if flip:
                target[1] = embedder.embed_prepared(pixels[:, :, ::-1])
        done += len(decoded)
        report(what, done, total, f"{done / (time.perf_counter() - start):,.0f} images/s")
    seconds = time.perf_counter() - start
    if skipped and not rows:
        problem = f"none of the {total:,} images can be read: {skipped[0].path}: {skipped[0].reason}"
        raise CheckFailedError(problem, "Replace the files, or name other images")
    if skipped:
        labels = found.labels and {name: values[rows] for name, values in found.labels.items()}
        paths, names = [found.paths[row] for row in rows], [found.names[row] for row in rows]
        found = ImageList(found.source, paths, names, labels)
    embeddings = embeddings[:, : len(rows)]
    flipped = embeddings.mean(axis=0) if flip else None
    engine = embedder.backend, embedder.device
    embedded = EmbeddedFiles(embedder.spec, found, embeddings[0], flipped, skipped, *engine, seconds)
    if tracklets:
        embedded = _pooled(embedded)
    if out is not None:
        if embedder.spec.checkpoint_sha256 is None:  # a checkpoint, which its spec cannot name
            named = replace(embedder.spec, checkpoint_sha256=sha256(embedder.path))
            embedded = replace(embedded, spec=named)
        embedded.save(Path(out))
    return embedded


def _pooled(embedded: EmbeddedFiles) -> EmbeddedFiles:
    """Pool the images of each tracklet of a data set, or else of each folder, in order of their first images."""
    images, labels = embedded.images, embedded.images.labels
    folders = [PurePath(name).parent.as_posix() for name in images.names]
    tracks = np.array(folders) if labels is None else labels["tracks"]
    _, first, frames = np.unique(tracks, return_index=True, return_counts=True)
    order = np.argsort(first)
    first = first[order]
    paths = [images.paths[row] if labels else images.paths[row].parent for row in first]
    names = [images.names[row] if labels else folders[row] for row in first]
    labels = {name: values[first] for name, values in (labels or {}).items()} | {"frames": frames[order]}
    rows, flipped = pool(embedded.embeddings, tracks)[1][order], embedded.flipped
    flipped = None if flipped is None else pool(flipped, tracks)[1][order]
    images = ImageList(images.source, paths, names, labels, images.dataset)
    return replace(embedded, images=images, embeddings=rows, flipped=flipped)


def require_tracklets(dataset: ReidDataset) -> None:
    """Raise DataError if a data set has no tracklets."""
    if any(split.tracks is None for split in dataset.splits.values()):
        raise DataError(
            f"{dataset.root} has no tracklets", "pmm synth --frames writes some; pmm embed --tracklets pools folders"
        )


def pool_dataset(dataset: ReidDataset, embeddings: Embeddings) -> tuple[ReidDataset, Embeddings]:
    """Pool the embeddings of the queries of a data set followed by its gallery: a data set of tracklets, and theirs.

    Each tracklet is listed as its first image. The data set must have tracklets.
    """
    sides, pooled, done = [], [], 0
    for split in (dataset.query, dataset.gallery):
        assert split.tracks is not None
        _, first = np.unique(split.tracks, return_index=True)
        sides.append(split.select(first))
        pooled.append(pool(embeddings[done : done + len(split)], split.tracks)[1])
        done += len(split)
    return replace(dataset, query=sides[0], gallery=sides[1]), np.concatenate(pooled)


def embed_dataset(
    embedder: Embedder, dataset: ReidDataset, flip: bool = False, report: Report = silent
) -> EmbeddedFiles:
    """Embed the queries of a data set, followed by its gallery, to evaluate them: none can be skipped."""
    try:
        return embed_files(embedder, [*dataset.query.paths, *dataset.gallery.paths], flip=flip, report=report)
    except DataError as error:
        raise DataError(error.problem, IN_FIGURES) from error


def evaluate_dataset(
    dataset: ReidDataset,
    embeddings: Embeddings,
    rerank: bool = False,
    distance: Distance = "euclidean",
    report: Report = silent,
) -> RetrievalResult:
    """Evaluate embeddings of the queries of a data set followed by its gallery, as `pmm_edge.evaluate` does.

    Distractors are different people with one number: as a query, a distractor has no match and does not count.
    """
    query, gallery, count = dataset.query, dataset.gallery, len(dataset.query)
    query_pids = np.where(query.pids == DISTRACTOR_PID, JUNK_PID, query.pids)
    labels = query_pids, gallery.pids, query.camids, gallery.camids
    return evaluate(embeddings[:count], embeddings[count:], *labels, rerank=rerank, distance=distance, report=report)


def cosine_figures(dataset: ReidDataset, embeddings: Embeddings) -> RetrievalFigures | None:
    """Retrieval by cosine distance; None if an embedding has length 0, as an untrained network may output."""
    if not embeddings.any(axis=1).all():
        return None
    return evaluate_dataset(dataset, embeddings, distance="cosine").figures()


def dataset_thresholds(
    dataset: ReidDataset, embeddings: Embeddings, data_sha256: str, report: Report = silent
) -> FoundThresholds:
    """Find the decision thresholds for embeddings of the queries of a data set followed by its gallery."""
    query, gallery, count = dataset.query, dataset.gallery, len(dataset.query)
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    features = embeddings[:count], embeddings[count:]
    return find_thresholds(*features, *labels, dataset=dataset.name, data_sha256=data_sha256, report=report)


def decode_ahead(
    batches: Iterable[Sequence[T]], decode: Callable[[T], Pixels | BadImage]
) -> Iterator[tuple[Sequence[T], list[Pixels | BadImage]]]:
    """Yield each batch with its decoded images, decoding two batches ahead."""
    pending: deque[tuple[Sequence[T], Iterator[Pixels | BadImage]]] = deque()
    with ThreadPoolExecutor(threads(), thread_name_prefix="decode") as pool:
        for batch in batches:
            pending.append((batch, pool.map(decode, batch)))
            if len(pending) > 2:
                first, images = pending.popleft()
                yield first, list(images)
        for batch, images in pending:
            yield batch, list(images)
