"""Embed image files: decode them on threads, embed them in a fixed order, save or evaluate the result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.data.loader import ahead
from pmm_edge.errors import CheckFailedError, DataError, PmmError
from pmm_edge.files import check_output, sha256, written_whole
from pmm_edge.images import IN_FIGURES, BadImage, Pixels, try_crop
from pmm_edge.machine import threads
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID, RetrievalResult, evaluate
from pmm_edge.retrieval.thresholds import FoundThresholds, find_thresholds
from pmm_edge.retrieval.tracklets import pool
from pmm_edge.runtime.embedder import Embedder, Embeddings
from pmm_edge.runtime.listing import ImageList, Item, find_images
from pmm_edge.runtime.storage import Storage, require_pyarrow
from pmm_edge.spec import METADATA_KEY, Distance, ModelSpec, RetrievalFigures


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

        columns["paths"] = list(map(utf8, self.images.names))
        table = pa.table(columns | {"embeddings": list(self.embeddings)}, metadata={METADATA_KEY: self.spec.to_json()})
        with written_whole(path) as temporary, temporary.open("wb") as file:
            pyarrow.parquet.write_table(table, file)


class Part(NamedTuple):
    """Images of one shard that were embedded at once."""

    items: list[Item]  # those with an error could not be read
    embeddings: Embeddings  # (N, D) float32 of the N others
    flipped: Embeddings | None = None  # the same of their mirror images


def embed_parts(
    embedder: Embedder, shards: Iterable[Iterable[Item]], batch: int | None, storage: Storage, flip: bool = False
) -> Iterator[Part]:
    """Embed shards in batches within a shard, reading and decoding the next ones on other threads."""
    size, empty = embedder.spec.input, np.empty((0, embedder.spec.embedding_size), np.float32)

    def decode(item: Item) -> Pixels | BadImage:
        if item.error:
            return BadImage(item.path, item.error)
        content = item.content
        try:
            if content is None and storage.remote:
                with storage.open(item.path) as file:
                    content = file.read()
        except OSError as error:
            storage.check(error, item.path)
            return BadImage(item.path, "it does not exist")
        return try_crop(item.path, size.height, size.width, content)

    def batches() -> Iterator[tuple[list[Item], Iterator[Pixels | BadImage]]]:
        with ThreadPoolExecutor(threads(), thread_name_prefix="decode") as pool:
            for shard in shards:
                images = iter(shard)
                while items := list(islice(images, batch or embedder.chunk)):
                    yield items, pool.map(decode, items)

    with closing(ahead(batches(), 3)) as decoding:
        for items, decoded in decoding:
            images = list(decoded)
            reasons = [image.reason if isinstance(image, BadImage) else "" for image in images]
            done = [item._replace(error=reason, content=None) for item, reason in zip(items, reasons, strict=True)]
            crops = [image for image in images if not isinstance(image, BadImage)]
            if not crops:
                yield Part(done, empty)
                continue
            pixels = np.stack(crops)
            flipped = embedder.embed_prepared(pixels[:, :, ::-1]) if flip else None
            yield Part(done, embedder.embed_prepared(pixels), flipped)


def save_npz(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write arrays atomically to a file that `numpy.load` opens without pickle."""
    with written_whole(path) as temporary, temporary.open("wb") as file:  # np.savez would append .npz to a name
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes any of them for allow_pickle


def utf8(text: str) -> str:
    """Escape the bytes of a path that are not UTF-8, which Parquet cannot store."""
    return text.encode("utf-8", "backslashreplace").decode()


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
        if Path(out).suffix.lower() == ".parquet":
            require_pyarrow(out)
    found = find_images(images, layout)
    if tracklets and found.dataset:
        require_tracklets(found.dataset)
    embedder = model if isinstance(model, Embedder) else load(model, device)
    if batch is not None and batch < 1:
        raise PmmError(f"a batch of {batch} images cannot be embedded", "Choose 1 or more")
    total, items, skipped = len(found.paths), list[Item](), list[BadImage]()
    embeddings, rows = np.empty((1 + flip, total, embedder.spec.embedding_size), np.float32), 0
    what, start = f"embedding with {embedder.path.name}", time.perf_counter()
    report(what, 0, total)
    for part in embed_parts(embedder, [map(Item, found.paths, found.names)], batch, Storage(Path()), flip):
        items += part.items
        skipped += [BadImage(item.path, item.error) for item in part.items if item.error]
        if skipped and not skip_bad:
            raise skipped[0].error()
        stop = rows + len(part.embeddings)
        embeddings[0, rows:stop] = part.embeddings
        if part.flipped is not None:
            embeddings[1, rows:stop] = part.flipped
        rows = stop
        report(what, len(items), total, f"{len(items) / (time.perf_counter() - start):,.0f} images/s")
    seconds = time.perf_counter() - start
    if skipped and not rows:
        problem = f"none of the {total:,} images can be read: {skipped[0].path}: {skipped[0].reason}"
        raise CheckFailedError(problem, "Replace the files, or name other images")
    if skipped:
        kept = [row for row, item in enumerate(items) if not item.error]
        labels = found.labels and {name: values[kept] for name, values in found.labels.items()}
        paths, names = [found.paths[row] for row in kept], [found.names[row] for row in kept]
        found = replace(found, paths=paths, names=names, labels=labels)
    embeddings = embeddings[:, :rows]
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
    images = replace(images, paths=paths, names=names, labels=labels)
    return replace(embedded, images=images, embeddings=rows, flipped=flipped)


def require_tracklets(dataset: ReidDataset) -> None:
    """Raise DataError if a data set has no tracklets."""
    if any(split.tracks is None for split in dataset.splits.values()):
        raise DataError(
            f"{dataset.root} has no tracklets", "pmm synth --frames writes some; pmm embed --tracklets pools folders"
        )


def pool_dataset(dataset: ReidDataset, embeddings: Embeddings) -> tuple[ReidDataset, Embeddings]:
    """Pool the embeddings of the queries of a data set followed by its gallery, which must have tracklets.

    Returns the data set with the first image of each tracklet, and an embedding for each.
    """
    sides, pooled = [], []
    for split, rows in zip((dataset.query, dataset.gallery), np.split(embeddings, [len(dataset.query)]), strict=True):
        assert split.tracks is not None
        sides.append(split.select(np.unique(split.tracks, return_index=True)[1]))
        pooled.append(pool(rows, split.tracks)[1])
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
    features, names = np.split(embeddings, [len(dataset.query)]), {"dataset": dataset.name, "data_sha256": data_sha256}
    return find_thresholds(*features, *dataset.labels, **names, report=report)
