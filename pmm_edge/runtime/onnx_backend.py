"""ONNX Runtime's sessions: on the device that was asked for, or a reason why not; nothing falls back in silence."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pmm_edge.errors import ModelError, PmmWarning
from pmm_edge.files import cache_folder, sha256
from pmm_edge.images import Pixels, network_input
from pmm_edge.machine import threads
from pmm_edge.runtime.embedder import INPUT, OUTPUT, Embedder, Embeddings, parse_device
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.spec import METADATA_KEY, ModelSpec

_CPU, _CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_WARNING, _FATAL = 2, 4

_PLACE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (/\S+:\d+ .*?\)( const)? )?")
"""`[ONNXRuntimeError] : 1 : FAIL : /path/file.cc:46 void function(types) `, before what it says."""
_TOO_NEW = re.compile(
    r"Opset (?P<opset>\d+) is under development.* till opset (?P<opset_read>\d+)"
    r"|Unsupported model IR version: (?P<ir>\d+), max supported IR version: (?P<ir_read>\d+)",
    re.DOTALL,
)


def open_session(
    path: Path, content: bytes | None, device: str | int | None
) -> tuple[onnxruntime.InferenceSession, str, BatchProfile | None]:
    """A session, the device that it really runs on, and the batch sizes it was asked to be ready for, if any.

    ONNX Runtime lists providers as available even where their libraries cannot load, logs that and runs on the CPU. So
    the session is asked, not the package.

    Raises:
        ModelError: the file cannot be loaded, or `device` cannot be used.
    """
    kind, index = ("cuda", 0) if device is None else parse_device(device, tensorrt=True)
    if kind == "cpu" or (device is None and not driver_is_there()):
        return _session(path, content, [_CPU]), "cpu", None
    providers: list[Any] = [(_CUDA, _cuda_options(index)), _CPU]
    profile = None
    session, reason = None, _absent(TENSORRT if kind == "tensorrt" else _CUDA)
    if reason is None and kind == "tensorrt":
        profile = BatchProfile()
        digest = hashlib.sha256(content).hexdigest() if content else sha256(path)
        shape = _session(path, content, [_CPU]).get_inputs()[0].shape
        providers.insert(0, (TENSORRT, tensorrt_options(index, digest, shape, profile)))
    if reason is None:
        session, reason = _on_gpu(path, content, providers)
    if session:
        return session, f"cuda:{index}", profile
    on_cpu = _session(path, content, [_CPU])  # raises where it is the file that is wrong
    if device is not None:
        remedy = "Leave the device out, or install onnxruntime-gpu and the CUDA and cuDNN libraries that it wants"
        if kind == "tensorrt":
            remedy += ", and its TensorRT; pmm export --trt builds an engine that runs without onnxruntime"
        raise ModelError(f"device {device} cannot be used by onnxruntime {onnxruntime.__version__}: {reason}", remedy)
    warnings.warn(
        f"onnxruntime {onnxruntime.__version__} cannot use this machine's GPU and runs on the CPU: {reason}."
        " pmm doctor says what is missing; the device cpu spares this warning",
        PmmWarning,
        stacklevel=2,
    )
    return on_cpu, "cpu", None


def _absent(provider: str) -> str | None:
    """Why a provider of NVIDIA's is not worth asking for, None where it is."""
    if provider not in onnxruntime.get_available_providers():
        return f"it was built without the {provider}"
    return None if driver_is_there() else "there is no NVIDIA driver (libcuda.so.1)"


def _on_gpu(path: Path, content: bytes | None, providers: list[Any]) -> tuple[onnxruntime.InferenceSession | None, str]:
    """A session that really took the first of the providers, or None and why not."""
    wanted: str = providers[0][0]
    load_cuda_libraries()
    if wanted == TENSORRT:
        with suppress(Exception):  # its wheels load their libraries, which are in no folder that is searched
            import_module("tensorrt")
    said = "it does not say why"
    try:
        session = _session(path, content, providers)
        if session.get_providers()[0] == wanted:
            return session, ""
    except ModelError as error:
        said = _said(error.__cause__)
    return None, _does_not_load(wanted) or said


def _does_not_load(provider: str) -> str | None:
    """What keeps a provider's library from loading: ONNX Runtime writes that in its log alone."""
    name = provider.removesuffix("ExecutionProvider").lower()
    library = Path(onnxruntime.__file__).with_name("capi") / f"libonnxruntime_providers_{name}.so"
    try:
        if library.is_file():
            ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def _session(path: Path, content: bytes | None, providers: list[Any]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = _threads()
    try:
        with _quiet():
            # Where a provider fails, now or later, ONNX Runtime would print that and go on with the next one.
            return onnxruntime.InferenceSession(content or path, options, providers=providers, enable_fallback=0)
    # Its exceptions have nothing in common but this.
    except Exception as error:
        if newer := _TOO_NEW.search(str(error)):
            what = "opset" if newer["opset"] else "ONNX format (IR)"
            remedy = f"Export it again with pmm export{' --opset 17' if newer['opset'] else ''}, or install a newer"
            raise ModelError(
                f"{path} has {what} {newer['opset'] or newer['ir']}, onnxruntime {onnxruntime.__version__} reads"
                f" {newer['opset_read'] or newer['ir_read']} at most",
                f"{remedy} onnxruntime",
            ) from error
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path} ({_said(error)})",
            "Is it truncated? Export it again with pmm export",
        ) from error


def _said(error: BaseException | None) -> str:
    """ONNX Runtime's message without the place in its source, which may be longer than what it says."""
    lines = _PLACE.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else "it does not say why"


