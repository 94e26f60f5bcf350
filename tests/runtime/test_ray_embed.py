"""The same rows from a Ray cluster on this machine, also when a worker is killed."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.shards import embed_shards
from pmm_edge.runtime.storage import Storage

if os.environ.get("CI") != "true":
    pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    here = Path(__file__).parents[2]
    environment = {"env_vars": {"PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=100_000_000, runtime_env=environment,
    )  # fmt: skip
    yield
    ray.shutdown()


def workers() -> list[int]:
    """The processes of the cluster that embed, which are descendants of this one."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and b"ray::MapWorker" in (entry / "cmdline").read_bytes():
                above = int(entry.name)
                while above > 1 and above != os.getpid():
                    above = parent(above)
                if above == os.getpid():
                    found.append(int(entry.name))
        except OSError:
            continue  # it has ended
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_a_killed_worker_loses_and_doubles_nothing(
    cluster: None, onnx: Embedder, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.jpg").touch()
    images = [*sorted(tiny_dataset.rglob("*.jpg")), tmp_path / "bad.jpg"]
    monkeypatch.setenv("PMM_THREADS", "1")  # as the workers
    killed: list[int] = []

    def kill(what: str, done: int, total: int, detail: str = "") -> None:
        if what.startswith("embedding") and done == 3 and not killed:
            killed.extend(workers()[:1])
            os.kill(killed[0], signal.SIGKILL)

    alone = embed_shards(onnx.path, images, tmp_path / "alone", device="cpu", batch=2, shard_rows=2)
    settings = {"device": "cpu", "batch": 2, "shard_rows": 2, "ray": "auto", "workers": 2}
    found = embed_shards(onnx.path, images, tmp_path / "cluster", report=kill, **settings)
    assert len(killed) == 1
    assert contents(tmp_path / "cluster") == contents(tmp_path / "alone")
    assert (found.rows, found.bad, found.embedded) == (alone.rows, alone.bad, alone.embedded) == (36, 1, 36)
    (tmp_path / "cluster" / "shard-000004.parquet").unlink()
    again = embed_shards(onnx.path, images, tmp_path / "cluster", **settings)
    assert (again.kept, again.embedded, again.rows) == (18, 2, 36)
    assert contents(tmp_path / "cluster") == contents(tmp_path / "alone")


def test_errors_of_workers(
    cluster: None, onnx: Embedder, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pmm_edge.runtime import ray_embed

    settings = {"device": "cpu", "ray": "auto", "workers": 1}
    with monkeypatch.context() as patched:  # as a worker does not find what is not sent to it
        patched.setattr(ray_embed, "read_model", lambda path: type("File", (), {"content": b""}))
        patched.setattr(onnx, "path", tmp_path / "gone.onnx")
        patched.setattr("pmm_edge.runtime.shards.sha256", lambda path: "0")
        with pytest.raises(ModelError, match=r"gone\.onnx"):
            embed_shards(onnx, tiny_dataset, tmp_path / "one", **settings)
    with monkeypatch.context() as patched:  # a folder that only this machine has
        patched.setattr(Storage, "absolute", lambda self: Storage(Path("/nowhere")))
        with pytest.raises(PmmError, match="nowhere"):
            embed_shards(onnx, tiny_dataset, tmp_path / "two", **settings)


def test_a_cluster_that_does_not_answer(
    onnx: Embedder, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    for given, named in ((address, address), ("auto", address), ("ray://host.invalid:10001", "host.invalid")):
        with pytest.raises(PmmError, match=named):
            embed_shards(onnx, tiny_dataset, tmp_path / "out", ray=given)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PmmError, match=r"\.\[ray\]"):
        embed_shards(onnx, tiny_dataset, tmp_path / "out", ray="local")
