"""The gallery: what is added, how a search decides, and what is deleted. Each kind of storage is a subclass."""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmError
from pmm_edge.gallery.index import IndexFacts
from pmm_edge.gallery.inputs import (
    PART_ROWS,
    EmbeddingModel,
    Moment,
    Rows,
    duration,
    embed_rows,
    embedded_files,
    image_rows,
    local_time,
    read_embedded,
    seconds,
    whole_numbers,
)
from pmm_edge.images import BadImage
from pmm_edge.retrieval.distances import check_matrix, finite_rows, unit_length
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID
from pmm_edge.runtime import Embedder, embed_files, load
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.runtime.listing import ImageListing
from pmm_edge.spec import Calibration, Distance, Threshold

UNKNOWN = -1
"""The pid of a row whose identity is not known."""
FLAT_ROWS = 100_000
"""From this number of rows on, a search uses an index."""
FMR = 1e-3
"""Nominal false-match rate of the default threshold."""

StoredType = Literal["float32", "float16"]
Verdict = Literal["same person", "nobody", "no threshold"]


@dataclass(frozen=True)
class Where:
    """Conditions on rows, all of which must hold; None is no condition. Times are seconds since 1970, UTC."""

    cameras: Sequence[str] | None = None
    since: float | None = None  # inclusive
    before: float | None = None  # exclusive
    pids: Sequence[int] | None = None
    sources: Sequence[str] | None = None


@dataclass(frozen=True)
class Hit:
    """A row that a search found."""

    distance: float
    same_person: bool | None  # whether the distance is within the threshold; None without a threshold
    id: int
    pid: int | None
    camera: str
    time: datetime
    source: str

    @staticmethod
    def of(distance: float, number: int, pid: int, camera: str, time: float, source: str) -> "Hit":
        """A row as it is stored, before it is compared with a threshold."""
        return Hit(distance, None, number, None if pid == UNKNOWN else pid, camera, local_time(time), source)


@dataclass(frozen=True)
class SearchResult:
    """The nearest rows of one query, nearest first."""

    query: str
    hits: list[Hit]
    searched: int  # number of rows that meet the filters
    distance: Distance
    threshold: Threshold | None  # None if the model is not calibrated

    @property
    def verdict(self) -> Verdict:
        """`nobody` if no row is within the threshold."""
        if self.threshold is None:
            return "no threshold"
        return "same person" if any(hit.same_person for hit in self.hits) else "nobody"

    @property
    def expected_false_matches(self) -> float | None:
        """How many rows of other people are within the threshold on average: the rate applies to each row."""
        return None if self.threshold is None else self.threshold.fmr * self.searched


@dataclass
class AddResult:
    """What `Gallery.add` did; numbers of rows."""

    added: int = 0
    known: int = 0  # in the gallery already
    junk: int = 0  # images of a data set that show no person, which are left out
    skipped: list[BadImage] = field(default_factory=list)
    rows: int = 0  # in the gallery now


@dataclass(frozen=True)
class GalleryInfo:
    """What a gallery contains."""

    location: str
    model: EmbeddingModel
    distance: Distance
    dtype: StoredType
    rows: int
    identities: int
    cameras: list[str]
    oldest: datetime | None
    newest: datetime | None
    size: int | None = None  # bytes of its rows and index; None on a server
    index: IndexFacts | None = None  # of a folder with 100,000 rows or more


