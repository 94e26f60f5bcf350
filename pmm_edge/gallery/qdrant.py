"""A gallery in a Qdrant collection: on a server or a cluster, for many writers and more rows than one machine holds.

A point is a row: its id, its vector, and the payload pid, camera, time and source. The metadata of the collection
holds the model and the distance. Needs Qdrant 1.16 or later, which introduced that metadata.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report
from pmm_edge.errors import DataError, OutputError, PmmError, absent, install
from pmm_edge.files import decode_json, encode_json
from pmm_edge.gallery.gallery import FLAT_ROWS, UNKNOWN, Gallery, GalleryInfo, Hit, Where
from pmm_edge.gallery.inputs import EmbeddingModel, Rows, local_time
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import Distance, ModelSpec

METADATA = "pmm_edge"
BATCH = 256  # rows of a request: 1,536 values each are 8 MB of JSON, and a server accepts 32 MB
SEARCHES = 32  # queries of a request
KEYS = {"pid": "INTEGER", "camera": "KEYWORD", "time": "FLOAT", "source": "KEYWORD"}


class QdrantGallery(Gallery):
    """A gallery in a Qdrant collection; `client` is a `QdrantClient`, and `url` then names the collection."""

    dtype = "float32"

    def __init__(
        self, url: str, model: Embedder | EmbeddingModel | None, distance: Distance | None = None, client: Any = None
    ) -> None:
        if missing := absent("qdrant_client"):
            raise PmmError(f"{url} needs the client of Qdrant: {missing}", install("gallery"))
        from qdrant_client import QdrantClient

        super().__init__(url, model)
        self._distance, self.collection = distance, url if client is not None else urlsplit(url).path.strip("/")
        if not self.collection or "/" in self.collection:
            raise PmmError(f"{url} does not name a collection", "Write http://HOST:6333/COLLECTION")
        with self._reported():
            server = url.rpartition("/" + self.collection)[0]
            key = os.environ.get("QDRANT_API_KEY")
            self.client = client or QdrantClient(url=server, api_key=key, timeout=60, check_compatibility=False)
            if not self.client.collection_exists(self.collection):
                return
            metadata = (self.client.get_collection(self.collection).config.metadata or {}).get(METADATA)
        if metadata is None:
            raise DataError(f"{url} was not created by pmm gallery", "Name another collection; Qdrant 1.16 or later")
        stored = decode_json(tuple[str, ModelSpec, Distance], metadata, url)
        self.model, self.distance = EmbeddingModel(*stored[:2]), stored[2]

    @contextmanager
    def _reported(self) -> Iterator[None]:
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        try:
            yield
        except (ApiException, QdrantException, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            remedy = "Check the URL, that the server runs, and QDRANT_API_KEY"
            raise OutputError(f"the request to Qdrant failed, {self.location}: {reason[:300]}", remedy) from error

    def _create(self, model: EmbeddingModel) -> None:
        from qdrant_client import models

        distance = self._distance or model.spec.distance
        kind = models.Distance.EUCLID if distance == "euclidean" else models.Distance.COSINE
        vectors = models.VectorParams(size=model.spec.embedding_size, distance=kind, on_disk=True)
        metadata = {METADATA: encode_json((model.sha256, model.spec, distance), indent=0)}
        with self._reported():
            self.client.create_collection(self.collection, vectors_config=vectors, metadata=metadata)
            for name, type_name in KEYS.items():
                self.client.create_payload_index(self.collection, name, getattr(models.PayloadSchemaType, type_name))
        self.model, self.distance = model, distance

    def _known(self, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        if self.model is None:
            return np.zeros(len(ids), np.bool_)
        found: set[int] = set()
        with self._reported():
            for start in range(0, len(ids), 16 * BATCH):
                part = ids[start : start + 16 * BATCH].tolist()
                points = self.client.retrieve(self.collection, part, with_payload=False, with_vectors=False)
                found.update(point.id for point in points)
        return np.array([number in found for number in ids.tolist()], np.bool_)

    def _append(self, rows: Rows, report: Report) -> None:
        from qdrant_client import models

        for start in range(0, count := len(rows.ids), BATCH):
            part = slice(start, start + BATCH)
            payloads: list[dict[str, Any]] = []
            labels = (rows.pids[part].tolist(), rows.cameras[part].tolist(), rows.times[part].tolist())
            for pid, camera, time, source in zip(*labels, rows.sources[part].tolist(), strict=True):
                payloads.append({"pid": pid, "camera": camera, "time": time, "source": _text(source)})
            batch = models.Batch(ids=rows.ids[part].tolist(), vectors=rows.embeddings[part].tolist(), payloads=payloads)
            with self._reported():
                self.client.upsert(self.collection, points=batch, wait=True)
            report(f"adding to {self.collection}", min(start + BATCH, count), count)

    def _nearest(self, queries: Embeddings, top: int, where: Where, exact: bool) -> tuple[int, list[list[Hit]]]:
        from qdrant_client import models

        condition = _filter(where)
        rankings: list[Any] = []
        with self._reported():
            count = self.client.count(self.collection, count_filter=condition, exact=True).count
            exact = exact or count < FLAT_ROWS
            request = partial(
                models.QueryRequest,
                filter=condition,
                limit=top,
                with_payload=True,
                params=models.SearchParams(exact=exact, hnsw_ef=None if exact else max(256, 4 * top)),
            )
            for start in range(0, len(queries), SEARCHES):
                requests = [request(query=query.tolist()) for query in queries[start : start + SEARCHES]]
                rankings += self.client.query_batch_points(self.collection, requests=requests)

        def hit(point: Any) -> Hit:
            distance = point.score if self.distance == "euclidean" else 1 - point.score
            return Hit.of(distance, point.id, *(point.payload[key] for key in KEYS))

        return count, [list(map(hit, ranking.points)) for ranking in rankings]

    def _remove(self, where: Where, report: Report) -> int:
        from qdrant_client import models

        condition = _filter(where)
        with self._reported():
            count: int = self.client.count(self.collection, count_filter=condition, exact=True).count
            self.client.delete(self.collection, models.FilterSelector(filter=condition), wait=True)
            left = self.client.count(self.collection, count_filter=condition, exact=True).count
        if left:
            raise OutputError(f"{left} rows of {self.location} were not deleted", "Delete them again")
        return count

    def info(self, check: bool = False) -> GalleryInfo:
        from qdrant_client import models

        model = self._existing()
        with self._reported():
            rows = self.client.count(self.collection, exact=True).count
            facets = {
                key: [hit.value for hit in self.client.facet(self.collection, key, limit=1_000_000, exact=True).hits]
                for key in ("camera", "pid")
            }
            moments: list[datetime | None] = []
            for direction in (models.Direction.ASC, models.Direction.DESC):
                order = models.OrderBy(key="time", direction=direction)
                points = self.client.scroll(self.collection, limit=1, order_by=order, with_payload=["time"])[0]
                moments += [local_time(point.payload["time"]) for point in points] or [None]
        identities = sum(pid != UNKNOWN for pid in facets["pid"])
        cameras = sorted(filter(None, facets["camera"]))
        facts = self.location, model, self.distance, self.dtype, rows, identities, cameras
        return GalleryInfo(*facts, oldest=moments[0], newest=moments[1])


def _text(source: str) -> str:
    """The source as valid UTF-8, with other bytes escaped."""
    return os.fsencode(source).decode("utf-8", "backslashreplace")


def _filter(where: Where) -> Any:
    """The conditions as Qdrant writes them; None if there are none."""
    from qdrant_client import models

    sources = None if where.sources is None else list(map(_text, where.sources))
    conditions = [
        models.FieldCondition(key=key, match=models.MatchAny(any=list(values)))
        for key, values in (("camera", where.cameras), ("pid", where.pids), ("source", sources))
        if values is not None
    ]
    if where.since is not None or where.before is not None:
        conditions.append(models.FieldCondition(key="time", range=models.Range(gte=where.since, lt=where.before)))
    return models.Filter(must=conditions) if conditions else None
