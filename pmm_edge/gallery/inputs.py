"""What can be added to a gallery or searched in it: images, files of `pmm embed`, and arrays."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from pmm_edge.console import Report
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.files import sha256
from pmm_edge.images import BadImage
from pmm_edge.retrieval.metrics import DISTRACTOR_PID
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embed_files import embed_parts
from pmm_edge.runtime.listing import ImageListing, unpacked
from pmm_edge.runtime.storage import Storage, require_pyarrow
from pmm_edge.spec import METADATA_KEY, ModelSpec

PART_ROWS = 2048
"""Images are embedded and files are read in parts of this size, so that memory does not grow with their number."""
_KINDS = {"ids": np.uint64, "pids": np.int64, "cameras": np.str_, "times": np.float64, "splits": np.str_}
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

Moment = datetime | str | float


@dataclass(frozen=True)
class EmbeddingModel:
    """What computed embeddings. `sha256` is that of the checkpoint, so a checkpoint and its exports are one model."""

    sha256: str
    spec: ModelSpec

    @staticmethod
    def of(model: "Embedder | EmbeddingModel") -> "EmbeddingModel":
        """The model of an embedder."""
        if isinstance(model, EmbeddingModel):
            return model
        return EmbeddingModel(model.spec.checkpoint_sha256 or sha256(model.path), model.spec)


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows to store. Without other labels, ids are derived from sources, and the other labels are unknown."""

    embeddings: NDArray[Any]  # (N, D), or (N, 0) if they are images to embed
    sources: NDArray[np.object_]
    ids: NDArray[np.uint64]
    pids: NDArray[np.int64]
    cameras: NDArray[np.str_]  # empty where the camera is not known
    times: NDArray[np.float64]  # seconds since 1970, UTC
    splits: NDArray[np.str_]  # query, gallery or train; empty outside of a data set
    images: NDArray[np.object_]  # of type `Item`, if they are images to embed

    @staticmethod
    def of(embeddings: NDArray[Any], sources: Sequence[str], images: Sequence[Any] = (), **labels: Any) -> "Rows":
        """Rows with some labels, as `labeled` takes them."""
        hashes = [blake2b(source.encode("utf-8", "surrogateescape"), digest_size=8).digest() for source in sources]
        ids, count = np.frombuffer(b"".join(hashes), "<u8") >> np.uint64(1), len(sources)
        unknown = np.full(count, DISTRACTOR_PID), np.full(count, ""), np.zeros(count), np.full(count, "")
        items = np.fromiter(images or [None] * count, object, count)
        return Rows(embeddings, np.array(sources, object), ids, *unknown, items).labeled(**labels)

    def labeled(self, **labels: Any) -> "Rows":
        """Rows with other `ids`, `pids`, `cameras`, `times` or `splits`: one value for each row or for all."""
        values, count = dict[str, Any](), len(self.sources)
        for name, given in labels.items():
            try:
                kind = _KINDS[name]
                array = whole_numbers(given, kind) if name in ("ids", "pids") else np.asarray(given).astype(kind)
                values[name] = np.broadcast_to(array, count)
                if name == "times" and count:
                    for extreme in (values[name].min(), values[name].max()):
                        local_time(extreme)
            except (ValueError, TypeError, OverflowError) as error:
                problem = f"{name} cannot be used for {count} rows: {error}"
                remedy = "Pass one value, or one per row; times are seconds since 1970"
                raise DataError(problem, remedy) from error
        return replace(self, **values)

    def select(self, chosen: NDArray[np.bool_]) -> "Rows":
        """The rows where (N,) `chosen` is True."""
        return self if chosen.all() else Rows(*(values[chosen] for values in vars(self).values()))


def whole_numbers(values: ArrayLike, kind: DTypeLike) -> NDArray[Any]:
    """Convert to a type of integers; raise ValueError, TypeError or OverflowError for what it cannot represent."""
    array = np.asarray(values)
    if array.dtype.kind == "f" and not isinstance(values, np.ndarray):
        array = np.asarray(values, object)  # NumPy rounds Python's integers if one of them needs 64 bits
    with np.errstate(invalid="ignore"):
        numbers = array.astype(kind)
    if array.dtype.kind in "iufO" and (numbers != array).any():
        raise ValueError("a value is not a whole number, or out of range")
    return numbers


def embedded_files(source: object) -> list[Path]:
    """The .npz or .parquet files of `pmm embed` that a path names; none if it names something else."""
    if not isinstance(source, str | Path):
        return []
    path = Path(source)
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    return [path] if path.suffix.lower() in (".npz", ".parquet") else []