class Gallery(ABC):
    """Embeddings of people with identity, camera, time and source. `open_gallery` opens one."""

    model: EmbeddingModel | None = None  # of the rows; None while the gallery does not exist
    distance: Distance
    dtype: StoredType

    def __init__(self, location: str, model: Embedder | EmbeddingModel | None) -> None:
        self.location = location
        self._embedder = model if isinstance(model, Embedder) else None
        self._user_model = None if model is None else EmbeddingModel.of(model)

    @abstractmethod
    def _create(self, model: EmbeddingModel) -> None:
        """Create an empty gallery."""

    @abstractmethod
    def _known(self, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which ids are in the gallery."""

    @abstractmethod
    def _append(self, rows: Rows, report: Report) -> None:
        """Store rows with new ids. An error loses nothing that was stored before."""

    @abstractmethod
    def _nearest(self, queries: Embeddings, top: int, where: Where, exact: bool) -> tuple[int, list[list[Hit]]]:
        """Return the number of rows that meet the conditions, and the nearest of them for each query."""

    @abstractmethod
    def _remove(self, where: Where, report: Report) -> int:
        """Delete rows, verify that they are gone, and return their number."""

    @abstractmethod
    def info(self, check: bool = False) -> GalleryInfo:
        """Describe the gallery; `check` also reads all of it, and raises DataError if something is damaged."""

    def _writing(self) -> AbstractContextManager[None]:
        """Exclude other writers."""
        return nullcontext()

    def _finish(self, report: Report) -> None:  # noqa: B027  a server keeps its own
        """Bring the index up to date."""

    def add(
        self,
        source: Any,
        *,
        pids: ArrayLike | None = None,
        cameras: ArrayLike | None = None,
        times: Moment | Sequence[float] | NDArray[np.float64] | None = None,
        sources: Sequence[str] | None = None,
        ids: ArrayLike | None = None,
        layout: str | None = None,
        split: str | None = None,
        report: Report = silent,
    ) -> AddResult:
        """Add rows. A row whose id is in the gallery is left out, so an interrupted call can be repeated.

            gallery.add("crops/", cameras="lobby", times="2026-11-27T08:00")
            gallery.add(embeddings, sources=names, pids=pids)

        Args:
            source: images as for `pmm_edge.embed_shards`, embedded with the model of `open_gallery`; a .npz or .parquet
                file of `pmm embed`, or a folder of .parquet files; or an (N, D) array, which needs `sources`.
            pids: identity of each row, or of all; -1 is unknown. Default: that of the data set.
            cameras: name of the camera of each row, or of all. Default: that of the data set.
            times: when each image, or all, were taken: ISO 8601, or seconds since 1970. Default: now.
            sources: where each row of an array comes from.
            ids: a whole number for each row of an array. Default: derived from its source.
            split: add only the `query`, `gallery` or `train` images of a data set.

        Raises ModelError for embeddings of another model or size, DataError if the source cannot be read,
        CheckFailedError if none of its images can, and OutputError if the gallery cannot be written or another process
        is writing to it; what was added before stays.
        """
        moments = time.time() if times is None else seconds(times) if isinstance(times, str | datetime) else times
        given = {"ids": ids, "pids": pids, "cameras": cameras, "times": moments}
        labels = {name: values for name, values in given.items() if values is not None}
        done, listing = AddResult(), None
        parts: Iterable[tuple[EmbeddingModel, Rows]]
        with self._writing():
            if sources is not None or isinstance(source, np.ndarray):
                parts = [self._array(source, sources)]
            elif files := embedded_files(source):
                parts = chain.from_iterable(map(read_embedded, files))
            else:
                embedder, listing = self._required_embedder(), ImageListing(source, layout, PART_ROWS)
                what, model = f"embedding with {embedder.path.name}", EmbeddingModel.of(embedder)
                parts = ((model, rows) for rows in image_rows(listing, what, report))
            for model, rows in parts:
                self._check(model)
                if split and (rows.splits != "").any():
                    rows = rows.select(rows.splits == split)
                junk = rows.pids == JUNK_PID
                rows = rows.select(~junk)
                rows = rows.labeled(**{"pids": np.where(rows.pids == DISTRACTOR_PID, UNKNOWN, rows.pids)} | labels)
                first = np.unique(rows.ids, return_index=True)[1]
                new = np.isin(np.arange(len(rows.ids)), first) & ~self._known(rows.ids)
                rows = rows.select(new)
                done.junk, done.known = done.junk + int(junk.sum()), done.known + int((~new).sum())
                if listing and new.any():
                    rows, bad = embed_rows(embedder, rows, listing.storage)
                    done.skipped += bad
                if not len(rows.ids):
                    continue
                if self.model is None:
                    self._create(model)
                self._append(replace(rows, embeddings=self._checked(rows.embeddings)), report)
                done.added += len(rows.ids)
            if done.added:
                self._finish(report)
        if done.skipped and not done.added + done.known:
            problem = f"none of the {len(done.skipped):,} images can be read: {done.skipped[0]}"
            raise CheckFailedError(problem, "Replace the files, or name other images")
        done.rows = self.info().rows if self.model else 0
        return done

    def search(
        self,
        query: Any,
        *,
        top: int = 10,
        cameras: str | Collection[str] | None = None,
        since: Moment | None = None,
        before: Moment | None = None,
        fmr: float | None = None,
        exact: bool = False,
        report: Report = silent,
    ) -> list[SearchResult]:
        """Find the rows nearest to each query among those that meet the filters.

            for hit in gallery.search("query.jpg", cameras=["lobby"])[0].hits:
                print(hit.source, hit.distance, hit.same_person)

        Args:
            query: images as for `pmm_edge.embed_files`; a list of (H, W, 3) uint8 RGB crops; a .npz or .parquet file of
                `pmm embed`; or a (Q, D) array of embeddings.
            top: maximum number of hits per query.
            cameras, since, before: search only rows of these cameras, from this time on, and before that time.
            fmr: nominal false-match rate of the threshold. Default: 0.001, if the model is calibrated for it.
            exact: compare every row instead of using the index.

        Raises DataError if there is no gallery, ModelError for a query of another model or size, or if there is no
        threshold for `fmr`.
        """
        model = self._existing()
        if top < 1:
            raise PmmError(f"the {top} nearest rows cannot be searched", "Choose 1 or more")
        names, queries, calibration = self._queries(query, report)
        threshold = self._threshold(calibration or model.spec.calibration, fmr)
        first, end = (None if moment is None else seconds(moment) for moment in (since, before))
        where = Where(None if cameras is None else list(map(str, _listed(cameras))), first, end)
        searched, found = self._nearest(self._checked(queries), top, where, exact)
        if threshold:
            found = [[replace(hit, same_person=hit.distance <= threshold.distance) for hit in hits] for hits in found]
        return [
            SearchResult(name, hits, searched, self.distance, threshold)
            for name, hits in zip(names, found, strict=True)
        ]

    def delete(
        self,
        *,
        pids: int | Collection[int] | None = None,
        sources: str | Collection[str] | None = None,
        older_than: timedelta | str | None = None,
        report: Report = silent,
    ) -> int:
        """Delete the rows that meet all given conditions, verify that none is left, and return their number.

        `older_than` is a duration such as `30d`, `12h` or `90m`, compared with the time of each row. Raises DataError
        if there is no gallery, PmmError without a condition or for pids that are not whole numbers, OutputError if the
        gallery cannot be written.
        """
        self._existing()
        if pids is None and sources is None and older_than is None:
            raise PmmError("deleting needs an identity, a source or an age", "Name what to delete")
        before = None if older_than is None else time.time() - duration(older_than).total_seconds()
        try:
            numbers = None if pids is None else whole_numbers(_listed(pids), np.int64).tolist()
        except (ValueError, TypeError, OverflowError) as error:
            raise PmmError(f"{pids} cannot be identities: {error}", "Pass whole numbers") from error
        texts = None if sources is None else _listed(sources)
        with self._writing():
            return self._remove(Where(before=before, pids=numbers, sources=texts), report)

    def _existing(self) -> EmbeddingModel:
        if self.model is None:
            raise DataError(f"there is no gallery at {self.location}", "Create it with pmm gallery add")
        return self.model

    def _check(self, model: EmbeddingModel) -> None:
        """Raise ModelError if embeddings of this model cannot be compared with the rows."""
        if (own := self.model) is None or model is own:
            return
        what, remedy = f"{self.location} holds embeddings of another model", "Use that model, or another gallery"
        if model.spec.embedding_size != own.spec.embedding_size:
            sizes = f"{own.spec.embedding_size} values, not {model.spec.embedding_size}"
            raise ModelError(f"{what}: they have {sizes}", remedy)
        if model.sha256 != own.sha256:
            raise ModelError(f"{what}: its checkpoint is {own.sha256[:12]}, not {model.sha256[:12]}", remedy)
        if model.spec.normalized_output != own.spec.normalized_output and self.distance == "euclidean":
            raise ModelError(f"{what}: only one of them was exported with --normalize-output", remedy)

    def _checked(self, values: ArrayLike) -> Embeddings:
        """Embeddings as they are stored: (N, D) float32, of unit length for cosine distance."""
        embeddings = np.ascontiguousarray(check_matrix(values, "embeddings"), np.float32)
        if embeddings.shape[1] != (size := self._existing().spec.embedding_size):
            problem = f"the embeddings have {embeddings.shape[1]} values, those of {self.location} {size}"
            raise ModelError(problem, "Use the model of the gallery")
        if self.distance == "cosine":
            good = finite_rows(embeddings) & embeddings.any(axis=1)
            embeddings = unit_length(embeddings)
        else:
            good = finite_rows(embeddings if self.dtype == "float32" else embeddings.astype(self.dtype))
        if not good.all():
            problem = f"embedding {good.argmin()} is not finite in {self.dtype}, or has length 0 and no cosine"
            raise DataError(problem, "Check the image and the precision of the model")
        return embeddings

    def _required_embedder(self) -> Embedder:
        if self._embedder is None:
            raise PmmError("images can only be embedded with a model", "Name the model of the gallery (--model)")
        return self._embedder

    def _array(self, values: ArrayLike, sources: Sequence[str] | None) -> tuple[EmbeddingModel, Rows]:
        if sources is None:
            raise DataError("an array does not say where its rows come from", "Pass sources, a name for each row")
        if self._user_model is None:
            raise PmmError("an array does not say which model computed it", "Pass the model to open_gallery")
        embeddings = check_matrix(values, "embeddings")
        if len(embeddings) != len(sources):
            raise DataError(f"there are {len(embeddings)} embeddings and {len(sources)} sources", "Pass one for each")
        return self._user_model, Rows.of(embeddings, sources)

    def _queries(self, query: Any, report: Report) -> tuple[list[str], ArrayLike, Calibration | None]:
        """Return name and embedding of each query, and the thresholds of the model that computed them."""
        if files := embedded_files(query):
            parts = list(chain.from_iterable(map(read_embedded, files)))
            for model, _ in parts:
                self._check(model)
            if not (names := [name for _, rows in parts for name in rows.sources]):
                raise DataError(f"{query} contains no embeddings", "Name a file with at least one")
            return names, np.concatenate([rows.embeddings for _, rows in parts]), parts[0][0].spec.calibration
        calibration = self._user_model.spec.calibration if self._user_model else None
        if isinstance(query, np.ndarray) and query.dtype.kind == "f":
            rows = np.atleast_2d(query)
        elif isinstance(query, np.ndarray) or (
            isinstance(query, list | tuple) and query and isinstance(query[0], np.ndarray)
        ):
            rows = self._required_embedder().embed(query)
        else:
            embedded = embed_files(self._required_embedder(), query, report=report)
            return list(map(str, embedded.images.paths)), embedded.embeddings, calibration
        return [f"query {number}" for number in range(len(rows))], rows, calibration

    def _threshold(self, calibration: Calibration | None, fmr: float | None) -> Threshold | None:
        if calibration is None and fmr is not None:
            remedy = "Run pmm calibrate and pmm export, and open the gallery with that model"
            raise ModelError(f"the model of {self.location} has no decision thresholds", remedy)
        try:
            return calibration.threshold(FMR if fmr is None else fmr, self.distance) if calibration else None
        except ModelError:
            if fmr is None:  # too few people for the default
                return None
            raise


def _listed(values: Any) -> list[Any]:
    """One value or several as a list."""
    return [values] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)


def open_gallery(
    location: str | Path,
    model: Embedder | EmbeddingModel | str | Path | None = None,
    *,
    distance: Distance | None = None,
    dtype: StoredType | None = None,
    device: str | int | None = None,
    client: Any = None,
) -> Gallery:
    """Open a gallery, or prepare a new one, which the first `add` creates.

        gallery = pmm_edge.open_gallery("people", model="model.onnx")
        gallery.add("crops/", cameras="lobby")
        gallery.search("query.jpg")[0].verdict    # "same person", "nobody" or "no threshold"
        gallery.delete(older_than="30d")

    Args:
        location: a folder, or the URL of a Qdrant collection, `http://HOST:6333/COLLECTION`.
        model: embeds images: an embedder, or a file for `pmm_edge.load`, on `device`.
        distance: of a new gallery. Default: that of the model.
        dtype: of the vectors of a new folder, float32 (default) or float16, which halves it.
        client: a `qdrant_client.QdrantClient` to use; `location` is then the name of the collection.

    One process may write to a folder at a time. A gallery shows the rows of the moment when it was opened, and its own
    changes; open it again to see those of others. Raises ModelError if the gallery holds embeddings of another model,
    DataError if it is damaged or has another distance or dtype, PmmError if a package is missing or Qdrant does not
    answer.
    """
    chosen = (("distance", distance, get_args(Distance)), ("dtype", dtype, get_args(StoredType)))
    for name, wanted, known in chosen:
        if wanted is not None and wanted not in known:
            raise PmmError(f"unknown {name} '{wanted}'", f"Choose {' or '.join(known)}")
    user_model = load(model, device) if isinstance(model, str | Path) else model
    gallery: Gallery
    if client is not None or str(location).startswith(("http://", "https://")):
        from pmm_edge.gallery.qdrant import QdrantGallery

        gallery = QdrantGallery(str(location), user_model, distance, client)
    else:
        from pmm_edge.gallery.folder import FolderGallery

        gallery = FolderGallery(Path(location), user_model, distance, dtype)
    for name, wanted, _ in chosen:
        if wanted is not None and wanted != (own := getattr(gallery, name, wanted)):  # a new folder has neither yet
            problem = f"the {name} of {location} is {own}, not {wanted}"
            raise DataError(problem, "Leave it out, or use another gallery")
    if gallery._user_model:
        gallery._check(gallery._user_model)
    return gallery
