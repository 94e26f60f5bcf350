"""Embed shards on a Ray cluster: each worker process has the network and writes whole shards.

A shard that a worker loses is computed again by another one. As a shard is written whole and its content follows from
its number, nothing is lost or doubled.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from pmm_edge.errors import PmmError, absent, install
from pmm_edge.machine import THREADS
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import embed_parts
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.listing import Item, unpacked
from pmm_edge.runtime.model_file import parse_model, read_model
from pmm_edge.runtime.shards import MANIFEST, EmbeddedShards, Job, write_shard

SECONDS = 10.0  # to wait for the address of a cluster


class Worker:
    """A process of the cluster. `model` refers to the content of the model file in Ray's object store."""

    embedder: Embedder | None = None

    def __init__(self, job: Job, model: Any, threads: int) -> None:
        os.environ[THREADS] = str(threads)
        self.job, self.model = job, model

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Embed and write one shard; return its counts, or an error that a retry cannot fix."""
        try:
            return {"outcome": pickle.dumps(self._embed(pickle.loads(row["shard"])))}
        except PmmError as error:
            return {"outcome": pickle.dumps((type(error), error.problem, error.remedy))}

    def _embed(self, items: list[Item]) -> EmbeddedShards:
        job = self.job
        if self.embedder is None:
            if job.target.size(job.target.root / MANIFEST) is None:
                problem = f"the worker on {socket.gethostname()} does not see {job.target.root}"
                raise PmmError(problem, "Use a file system that all machines mount, or object storage such as s3://")
            import ray

            content = ray.get(self.model)
            self.embedder = load(parse_model(job.model, content) if content else job.model, job.device)
        embedder = self.embedder
        shard = EmbeddedShards("", job.manifest, job.target, embedder.backend, embedder.device)
        parts = embed_parts(embedder, [unpacked(items, job.images)], job.batch, job.images)
        write_shard(shard, items[0].shard, parts, lambda: None)
        return shard


def embed_on_ray(address: str, workers: int | None, job: Job, shards: Iterable[list[Item]]) -> Iterator[EmbeddedShards]:
    """Embed shards on the cluster at `address`, and yield the counts of each that is finished, in any order.

    Raises PmmError if Ray is not installed or the cluster does not answer, and the error that stopped a worker.
    """
    if missing := absent("ray"):
        raise PmmError(f"--ray requires Ray: {missing}", install("ray"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray reports to its developers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    import ray

    rows = []
    for items in shards:
        if job.images.remote is None:  # workers have another current folder
            items = [item._replace(path=item.path.absolute()) for item in items]
        rows.append({"shard": pickle.dumps(items)})
    if not rows:
        return
    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(address)
            stack.callback(ray.shutdown)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        resources = ray.cluster_resources()
        gpus = 0 if job.device == "cpu" else int(resources.get("GPU", 0))
        cpus = int(resources.get("CPU", 1))
        workers = min(workers or gpus or cpus, len(rows))
        threads = max(1, cpus // max(workers, gpus))
        # An engine depends on the machine and has files next to it; other models travel with the job.
        content = b"" if job.model.suffix == ".engine" else read_model(job.model).content
        job = job._replace(model=job.model.absolute(), target=job.target.absolute())
        model = ray.put(content)  # this reference keeps it for workers that start again
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(job, model, threads),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0 if gpus else threads,
            num_gpus=1 if gpus else 0,
        )
        for row in dataset.iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, tuple):
                kind, problem, remedy = outcome
                raise kind(problem, remedy)
            yield outcome


def _connect(address: str) -> None:
    """Connect to a cluster; raise PmmError if none answers."""
    import ray

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    remedy = "Start one with `ray start --head`, pass its address, or --ray local for this machine"
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **options)
            return
        if address != "auto":  # Ray would try for minutes
            parts = urlsplit(address if "://" in address else f"ray://{address}")
            socket.create_connection((parts.hostname or "", parts.port or 6379), SECONDS).close()
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise PmmError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}", remedy) from error
