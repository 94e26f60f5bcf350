"""What can be added to a gallery or searched in it: images, files of `pmm embed`, and arrays."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report
from pmm_edge.errors import DataError, ModelError, PmmError, absent, install
from pmm_edge.files import sha256
from pmm_edge.images import BadImage
from pmm_edge.retrieval.metrics import DISTRACTOR_PID
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embed_files import find_images
from pmm_edge.spec import METADATA_KEY, ModelSpec

PART_ROWS = 2048
"""Images are embedded and files are read in parts of this size, so that memory does not grow with their number."""
_COLUMNS = {"path": "paths", "pid": "pids", "camid": "camids", "embedding": "embeddings"}
_LABELS = ("pids", "camids", "split")
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
class Part:
    """N embeddings of one model, with the labels of a data set if they come from one."""

    model: EmbeddingModel
    embeddings: NDArray[Any]  # (N, D)
    sources: list[str]
    pids: NDArray[np.int64] | None = None  # -1 is junk, 0 is unknown
    camids: NDArray[Any] | None = None  # or text
    split: NDArray[np.str_] | None = None

    def select(self, chosen: NDArray[np.bool_]) -> "Part":
        """The rows where (N,) `chosen` is True."""
        labels: dict[str, Any] = {
            name: values[chosen] for name in _LABELS if (values := getattr(self, name)) is not None
        }
        sources = [self.sources[row] for row in np.flatnonzero(chosen)]
        return replace(self, embeddings=self.embeddings[chosen], sources=sources, **labels)


def source_ids(sources: Sequence[str]) -> NDArray[np.uint64]:
    """Derive the id of each row from its source: 63 bits of a hash."""
    hashes = (blake2b(source.encode("utf-8", "surrogateescape"), digest_size=8).digest() for source in sources)
    return np.frombuffer(b"".join(hashes), "<u8") >> np.uint64(1)


def embedded_files(source: object) -> list[Path]:
    """The .npz or .parquet files of `pmm embed` that a path names; none if it names something else."""
    if not isinstance(source, str | Path):
        return []
    path = Path(source)
    if path.suffix.lower() in (".npz", ".parquet") and not path.is_dir():
        return [path]
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


def read_embedded(path: Path) -> Iterator[Part]:
    """Read a file of `pmm embed` in parts; raise DataError if it is damaged or not such a file."""
    problem = f"{path} is not a file of pmm embed, or is damaged"
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files if name not in ("spec", "model_sha256")}
                model = _model(file["spec"].item(), str(file.get("model_sha256", "")), path)
            yield _part(model, columns)
            return
        if missing := absent("pyarrow"):
            raise PmmError(f"{path} cannot be read: {missing}", install("parquet"))
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            metadata = {key.decode(): value.decode() for key, value in (table.schema_arrow.metadata or {}).items()}
            model = _model(metadata[METADATA_KEY], metadata.get("pmm_edge.model_sha256", ""), path)
            for batch in table.iter_batches(PART_ROWS):
                columns = {}
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    if name in ("embedding", "embeddings"):
                        flat = column.flatten().to_numpy(zero_copy_only=False)
                        columns[name] = flat.reshape(len(column), -1)
                    elif column.null_count < len(column):
                        absent_value = DISTRACTOR_PID if name == "pid" else ""
                        values = [absent_value if value is None else value for value in column.to_pylist()]
                        columns[name] = np.array(values)
                yield _part(model, columns)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "Create it with pmm embed") from error
    except (ValueError, KeyError, EOFError, OSError, BadZipFile, AttributeError) as error:
        raise DataError(f"{problem}: {error}", "Create it again") from error


def _model(spec: str, digest: str, path: Path) -> EmbeddingModel:
    parsed = ModelSpec.from_json(spec, str(path))
    if not (digest := digest or parsed.checkpoint_sha256 or ""):
        raise ModelError(
            f"{path} does not say which checkpoint computed it", "Run pmm embed again, with an export of it"
        )
    return EmbeddingModel(digest, parsed)


def _part(model: EmbeddingModel, columns: dict[str, NDArray[Any]]) -> Part:
    columns = {_COLUMNS.get(name, name): values for name, values in columns.items()}
    labels = {name: columns[name] for name in _LABELS if name in columns}
    if not all(len(values) == len(columns["embeddings"]) for values in columns.values()):
        raise ValueError("its columns differ in length")
    return Part(model, columns["embeddings"], list(map(str, columns["paths"].tolist())), **labels)


def embed_parts(
    embedder: Embedder,
    images: Any,
    layout: str | None,
    is_new: Callable[[list[str]], NDArray[np.bool_]],
    skipped: list[BadImage],
    report: Report,
) -> Iterator[Part]:
    """Embed images in parts; those that are not new get zeros, and unreadable ones are appended to `skipped`."""
    found, model = find_images(images, layout), EmbeddingModel.of(embedder)
    paths, total = [path.absolute() for path in found.paths], len(found.paths)
    for start in range(0, total, PART_ROWS):
        part = paths[start : start + PART_ROWS]
        sources = list(map(str, part))
        embeddings, usable = np.zeros((len(part), model.spec.embedding_size), np.float32), np.ones(len(part), np.bool_)
        if (new := np.flatnonzero(is_new(sources))).size:
            embedded = embed_files(embedder, [part[row] for row in new], skip_bad=True)
            bad = {image.path for image in embedded.skipped}
            usable[new] = [part[row] not in bad for row in new]
            embeddings[new[usable[new]]] = embedded.embeddings
            skipped += embedded.skipped
        labels = {name: found.labels[name][start : start + PART_ROWS] for name in _LABELS} if found.labels else {}
        yield Part(model, embeddings, sources, **labels).select(usable)
        report(f"embedding with {embedder.path.name}", start + len(part), total)


def seconds(moment: Moment) -> float:
    """Seconds since 1970 of a time; text is ISO 8601, in local time if it names no offset."""
    try:
        if isinstance(moment, str):
            moment = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", moment))
        return moment.timestamp() if isinstance(moment, datetime) else float(moment)
    except (ValueError, OverflowError) as error:
        raise PmmError(f"'{moment}' is not a time", "Write it like 2026-11-27T08:00 or 2026-11-27") from error


def duration(age: timedelta | str) -> timedelta:
    """A duration from text such as `30d`, `12h`, `90m` or `2w`."""
    if isinstance(age, timedelta):
        return age
    if not (match := re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([mhdw])", age)):
        raise PmmError(f"'{age}' is not a duration", "Write it like 30d, 12h, 90m or 2w")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})