def _threads() -> int:
    """How many a session takes; 0 leaves it to ONNX Runtime, which counts the machine's cores and not the usable ones.

    In a container, or behind `taskset`, threads beyond the cores that may be used wait for each other.
    """
    granted = threads()
    return granted if granted < (os.cpu_count() or 1) else 0


def driver_is_there() -> bool:
    """Whether there is an NVIDIA driver; where there is none, gigabytes of libraries need not be loaded to find out."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def load_cuda_libraries() -> None:
    """Load CUDA's libraries as far as they are found, those that torch's wheels bring among them."""
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        with redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def _cuda_options(index: int) -> dict[str, str]:
    # TF32 keeps 10 bits of a mantissa: an FP32 network would depart from its reference. Searching all of
    # cuDNN's algorithms takes seconds for each new batch size.
    return {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def tensorrt_options(index: int, digest: str, shape: Sequence[int | str], profile: BatchProfile) -> dict[str, str]:
    """How ONNX Runtime's TensorRT provider builds and keeps its engines; its folders are made.

    No option of precision: without one it builds strongly typed networks, in the types that the graph gives.

    Args:
        index: number of the GPU.
        digest: of the file. ONNX Runtime names an engine by the graph's names alone: from a common folder it would take
            the weights of another network of the same shape.
        shape: of the input; a batch that is no number is a dynamic one.
        profile: of a dynamic batch; without it each larger batch would build anew.
    """
    cache = cache_folder() / "onnxruntime-tensorrt"
    engines = cache / digest[:16]
    engines.mkdir(parents=True, exist_ok=True)
    options = {
        "device_id": str(index),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    if not isinstance(shape[0], int):
        sizes = {"min": profile.minimum, "opt": profile.optimal, "max": profile.maximum}
        for name, batch in sizes.items():
            options[f"trt_profile_{name}_shapes"] = f"{INPUT}:{'x'.join(map(str, (batch, *shape[1:])))}"
    return options


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ONNX Runtime's own log, which repeats what is raised, from standard error."""
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


class OnnxEmbedder(Embedder):
    """An ONNX file of `pmm export`, run by ONNX Runtime.

    Args:
        path: the file.
        device: `cpu`, `cuda`, `cuda:N`, `tensorrt` or `tensorrt:N`; None takes a GPU where ONNX Runtime can use one,
            with its CUDA provider, and warns where there is one that it cannot use.
        content: the file's bytes, where they were read already.

    Raises:
        ModelError: the file is missing, truncated or not ours, or the device cannot be used.
    """

    def __init__(self, path: Path, device: str | int | None = None, content: bytes | None = None) -> None:
        if not path.is_file():
            raise ModelError(f"{path} does not exist", "Make it with pmm export")
        self._session, used, self.profile = open_session(path, content, device)
        backend = "onnxruntime-tensorrt" if self._session.get_providers()[0] == TENSORRT else "onnxruntime"
        super().__init__(_spec(self._session, path), path, backend, used)
        batch = self._session.get_inputs()[0].shape[0]
        if isinstance(batch, int):
            self.profile = BatchProfile(batch, batch, batch)
        # Asked of the session, as a device is: what was really set.
        self.threads = self._session.get_session_options().intra_op_num_threads or None

    @property
    def loads_with(self) -> str:
        return self.device.replace("cuda", "tensorrt") if self.backend == "onnxruntime-tensorrt" else self.device

    def embed_prepared(self, images: Pixels) -> Embeddings:
        return self._embed(network_input(images, self.spec.input))

    def embed_normalized(self, images: NDArray[np.float32]) -> Embeddings | None:
        size = self.spec.input
        if size.form == "uint8":
            return None
        if size.form == "raw":
            mean, std = (np.array(values, np.float32)[:, None, None] for values in (size.mean, size.std))
            images = (images * std + mean) * np.float32(255)
        return self._embed(images)

    def _embed(self, fed: NDArray[np.uint8] | NDArray[np.float32]) -> Embeddings:
        if self.profile is None:
            return self._run(fed)
        count, size = len(fed), self.profile.maximum
        missing = self.profile.minimum - (count % size or size)  # in the last batch
        if missing > 0:
            fed = np.concatenate([fed, np.zeros_like(fed, shape=(missing, *fed.shape[1:]))])
        return np.concatenate([self._run(fed[start : start + size]) for start in range(0, len(fed), size)])[:count]

    def _run(self, fed: NDArray[np.uint8] | NDArray[np.float32]) -> Embeddings:
        try:
            (embeddings,) = self._session.run([OUTPUT], {INPUT: fed})
        # Its exceptions have nothing in common but this.
        except Exception as error:
            raise ModelError(
                f"onnxruntime cannot run {self.path} at batch {len(fed)} ({str(error).splitlines()[0]})",
                "Try a smaller batch where memory is short; else export it again with pmm export",
            ) from error
        return np.asarray(embeddings, dtype=np.float32)


def _spec(session: onnxruntime.InferenceSession, path: Path) -> ModelSpec:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ModelError(
            f"{path} carries no pmm-edge spec: it was not made by pmm export, or a tool dropped its metadata",
            "Export it again with pmm export",
        )
    spec = ModelSpec.from_json(text, str(path))
    inputs = {tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_inputs()}
    expected = {INPUT: spec.input.shape(1)[1:]}
    outputs = {tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_outputs()}
    if inputs != expected or outputs != {OUTPUT: (spec.embedding_size,)}:
        raise ModelError(
            f"the graph in {path} is not what its spec says: {inputs} gives {outputs}",
            "A tool changed it; export it again with pmm export",
        )
    return spec
