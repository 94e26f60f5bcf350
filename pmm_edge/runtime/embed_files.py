"""What to embed: the images of a folder, of a text list or of a data set, in an order that does not change."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report, silent
from pmm_edge.data import layouts
from pmm_edge.data.dataset import read
from pmm_edge.errors import DataError, PmmError
from pmm_edge.files import check_output, written_whole
from pmm_edge.images import IMAGE_SUFFIXES, Pixels, read_crop
from pmm_edge.machine import threads
from pmm_edge.runtime.embedder import Embedder, Embeddings
from pmm_edge.spec import METADATA_KEY, ModelSpec


@dataclass(frozen=True, eq=False)
class Labels:
    """What a data set says of each image."""

    pids: NDArray[np.int64]
    """(N,) identities; -1 is junk, 0 a distractor."""
    camids: NDArray[np.int64]
    """(N,) cameras."""
    split: NDArray[np.str_]
    """(N,) `query`, `gallery` or `train`."""

    def __getitem__(self, rows: NDArray[np.int64]) -> Labels:
        return Labels(self.pids[rows], self.camids[rows], self.split[rows])


@dataclass(frozen=True, eq=False)
class ImageList:
    """Image files to embed, one row each."""

    source: str
    """Where they come from, for people: `folder`, `list`, or a data set's layout."""
    paths: list[Path]
    names: list[str]
    """The paths as they are stored: relative to the folder or data set; of a list, its lines."""
    labels: Labels | None = None


def find_images(source: Path, layout: str | None = None) -> ImageList:
    """Find what to embed; no image is opened.

    Args:
        source: a data set's folder, any other folder (searched with what it holds, hidden files left out), or a text
            file with one path a line, relative to the file's own folder.
        layout: one of `pmm_edge.data.layouts.LAYOUTS`, where `source` is a data set that is not recognised.

    Raises:
        DataError: `source` does not exist, is no text, or names no images; a data set is not as it should be.
    """
    if source.is_dir():
        images = _of_dataset(source, layout) if layout or is_dataset(source) else _of_folder(source)
    elif layout:
        raise DataError(f"{source} is no folder, so it is in no layout", "Leave --layout out, or name a data set")
    else:
        images = _of_list(source)
    if not images.paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{source} names no images", f"Name a folder with {kinds} files, or a list of their paths")
    return images


def is_dataset(root: Path) -> bool:
    """Whether a folder is in the layout of a data set that is known."""
    return any(kind.holds(root) for kind in (layouts, layouts, layouts)) or bool(layouts.kinds_in(root))


def _of_dataset(root: Path, layout: str | None) -> ImageList:
    dataset = read(root, layout)
    splits = {name: dataset.splits[name] for name in ("query", "gallery", "train")}
    paths = [path for split in splits.values() for path in split.paths]
    labels = Labels(
        np.concatenate([split.pids for split in splits.values()]),
        np.concatenate([split.camids for split in splits.values()]),
        np.repeat(np.array(list(splits)), [len(split) for split in splits.values()]),
    )
    return ImageList(dataset.layout, paths, _names(paths, dataset.root), labels)


def _of_folder(folder: Path) -> ImageList:
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if _is_image(name)]
    paths.sort()
    return ImageList("folder", paths, _names(paths, folder))


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read {error.filename}: {error.strerror}", "Check its permissions") from error


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  of a million


def _of_list(path: Path) -> ImageList:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "Name a folder, a data set or a list of image files") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no text file with one path a line", "Name a folder or such a list") from error
    names = [line.strip() for line in lines if line.strip()]
    return ImageList("list", [path.parent / name for name in names], names)


