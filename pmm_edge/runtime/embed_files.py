"""Embed image files: find them, decode them on threads, embed them in a fixed order, save or evaluate the result."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, is_dataset, read
from pmm_edge.errors import CheckFailedError, DataError, PmmError, install
from pmm_edge.files import check_output, written_whole
from pmm_edge.images import IMAGE_SUFFIXES, Pixels, read_crop
from pmm_edge.machine import threads
from pmm_edge.retrieval.metrics import JUNK_PID, RetrievalResult, evaluate
from pmm_edge.runtime.embedder import Embedder, Embeddings
from pmm_edge.spec import METADATA_KEY, ModelSpec

_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class ImageLabels:
    """The labels of N images of a data set."""

    pids: NDArray[np.int64]
    """-1 is junk, 0 a distractor."""
    camids: NDArray[np.int64]
    split: NDArray[np.str_]
    """`query`, `gallery` or `train`."""


@dataclass(frozen=True, eq=False)
class ImageList:
    """N image files to embed."""

    source: str
    """`image`, `folder`, `list`, `paths`, or the layout of a data set."""
    paths: list[Path]
    names: list[str]
    """The paths as they are stored: relative to the folder or data set, or the lines of a list."""
    labels: ImageLabels | None = None


def find_images(source: str | Path | Sequence[str | Path], layout: str | None = None) -> ImageList:
    """Find the images to embed, without opening them.

    `source` is an image; a folder, searched recursively without hidden files; a data set (`layout`, if it is not
    recognized); a text file with one path per line, relative to its folder; or a sequence of paths. Raises DataError if
    it does not exist, cannot be read, or contains no images.
    """
    if not isinstance(source, str | Path):
        return ImageList("paths", [Path(path) for path in source], [str(path) for path in source])
    source = Path(source)
    if source.is_dir():
        images = _of_dataset(source, layout) if layout or is_dataset(source) else _of_folder(source)
    elif layout:
        raise DataError(f"{source} is not a folder", "Name the folder of a data set, or omit the layout")
    elif _is_image(source.name) and source.is_file():
        images = ImageList("image", [source], [source.name])
    else:
        images = _of_list(source)
    if not images.paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{source} contains no images", f"Name a folder with {kinds} files, or a list of their paths")
    return images


def _of_dataset(root: Path, layout: str | None) -> ImageList:
    dataset = read(root, layout)
    splits = {"query": dataset.query, "gallery": dataset.gallery, "train": dataset.train}
    paths = [path for split in splits.values() for path in split.paths]
    labels = ImageLabels(
        np.concatenate([split.pids for split in splits.values()]),
        np.concatenate([split.camids for split in splits.values()]),
        np.repeat(np.array(list(splits)), [len(split) for split in splits.values()]),
    )
    return ImageList(dataset.layout, paths, _names(paths, dataset.root), labels)


def _of_folder(folder: Path) -> ImageList:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}", "Check its permissions") from error

    paths = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if _is_image(name)]
    paths.sort()
    return ImageList("folder", paths, _names(paths, folder))


def _is_image(name: str) -> bool:
    # os.path: Path.suffix is slow for folders with a million files.
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def _of_list(path: Path) -> ImageList:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "Name an image, a folder, a data set or a list of paths") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a text file with one path per line", "Name a folder or such a list") from error
    names = [line.strip() for line in lines if line.strip()]
    return ImageList("list", [path.parent / name for name in names], names)


def _names(paths: Sequence[Path], root: Path) -> list[str]:
    # File names need not be valid Unicode, but .npz and .parquet text is: other bytes are written as \xNN.
    return [os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace") for path in paths]


class SkippedImage(NamedTuple):
    """An image that cannot be read."""

    path: Path
    reason: str


@dataclass(frozen=True, eq=False)
class EmbeddedFiles:
    """Embeddings of N image files."""

    spec: ModelSpec
    images: ImageList
    embeddings: Embeddings
    """(N, D) float32."""
    skipped: list[SkippedImage]
    backend: str
    device: str
    seconds: float
    """From the first file to the last embedding."""
    model_seconds: float
    """The part of `seconds` that the network took; the rest was spent waiting for decoded images."""

    def save(self, path: Path) -> None:
        """Write the embeddings atomically.

        `.npz`: arrays `embeddings`, `paths` (text), `spec` (JSON text), and the labels of a data set: `pids`, `camids`
        and `split`. `numpy.load` opens it without pickle. `.parquet`: columns `path`, `embedding`, `pid`, `camid` and
        `split`; the schema metadata has the spec under `pmm_edge.spec`.
        """
        check_embedding_file(path)
        names, labels, spec = self.images.names, self.images.labels, self.spec.to_json()
        if path.suffix.lower() != ".parquet":
            arrays = {"embeddings": self.embeddings, "paths": np.array(names, np.str_), "spec": np.array(spec)}
            _save_npz(path, arrays | (vars(labels) if labels else {}))
            return
        import pyarrow as pa
        import pyarrow.parquet

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(self.embeddings.reshape(-1)), self.embeddings.shape[1])
        columns = {"path": pa.array(names, pa.string()), "embedding": vectors}
        if labels:
            columns |= {"pid": pa.array(labels.pids), "camid": pa.array(labels.camids), "split": pa.array(labels.split)}
        table = pa.table(columns, metadata={METADATA_KEY: spec})
        with written_whole(path) as temporary:
            # Embeddings hardly repeat: dictionary encoding would cost time and save nothing.
            pyarrow.parquet.write_table(table, temporary, use_dictionary=["split"] if labels else False)


def _save_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with written_whole(path) as temporary, temporary.open("wb") as file:  # np.savez would append .npz to a name
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes any of them for allow_pickle


def check_embedding_file(path: Path) -> None:
    """Check that `EmbeddedFiles.save` can write a file, before embedding anything."""
    check_output(path, (".npz", ".parquet"))
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise PmmError(
            f"writing {path} requires pyarrow, which is not installed",
            f"{install('parquet')}, or write a .npz file",
        )


def embed_files(
    model: Embedder | str | Path,
    images: ImageList | str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    layout: str | None = None,
    device: str | int | None = None,
    batch: int | None = None,
    skip_bad: bool = False,
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

    Raises DataError if there are no images or one is unreadable, ModelError if the model cannot be loaded, OutputError
    if `out` cannot be written.
    """
    from pmm_edge.runtime import load

    if out is not None:
        check_embedding_file(Path(out))
    found = images if isinstance(images, ImageList) else find_images(images, layout)
    embedder = model if isinstance(model, Embedder) else load(model, device)
    (embeddings, *_), rows, skipped, seconds, model_seconds = _embed(embedder, found.paths, batch, report, skip_bad)
    if skipped and not rows:
        raise CheckFailedError(
            f"none of the {len(skipped):,} images can be read: {skipped[0].path}: {skipped[0].reason}",
            "Replace the files, or name other images",
        )
    if skipped:
        labels = found.labels and ImageLabels(*(values[rows] for values in vars(found.labels).values()))
        paths, names = [found.paths[row] for row in rows], [found.names[row] for row in rows]
        found = replace(found, paths=paths, names=names, labels=labels)
    embedded = EmbeddedFiles(
        embedder.spec, found, embeddings, skipped, embedder.backend, embedder.device, seconds, model_seconds
    )
    if out is not None:
        embedded.save(Path(out))
    return embedded