def read_embedded(path: Path) -> Iterator[tuple[EmbeddingModel, Rows]]:
    """Read a file of `pmm embed` in parts; raise DataError if it is damaged or not such a file."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            yield _model(columns.pop("spec").item(), "", path), _rows(columns)
            return
        require_pyarrow(path)
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            metadata = {key.decode(): value.decode() for key, value in (table.schema_arrow.metadata or {}).items()}
            model = _model(metadata[METADATA_KEY], metadata.get("pmm_edge.model_sha256", ""), path)
            for batch in table.iter_batches(PART_ROWS):
                columns = {}
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    if name in ("embedding", "embeddings"):
                        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
                    else:
                        unknown = DISTRACTOR_PID if name == "pid" else ""
                        values = np.array([unknown if value is None else value for value in column.to_pylist()])
                    columns[name] = values
                yield model, _rows(columns)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "Create it with pmm embed") from error
    except PmmError:
        raise
    except Exception as error:  # zipfile, NumPy and pyarrow raise errors of many types
        raise DataError(f"{path} is not a file of pmm embed, or is damaged: {error}", "Create it again") from error


def _model(spec: str, digest: str, path: Path) -> EmbeddingModel:
    parsed = ModelSpec.from_json(spec, str(path))
    if not (digest := digest or parsed.checkpoint_sha256 or ""):
        problem = f"{path} does not say which checkpoint computed it"
        raise ModelError(problem, "Run pmm embed again, with an export of it")
    return EmbeddingModel(digest, parsed)


def _rows(columns: dict[str, NDArray[Any]]) -> Rows:
    if len({len(values) for values in columns.values()}) != 1:
        raise ValueError("its columns differ in length")
    columns = {name.removesuffix("s"): values for name, values in columns.items()}  # path in shards, paths in a file
    names = {"pid": "pids", "camid": "cameras", "split": "splits"}
    labels: dict[str, Any] = {label: columns[name] for name, label in names.items() if name in columns}
    return Rows.of(columns["embedding"], list(map(str, columns["path"].tolist())), **labels)


def image_rows(listing: ImageListing, what: str, report: Report) -> Iterator[Rows]:
    """Yield the images of a source in parts, to be filtered before `embed_rows` embeds them."""
    for _ in listing.shards():  # counts them
        pass
    for shard in listing.shards():
        images = unpacked(shard, listing.storage)
        while items := list(islice(images, PART_ROWS)):
            paths = [item.path if listing.storage.remote else item.path.absolute() for item in items]
            yield Rows.of(
                np.empty((len(items), 0)),
                list(map(str, paths)),
                items,
                pids=[DISTRACTOR_PID if item.pid is None else item.pid for item in items],
                cameras=["" if item.camid is None else str(item.camid) for item in items],
                splits=[item.split or "" for item in items],
            )
        report(what, shard[0].shard + 1, listing.count)


def embed_rows(embedder: Embedder, rows: Rows, storage: Storage) -> tuple[Rows, list[BadImage]]:
    """Embed the images of one or more rows; leave out those that cannot be read, and list them."""
    parts = list(embed_parts(embedder, [rows.images.tolist()], None, storage))
    items = [item for part in parts for item in part.items]
    rows = rows.select(np.array([not item.error for item in items]))
    bad = [BadImage(item.path, item.error) for item in items if item.error]
    return replace(rows, embeddings=np.concatenate([part.embeddings for part in parts])), bad


def seconds(moment: Moment) -> float:
    """Seconds since 1970 of a time; text is ISO 8601, in local time if it names no offset."""
    try:
        if isinstance(moment, str):
            moment = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", moment))
        return moment.timestamp() if isinstance(moment, datetime) else float(moment)
    except (ValueError, OverflowError) as error:
        raise PmmError(f"'{moment}' is not a time", "Write it like 2026-11-27T08:00 or 2026-11-27") from error


def local_time(seconds: float) -> datetime:
    """Seconds since 1970 in the time zone of this machine; raise ValueError or OverflowError if it has no such year."""
    return datetime.fromtimestamp(seconds).astimezone()


def duration(age: timedelta | str) -> timedelta:
    """A duration from text such as `30d`, `12h`, `90m` or `2w`."""
    if isinstance(age, timedelta):
        return age
    if not (match := re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([mhdw])", age)):
        raise PmmError(f"'{age}' is not a duration", "Write it like 30d, 12h, 90m or 2w")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})
