"""An engine takes no more threads than there are cores that may be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pmm_edge


@pytest.mark.parametrize(("usable", "threads"), [(8.0, None), (6.0, 6), (3.5, 3), (1.0, 1), (0.5, 1)])
def test_onnx_runtime_is_told_of_cores_that_may_not_be_used(
    usable: float, threads: int | None, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("pmm_edge.machine.usable_cores", lambda: usable)
    assert pmm_edge.load(tiny_onnx, "cpu").threads == threads


_ON_ONE_CORE = """
import os, sys
path, sys.path[:] = sys.argv[1], sys.argv[2].split(os.pathsep)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # taskset -c 0
import numpy, pmm_edge, pmm_edge.runtime.onnx_backend
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
embedder = pmm_edge.load(path, "cpu")
size = embedder.spec.input
embedder.embed_prepared(numpy.zeros((1, size.height, size.width, 3), numpy.uint8))
print(embedder.threads, threads() - before)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs Linux, two cores")
def test_on_one_core_a_session_has_one_thread(tiny_onnx: Path) -> None:
    arguments = [sys.executable, "-c", _ON_ONE_CORE, str(tiny_onnx), os.pathsep.join(sys.path)]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.stdout.split() == ["1", "0"], ended.stderr  # its own, and no other