@dataclass(frozen=True, eq=False)
class EmbeddedDataset:
    """Embeddings of the queries of a data set followed by its gallery."""

    dataset: ReidDataset
    """Without junk, which no metric counts."""
    embeddings: Embeddings
    """(queries + gallery images, D) float32."""
    flipped: Embeddings | None = None
    """Same shape: the mean of the embeddings of each image and of its mirror image."""

    def evaluate(
        self,
        rerank: bool = False,
        ap_cutoff: int | None = None,
        max_rank: int = 50,
        flip: bool = False,
        report: Report = silent,
    ) -> RetrievalResult:
        """Evaluate retrieval as `pmm_edge.evaluate` does; with `flip`, `flipped` instead of `embeddings`."""
        embeddings = self.flipped if flip else self.embeddings
        if embeddings is None:
            raise DataError("there are no embeddings of mirror images", "Embed with flip=True")
        query, gallery, count = self.dataset.query, self.dataset.gallery, len(self.dataset.query)
        labels = query.pids, gallery.pids, query.camids, gallery.camids
        return evaluate(embeddings[:count], embeddings[count:], *labels, max_rank, ap_cutoff, rerank, report=report)

    def save(self, path: Path) -> None:
        """Write an .npz file that `numpy.load` opens without pickle.

        Arrays: `query_features`, `query_pids`, `query_camids` and `query_names` (file names), the same for `gallery_`,
        and if mirror images were embedded, `query_features_flip` and `gallery_features_flip`.
        """
        arrays: dict[str, NDArray[Any]] = {}
        count = len(self.dataset.query)
        for side, rows in (("query", slice(count)), ("gallery", slice(count, None))):
            split = self.dataset.splits[side]
            arrays[f"{side}_features"] = self.embeddings[rows]
            if self.flipped is not None:
                arrays[f"{side}_features_flip"] = self.flipped[rows]
            arrays |= {f"{side}_pids": split.pids, f"{side}_camids": split.camids}
            arrays[f"{side}_names"] = np.array([file.name for file in split.paths])
        _save_npz(path, arrays)


