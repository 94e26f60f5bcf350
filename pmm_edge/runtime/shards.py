"""Embed any number of images into a folder of Parquet files, in bounded memory, so that a killed run can be resumed.

The list of images is cut into shards in a fixed way: what a shard contains follows from its number. Each is written
whole, so that after a kill a shard is either finished or missing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from pmm_edge import __version__
from pmm_edge.console import Report, silent
from pmm_edge.data.loader import ahead
from pmm_edge.errors import CheckFailedError, DataError, ModelError, OutputError, PmmError, PmmWarning
from pmm_edge.files import check_new_folder, decode_json, encode_json, json_digest, remove_unfinished, sha256
from pmm_edge.images import BadImage
from pmm_edge.runtime.embed_files import Part, embed_parts, utf8
from pmm_edge.runtime.embedder import Embedder, Embeddings
from pmm_edge.runtime.listing import ImageListing, Item, unpacked
from pmm_edge.runtime.storage import Storage, require_pyarrow
from pmm_edge.spec import METADATA_KEY, ModelSpec

EmbeddingType = Literal["float32", "float16"]
SHARD_ROWS = 8192
"""Images of one shard; a tar file is a shard of its own."""
GROUP_ROWS = 1024  # rows that are kept in memory until they are written
MANIFEST, BAD_FOLDER = "_manifest.json", "_bad"  # readers of Parquet folders ignore names that start with _
LISTED = 20  # unreadable images that a result names


@dataclass(frozen=True)
class Manifest:
    """What the shards of a folder contain, in `_manifest.json`."""

    model: str  # name of the model file
    model_sha256: str  # of its checkpoint, if the spec has it, or else of the file
    file_sha256: str
    spec: ModelSpec
    dtype: EmbeddingType
    shard_rows: int
    files: int  # images and tar files
    shards: int
    list_sha256: str  # of their names and labels, and of the sizes of tar files
    pmm_edge: str = __version__

    @property
    def job(self) -> str:
        """Identifies shards that belong together."""
        return json_digest({name: getattr(self, name) for name in _JOB})

    def metadata(self, shard: int) -> dict[str, str]:
        """The schema metadata of a shard."""
        own = {"model_sha256": self.model_sha256, "distance": self.spec.distance, "version": self.pmm_edge}
        own |= {"job": self.job, "shard": str(shard)}
        return {METADATA_KEY: self.spec.to_json()} | {f"pmm_edge.{name}": value for name, value in own.items()}


_JOB = {
    "file_sha256": "with another model",
    "list_sha256": "from other images",
    "dtype": "with another --dtype",
    "shard_rows": "with another --shard-rows",
}


@dataclass(eq=False)
class EmbeddedShards:
    """A folder of Parquet files `shard-NNNNNN.parquet`, and unreadable images in `_bad/`."""

    folder: str  # or URL
    manifest: Manifest
    storage: Storage
    backend: str
    device: str
    rows: int = 0  # in all shards
    bad: int = 0
    skipped: list[BadImage] = field(default_factory=list)  # the first of them that this run met
    kept: int = 0  # shards that an earlier run has finished
    embedded: int = 0  # images of this run
    seconds: float = 0.0

    def add(self, shard: EmbeddedShards) -> None:
        """Count a shard that another process has written."""
        self.rows, self.bad, self.embedded = self.rows + shard.rows, self.bad + shard.bad, self.embedded + shard.rows
        self.skipped += shard.skipped[: LISTED - len(self.skipped)]
        self.backend, self.device = shard.backend, shard.device


class Job(NamedTuple):
    """What a process on another machine needs to embed shards."""

    model: Path
    device: str | int | None
    batch: int | None
    images: Storage
    target: Storage
    manifest: Manifest


def embed_shards(
    model: Embedder | str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    layout: str | None = None,
    device: str | int | None = None,
    batch: int | None = None,
    dtype: EmbeddingType = "float32",
    shard_rows: int = SHARD_ROWS,
    ray: str | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> EmbeddedShards:
    """Embed any number of images into a folder of Parquet files, or resume a run that was killed.

        pmm_edge.embed_shards("model.onnx", "crops/", "embeddings/")
        pyarrow.dataset.dataset("embeddings/")      # path, pid, camid, split, embedding

    Args:
        model: an embedder, or a file for `pmm_edge.load`, on `device`.
        images: what `find_images` accepts, a tar file in WebDataset naming, or a folder or list with tar files. The
            file `key.json` of an image `key.jpg` in a tar file may have `pid`, `camid` and `split`, `key.cls` the pid.
        out: a new folder, or that of a run with the same model, images and settings: its finished shards are kept.
        batch: number of images per call of the network; None for `embedder.chunk`.
        dtype: of the embeddings, a fixed-size list of D values.
        shard_rows: images per shard; each tar file is one shard.
        ray: embed on a Ray cluster: its address, `auto` for the running one, or `local` to start one on this machine.
        workers: number of processes there; None for one per GPU or, without GPUs, one per CPU.

    `images` and `out` may be URLs of object storage, such as `s3://bucket/crops`. Images that cannot be read are listed
    in `out/_bad/`, with the reason. Raises DataError if there are no images or the list changes meanwhile, ModelError
    if the model cannot be loaded, OutputError if `out` cannot be written or holds other embeddings, CheckFailedError
    if no image can be read, and PmmError if the cluster does not answer.
    """
    from pmm_edge.runtime import load

    require_pyarrow(out)
    if shard_rows < 1 or (batch is not None and batch < 1):
        raise PmmError(f"shards of {shard_rows} and batches of {batch} images are impossible", "Choose 1 or more")
    if dtype not in (known := get_args(EmbeddingType)):
        raise PmmError(f"embeddings cannot be stored as {dtype}", f"Choose {' or '.join(known)}")
    if workers is not None and ray is None:
        raise PmmError("workers are processes on a Ray cluster", "Add --ray local, or leave out --workers")
    target, listing = Storage.of(out), ImageListing(images, layout, shard_rows)
    if target.remote is None and not (target.root / MANIFEST).exists():
        remove_unfinished(target.root / MANIFEST)  # of a run that was killed at its start
        check_new_folder(target.root)
    listed = 0
    for items in listing.shards():
        listed += len(items)
        report("listing files", listed, listed)
    embedder = model if isinstance(model, Embedder) else load(model, device)
    digest = sha256(embedder.path)
    checkpoint = embedder.spec.checkpoint_sha256 or digest
    settings = embedder.path.name, checkpoint, digest, embedder.spec, dtype, shard_rows
    manifest = Manifest(*settings, listing.files, listing.count, listing.digest)
    _claim(target, manifest)
    result = EmbeddedShards(str(out), manifest, target, embedder.backend, embedder.device)
    finished = _finished(result, report)
    start, what = time.perf_counter(), f"embedding with {embedder.path.name}"

    def shown(done: int) -> None:
        speed = f"{result.embedded:,} images, {result.embedded / (time.perf_counter() - start):,.0f}/s"
        report(what, result.kept + done, manifest.shards, speed)

    todo = (items for items in listing.shards() if items[0].shard not in finished)
    if ray is None:
        shards = (unpacked(items, listing.storage) for items in todo)
        with closing(ahead(embed_parts(embedder, shards, batch, listing.storage), 64)) as parts:
            for done, (number, own) in enumerate(groupby(parts, lambda part: part.items[0].shard)):
                write_shard(result, number, own, partial(shown, done))
                shown(done + 1)
    else:
        from pmm_edge.runtime.ray_embed import embed_on_ray

        job = Job(embedder.path, device, batch, listing.storage, target, manifest)
        for done, part in enumerate(embed_on_ray(ray, workers, job, todo), 1):
            result.add(part)
            shown(done)
    result.seconds = time.perf_counter() - start
    if listing.digest != manifest.list_sha256:
        problem = f"images were added to {images} or removed while they were embedded"
        raise DataError(problem, "Embed them again, into a new folder")
    if not result.rows:
        reason = f": {result.skipped[0]}" if result.skipped else ""
        raise CheckFailedError(f"none of the {result.bad:,} images can be read{reason}", "Name other images")
    return result


def _claim(target: Storage, manifest: Manifest) -> None:
    """Write the manifest; if the folder has one, raise OutputError unless its shards are those of this run."""
    path, remedy = target.root / MANIFEST, "Name a new folder, or repeat the command that started this one"
    if target.size(path) is not None:
        with target.open(path) as file:
            earlier = decode_json(Manifest, file.read(), str(path), OutputError, remedy)
        for name, difference in _JOB.items():
            if getattr(earlier, name) != getattr(manifest, name):
                count = f" ({earlier.files:,} files, now {manifest.files:,})" if name == "list_sha256" else ""
                raise OutputError(f"the embeddings in {target.root} were computed {difference}{count}", remedy)
    with target.written(path) as sink:
        sink.write(encode_json(manifest).encode())


def _finished(result: EmbeddedShards, report: Report) -> set[int]:
    """The numbers of the finished shards, which are counted; raise OutputError for a file of another run."""
    manifest, finished = result.manifest, set[int]()
    for path in result.storage.files(deep=False):
        if path.suffix != ".parquet":
            continue
        number = int(digits) if (digits := path.stem.removeprefix("shard-")).isdecimal() else -1
        try:
            rows, bad = _check_shard(result.storage, path, manifest, number)
        except PmmError:
            raise
        except Exception as error:  # pyarrow raises errors of many types
            warnings.warn(f"{path} is damaged and is written again: {error}", PmmWarning, stacklevel=3)
            continue
        finished.add(number)
        report("checking finished shards", len(finished), manifest.shards)
        result.rows, result.bad, result.kept = result.rows + rows, result.bad + bad, result.kept + 1
    return finished


def _check_shard(target: Storage, path: Path, manifest: Manifest, number: int) -> tuple[int, int]:
    """Read a shard and verify its checksums; return its numbers of rows and of unreadable images."""
    from pyarrow.parquet import ParquetFile

    def read(path: Path) -> tuple[int, dict[str, str]]:
        with target.open(path) as source, ParquetFile(source, page_checksum_verification=True) as file:
            metadata = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
            if (metadata.get("pmm_edge.job"), metadata.get("pmm_edge.shard")) != (manifest.job, str(number)):
                problem = f"{path} was written by another run or with another model"
                raise OutputError(problem, "Move it, or name another folder")
            return sum(len(file.read_row_group(group)) for group in range(file.num_row_groups)), metadata

    rows, metadata = read(path)
    expected, bad = (int(metadata[f"pmm_edge.{name}"]) for name in ("rows", "bad"))
    found_bad = read(target.root / BAD_FOLDER / path.name)[0] if bad else 0
    if (rows, found_bad) != (expected, bad):
        raise ValueError(f"it has {rows} rows and {found_bad} bad images, not {expected} and {bad}")
    return rows, bad


def write_shard(result: EmbeddedShards, number: int, parts: Iterable[Part], report: Callable[[], None]) -> None:
    """Write a shard from its parts, and the table of its unreadable images, and count both in `result`."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    manifest, path = result.manifest, result.storage.root / f"shard-{number:06d}.parquet"
    labels = {"path": pa.string(), "pid": pa.int64(), "camid": pa.int64(), "split": pa.string()}
    metadata, kind = manifest.metadata(number), pa.from_numpy_dtype(manifest.dtype)
    schema = pa.schema({**labels, "embedding": pa.list_(kind, manifest.spec.embedding_size)}, metadata)
    options = {"use_dictionary": ["split", "camid"], "write_page_checksum": True}
    items, embeddings, bad = list[Item](), list[Embeddings](), list[Item]()
    total = 0

    def table(items: list[Item], schema: Any, last: Any) -> Any:
        rows = [(utf8(item.name), item.pid, item.camid, item.split) for item in items]
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), schema.types, strict=False)]
        return pa.Table.from_arrays([*columns, last], schema=schema)

    def write_rows() -> None:
        values = np.concatenate(embeddings).astype(manifest.dtype)
        if manifest.dtype == "float16" and np.isinf(values).any():
            raise ModelError(f"embeddings of {manifest.model} exceed the range of float16", "Use --dtype float32")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        writer.write_table(table(items, schema, vectors))
        items.clear()
        embeddings.clear()

    with result.storage.written(path) as sink, ParquetWriter(sink, schema, **options) as writer:
        for part in parts:
            items += [item for item in part.items if not item.error]
            embeddings.append(part.embeddings)
            bad += [item for item in part.items if item.error]
            result.embedded, total = result.embedded + len(part.embeddings), total + len(part.embeddings)
            report()
            if len(items) >= GROUP_ROWS:
                write_rows()
        if items:
            write_rows()
        if bad:
            bad_schema = pa.schema({**labels, "error": pa.string()}, metadata)
            place = result.storage.written(path.parent / BAD_FOLDER / path.name)
            with place as other, ParquetWriter(other, bad_schema, **options) as bad_writer:
                bad_writer.write_table(table(bad, bad_schema, pa.array([utf8(item.error) for item in bad])))
        writer.add_key_value_metadata({"pmm_edge.rows": str(total), "pmm_edge.bad": str(len(bad))})
    result.rows, result.bad = result.rows + total, result.bad + len(bad)
    result.skipped += [BadImage(item.path, item.error) for item in bad[: LISTED - len(result.skipped)]]