def _names(paths: Sequence[Path], root: Path) -> list[str]:
    # A name that is no Unicode text is legal on disk and in no file format: its bytes are written as \xNN.
    return [os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace") for path in paths]


SUFFIXES = (".npz", ".parquet")


def check_embedding_file(path: Path) -> None:
    """Refuse a file that `save_embeddings` could not write, before anything is embedded.

    Raises:
        OutputError: the name ends in none of `SUFFIXES` or is a folder's, or its folder cannot be made or written.
        PmmError: it is a Parquet file and pyarrow is not installed.
    """
    check_output(path, SUFFIXES)
    if _is_parquet(path) and find_spec("pyarrow") is None:
        raise PmmError(
            f"writing {path} needs pyarrow, which is not installed",
            "pip install 'pmm-edge[parquet]', or name a .npz file",
        )


def save_embeddings(
    path: Path, spec: ModelSpec, names: list[str], embeddings: Embeddings, labels: Labels | None = None
) -> None:
    """Write embeddings, whole or not at all.

    `.npz`: arrays `embeddings` (N, D) float32, `paths` (N,) text, `spec` the network's spec as JSON text, and of a data
    set `pids`, `camids` (N,) int64 and `split` (N,) text. `numpy.load` opens it without pickle.

    `.parquet`: columns `path`, `embedding` (a list of D float32), and of a data set `pid`, `camid`, `split`; the spec
    is in the schema's metadata under `pmm_edge.spec`.

    Args:
        names: (N,) of the images, as they shall be stored.
        embeddings: (N, D) float32.

    Raises:
        OutputError: the file cannot be written.
        PmmError: it is a Parquet file and pyarrow is not installed.
    """
    check_embedding_file(path)
    write = _write_parquet if _is_parquet(path) else _write_npz
    with written_whole(path) as temporary:
        write(temporary, spec, names, embeddings, labels)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _write_npz(path: Path, spec: ModelSpec, names: list[str], embeddings: Embeddings, labels: Labels | None) -> None:
    arrays = {"embeddings": embeddings, "paths": np.array(names, dtype=np.str_), "spec": np.array(spec.to_json())}
    if labels:
        arrays |= {"pids": labels.pids, "camids": labels.camids, "split": labels.split}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes any of them for allow_pickle


def _write_parquet(
    path: Path, spec: ModelSpec, names: list[str], embeddings: Embeddings, labels: Labels | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    size = embeddings.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), size)
    columns = {"path": pa.array(names, pa.string()), "embedding": vectors}
    if labels:
        columns |= {"pid": pa.array(labels.pids), "camid": pa.array(labels.camids), "split": pa.array(labels.split)}
    table = pa.table(columns, metadata={METADATA_KEY: spec.to_json()})
    # Floats of an embedding hardly repeat: a dictionary of them costs time and saves nothing.
    pyarrow.parquet.write_table(table, path, use_dictionary=["split"] if labels else False)


_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class EmbeddedFiles:
    """Embeddings of the files that can be read, what is wrong with the others, and how long it took."""

    embeddings: Embeddings
    """(N, D) float32, in the order of the files."""
    rows: NDArray[np.int64]
    """(N,) which of the files each embedding is of."""
    bad: list[tuple[int, str]]
    """Which files cannot be read, and why."""
    seconds: float
    """From the first file to the last embedding."""
    model_seconds: float
    """Of `seconds`, what the network took; the rest is decoding that it had to wait for."""


def embed_files(
    embedder: Embedder, paths: Sequence[Path], batch: int | None = None, report: Report = silent
) -> Embeddings:
    """Embed image files in their order.

    Args:
        batch: images that are embedded at once; None for `embedder.chunk`.
        report: told after each batch how many images are done.

    Returns:
        (N, D) float32.

    Raises:
        DataError: an image is missing, truncated or no image.
        PmmError: `batch` is less than 1.
    """
    return _embed(embedder, paths, batch, report, skip_bad=False).embeddings


def embed_readable_files(
    embedder: Embedder, paths: Sequence[Path], batch: int | None = None, report: Report = silent
) -> EmbeddedFiles:
    """Embed the image files that can be read, in their order, and say which cannot.

    Args:
        batch: images that are embedded at once; None for `embedder.chunk`.
        report: told after each batch how many images are done.

    Raises:
        PmmError: `batch` is less than 1.
    """
    return _embed(embedder, paths, batch, report, skip_bad=True)


def _embed(
    embedder: Embedder, paths: Sequence[Path], batch: int | None, report: Report, skip_bad: bool
) -> EmbeddedFiles:
    batch = embedder.chunk if batch is None else batch
    if batch < 1:
        raise PmmError(f"a batch of {batch} images cannot be embedded", "Choose 1 or more")
    embeddings = np.empty((len(paths), embedder.spec.embedding_size), np.float32)
    rows: list[int] = []
    bad: list[tuple[int, str]] = []
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
                bad.append((row, str(image.__cause__ or image.problem)))
            else:
                raise image
        if images:
            model_start = time.perf_counter()
            embeddings[len(rows) - len(images) : len(rows)] = embedder.embed_prepared(np.stack(images))
            model_seconds += time.perf_counter() - model_start
        done += len(decoded)
        report(what, done, len(paths), f"{done / (time.perf_counter() - start):,.0f} images/s")
    seconds = time.perf_counter() - start
    return EmbeddedFiles(embeddings[: len(rows)], np.array(rows, np.int64), bad, seconds, model_seconds)


def _decoded(paths: Sequence[Path], batch: int, height: int, width: int) -> Iterator[list[Pixels | DataError]]:
    """Batches of (height, width, 3) uint8; a bounded number is decoded ahead of the one asked for."""

    def read(path: Path) -> Pixels | DataError:
        try:
            return read_crop(path, height, width)
        except DataError as error:
            return error

    pending: deque[list[Future[Pixels | DataError]]] = deque()
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="decode")
    try:
        for start in range(0, len(paths), batch):
            pending.append([pool.submit(read, path) for path in paths[start : start + batch]])
            if len(pending) > _BATCHES_AHEAD:
                yield [image.result() for image in pending.popleft()]
        while pending:
            yield [image.result() for image in pending.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)