def embed_dataset(
    embedder: Embedder, dataset: ReidDataset, flip: bool = False, report: Report = silent
) -> EmbeddedDataset:
    """Embed the queries and the gallery of a data set, without junk; with `flip`, also their mirror images."""
    gallery = dataset.gallery.select(np.flatnonzero(dataset.gallery.pids != JUNK_PID))
    embeddings = _embed(embedder, [*dataset.query.paths, *gallery.paths], report=report, flip=flip)[0]
    return EmbeddedDataset(replace(dataset, gallery=gallery), embeddings[0], embeddings.mean(axis=0) if flip else None)


def _embed(
    embedder: Embedder,
    paths: Sequence[Path],
    batch: int | None = None,
    report: Report = silent,
    skip_bad: bool = False,
    flip: bool = False,
) -> tuple[NDArray[np.float32], list[int], list[SkippedImage], float, float]:
    """Return embeddings (views, rows, D), which path each row is of, skipped images, seconds, and the network's."""
    batch = embedder.chunk if batch is None else batch
    if batch < 1:
        raise PmmError(f"a batch of {batch} images cannot be embedded", "Choose 1 or more")
    embeddings = np.empty((1 + flip, len(paths), embedder.spec.embedding_size), np.float32)
    rows: list[int] = []
    skipped: list[SkippedImage] = []
    what, done, model_seconds = f"embedding with {embedder.path.name}", 0, 0.0
    report(what, done, len(paths))
    start = time.perf_counter()
    for decoded in _decoded(paths, batch, embedder.spec.input.height, embedder.spec.input.width):
        images = []
        for row, image in enumerate(decoded, start=done):
            if not isinstance(image, DataError):
                rows.append(row)
                images.append(image)
            elif skip_bad:
                skipped.append(SkippedImage(paths[row], str(image.__cause__ or image.problem)))
            else:
                raise image
        if images:
            pixels, model_start = np.stack(images), time.perf_counter()
            # A mirrored copy: back ends do not take the negative strides of a view.
            views = [pixels, np.ascontiguousarray(pixels[:, :, ::-1])] if flip else [pixels]
            for number, view in enumerate(views):
                embeddings[number, len(rows) - len(images) : len(rows)] = embedder.embed_prepared(view)
            model_seconds += time.perf_counter() - model_start
        done += len(decoded)
        report(what, done, len(paths), f"{done / (time.perf_counter() - start):,.0f} images/s")
    return embeddings[:, : len(rows)], rows, skipped, time.perf_counter() - start, model_seconds


def _decoded(paths: Sequence[Path], batch: int, height: int, width: int) -> Iterator[list[Pixels | DataError]]:
    """Yield batches of (height, width, 3) uint8 images, decoding a bounded number of batches ahead."""

    def read_one(path: Path) -> Pixels | DataError:
        try:
            return read_crop(path, height, width)
        except DataError as error:
            return error

    pending: deque[Iterator[Pixels | DataError]] = deque()
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="decode")
    try:
        for start in range(0, len(paths), batch):
            pending.append(pool.map(read_one, paths[start : start + batch]))
            if len(pending) > _BATCHES_AHEAD:
                yield list(pending.popleft())
        yield from map(list, pending)
    finally:
        pool.shutdown(cancel_futures=True)
