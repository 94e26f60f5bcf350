"""Which of ONNX Runtime's providers runs a network, on machines that have a GPU: the sessions are doubles."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import pmm_edge
from pmm_edge.errors import ModelError, PmmWarning
from pmm_edge.export import Graph, export_onnx
from pmm_edge.runtime import onnx_backend

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
CROPS = np.random.default_rng(0).integers(0, 256, (67, 96, 64, 3), dtype=np.uint8)

Asked = list[list[Any]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Asked]:
    """A machine with a driver, where sessions take only some of the providers that are listed."""

    def put(*taken: str) -> Asked:
        asked: Asked = []

        class Session(onnxruntime.InferenceSession):
            def __init__(self, model: Any, options: Any, providers: list[Any], **others: Any) -> None:
                super().__init__(model, options, providers=[CPU], **others)
                asked.append(providers)
                names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
                self._took = [name for name in names if name in (*taken, CPU)]

            def get_providers(self) -> list[str]:
                return self._took

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnx_backend, "driver_is_there", lambda: True)
        monkeypatch.setattr(onnx_backend, "_does_not_load", lambda provider: "libcublas.so.13: cannot open")
        monkeypatch.setenv("PMM_HOME", str(tmp_path / "home"))
        return asked

    return put


def test_a_gpu_that_works_is_taken_without_a_word(machine: Callable[..., Asked], tiny_onnx: Path) -> None:
    machine(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder = pmm_edge.load(tiny_onnx)
        assert (embedder.backend, embedder.device) == ("onnxruntime", "cuda:0")
        assert pmm_edge.load(tiny_onnx, "cpu").device == "cpu"


def test_a_gpu_that_cannot_be_used_is_told(machine: Callable[..., Asked], tiny_onnx: Path) -> None:
    machine()
    with pytest.warns(
        PmmWarning, match=r"cannot use this machine's GPU and runs on the CPU: libcublas\.so\.13"
    ) as told:
        assert pmm_edge.load(tiny_onnx).device == "cpu"
    assert len(told) == 1
    with pytest.raises(ModelError, match=r"device cuda:1 cannot be used by onnxruntime .*: libcublas\.so\.13"):
        pmm_edge.load(tiny_onnx, "cuda:1")


def test_a_build_without_cuda_is_told_where_there_is_a_gpu(
    machine: Callable[..., Asked], tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.warns(PmmWarning, match="runs on the CPU: it was built without the CUDAExecutionProvider"):
        assert pmm_edge.load(tiny_onnx).device == "cpu"
    monkeypatch.setattr(onnx_backend, "driver_is_there", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pmm_edge.load(tiny_onnx).device == "cpu"


def test_the_command_line_tells_it_in_one_line(
    machine: Callable[..., Asked], pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    machine()
    ended = pmm("embed", tiny_onnx, tiny_dataset / "query", "-o", tmp_path / "e.npz")
    assert ended.exit_code == 0, ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if "warning" in line.lower())
    assert line.startswith("warning: onnxruntime ")
    assert "libcublas.so.13" in line


def test_a_wrong_file_is_not_blamed_on_the_gpu(machine: Callable[..., Asked], tiny_onnx: Path, tmp_path: Path) -> None:
    machine()
    (tmp_path / "short.onnx").write_bytes(tiny_onnx.read_bytes()[:1000])
    for device in (None, "cuda", "tensorrt"):
        with pytest.raises(ModelError, match="Is it truncated"):
            pmm_edge.load(tmp_path / "short.onnx", device)


def test_tensorrt_is_taken_where_it_is_asked_for_alone(machine: Callable[..., Asked], tiny_onnx: Path) -> None:
    asked = machine(TENSORRT, CUDA)
    assert pmm_edge.load(tiny_onnx).backend == "onnxruntime"
    assert not any(provider[0] == TENSORRT for providers in asked for provider in providers)
    embedder = pmm_edge.load(tiny_onnx, "tensorrt:1")
    assert (embedder.backend, embedder.device, str(embedder.profile)) == ("onnxruntime-tensorrt", "cuda:1", "1,16,64")
    (name, options), (behind, _), last = asked[-1]
    assert (name, behind, last) == (TENSORRT, CUDA, CPU)
    assert options["device_id"] == "1"
    assert options["trt_profile_max_shapes"] == "images:64x96x64x3"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert embedder.embed(CROPS).shape == (67, 1536)  # in batches of 64 at most


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "tensorrt:1"])
def test_an_embedder_knows_how_to_load_its_engine_again(
    device: str, machine: Callable[..., Asked], tiny_onnx: Path
) -> None:
    machine(TENSORRT, CUDA)
    first = pmm_edge.load(tiny_onnx, device)
    again = pmm_edge.load(tiny_onnx, first.loads_with)
    assert first.loads_with == device
    assert (again.backend, again.device) == (first.backend, first.device)


def test_tensorrt_that_the_session_does_not_take_is_an_error(machine: Callable[..., Asked], tiny_onnx: Path) -> None:
    machine(CUDA)
    with pytest.raises(ModelError, match=r"device tensorrt cannot be used by .*: libcublas.*pmm export --trt builds"):
        pmm_edge.load(tiny_onnx, "tensorrt")


def test_each_network_has_engines_of_its_own(machine: Callable[..., Asked], tiny_onnx: Path, tmp_path: Path) -> None:
    """ONNX Runtime names engines by the graph's names: other weights would run with those of the first."""
    asked = machine(TENSORRT)
    other = tmp_path / tiny_onnx.name
    other.write_bytes(tiny_onnx.read_bytes() + b"\0")
    first, again, changed = (
        onnx_backend.tensorrt_options(0, onnx_backend.sha256(path), ["batch", 96, 64, 3], onnx_backend.BatchProfile())
        for path in (tiny_onnx, tiny_onnx, other)
    )
    assert not asked
    assert first == again
    assert first["trt_engine_cache_path"] != changed["trt_engine_cache_path"]
    assert first["trt_timing_cache_path"] == changed["trt_timing_cache_path"]


def test_a_static_batch_needs_no_profile(machine: Callable[..., Asked], tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = machine(TENSORRT)
    path = export_onnx(tiny_checkpoint, tmp_path / "model.onnx", graph=Graph(static_batch=2)).path
    assert str(pmm_edge.load(path, "tensorrt").profile) == "2,2,2"
    assert not any("profile" in option for option in asked[-1][0][1])


def test_this_onnxruntime_knows_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Path(onnxruntime.__file__).with_name("capi") / "libonnxruntime_providers_tensorrt.so"
    if not library.is_file():
        pytest.skip("this onnxruntime has no TensorRT provider")
    monkeypatch.setenv("PMM_HOME", str(tmp_path))
    options = onnx_backend.tensorrt_options(0, "digest", ["batch", 96, 64, 3], onnx_backend.BatchProfile())
    content = library.read_bytes()
    assert [name for name in options if name.encode() + b"\0" not in content] == []


def test_why_a_library_does_not_load() -> None:
    library = Path(onnxruntime.__file__).with_name("capi") / "libonnxruntime_providers_tensorrt.so"
    said = onnx_backend._does_not_load(TENSORRT)
    assert said is None or (library.is_file() and ".so" in said)
    assert onnx_backend._does_not_load("NoSuchExecutionProvider") is None
