"""ONNX Runtime on the requested device. There is no silent fallback: the reason is raised or warned about."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
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

_LOCATION = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (/\S+:\d+ .*?\)( const)? )?")
"""`[ONNXRuntimeError] : 1 : FAIL : /path/file.cc:46 void function(types) `, which precedes the actual message."""


def open_session(
    path: Path, content: bytes | None, device: str | int | None
) -> tuple[onnxruntime.InferenceSession, str, BatchProfile | None]:
    """Open a session; return it, the device that it runs on, and its batch profile (TensorRT provider only).

    ONNX Runtime lists providers whose libraries cannot load, logs that and runs on the CPU. The session itself
    therefore tells which provider it uses.
    """
    kind, index = ("cuda", 0) if device is None else parse_device(device, tensorrt=True)
    if kind == "cpu" or (device is None and not driver_is_there()):
        return _session(path, content, [_CPU]), "cpu", None
    providers: list[Any] = [(_CUDA, _cuda_options(index)), _CPU]
    wanted, profile = (TENSORRT, BatchProfile()) if kind == "tensorrt" else (_CUDA, None)
    if wanted not in onnxruntime.get_available_providers():
        reason = f"it was built without the {wanted}"
    elif not driver_is_there():
        reason = "there is no NVIDIA driver (libcuda.so.1)"
    else:
        load_cuda_libraries()
        if profile:
            with suppress(Exception):  # the wheels of TensorRT load their libraries, which are in no searched folder
                import_module("tensorrt")
            digest = hashlib.sha256(content).hexdigest() if content else sha256(path)
            shape = _session(path, content, [_CPU]).get_inputs()[0].shape
            providers.insert(0, (TENSORRT, tensorrt_options(index, digest, shape, profile)))
        reason = "onnxruntime gives no reason"
        try:
            session = _session(path, content, providers)
            if session.get_providers()[0] == wanted:
                return session, f"cuda:{index}", profile
        except ModelError as error:
            reason = _message(error.__cause__)
        reason = load_error(wanted) or reason
    on_cpu = _session(path, content, [_CPU])  # raises if the file is the problem
    version = onnxruntime.__version__
    if device is not None:
        remedy = "Omit the device, or install onnxruntime-gpu with its CUDA and cuDNN libraries"
        if profile:
            remedy += " and TensorRT; pmm export --trt builds an engine that does not need onnxruntime"
        raise ModelError(f"onnxruntime {version} cannot use the device {device}: {reason}", remedy)
    warnings.warn(
        f"onnxruntime {version} cannot use the GPU and runs on the CPU: {reason}. Run pmm doctor, or choose device cpu"
        " to silence this warning",
        PmmWarning,
        stacklevel=2,
    )
    return on_cpu, "cpu", None


def load_error(provider: str) -> str | None:
    """Return why the library of a provider does not load, which ONNX Runtime only logs."""
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
    # 0 lets ONNX Runtime choose, but it counts all cores. In a container or under taskset, surplus threads only wait.
    usable = threads()
    options.intra_op_num_threads = usable if usable < (os.cpu_count() or 1) else 0
    onnxruntime.set_default_logger_severity(_FATAL)  # its log repeats the exception
    try:
        # Without enable_fallback=0, ONNX Runtime prints the failure of a provider and continues with the next one.
        return onnxruntime.InferenceSession(content or path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # its exceptions have no common base class
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path} ({_message(error)})",
            "The file may be truncated, or too new for this onnxruntime; export it again with pmm export",
        ) from error
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def _message(error: BaseException | None) -> str:
    """Return the first line of an ONNX Runtime message without the location in its source code."""
    lines = _LOCATION.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else "onnxruntime gives no reason"


def driver_is_there() -> bool:
    """Return whether there is an NVIDIA driver, without loading gigabytes of CUDA libraries."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def load_cuda_libraries() -> None:
    """Load the installed CUDA libraries, including those that come with torch."""
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        with redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()


def _cuda_options(index: int) -> dict[str, str]:
    # TF32 keeps 10 mantissa bits, so an FP32 network would differ from its reference. An exhaustive search of cuDNN
    # algorithms takes seconds for each new batch size.
    return {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def tensorrt_options(index: int, digest: str, shape: Sequence[int | str], profile: BatchProfile) -> dict[str, str]:
    """Return the options of the TensorRT provider for a file with this SHA-256; create its cache folders.

    No precision is set: the provider then builds strongly typed networks, in the types of the graph. A dynamic batch
    (text in `shape`) needs a profile; without it, each larger batch would rebuild the engine.
    """
    cache = cache_folder() / "onnxruntime-tensorrt"
    # ONNX Runtime names cached engines by names in the graph: in a common folder, a network of the same shape would run
    # with the weights of another.
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
        for name, batch in (("min", profile.minimum), ("opt", profile.optimal), ("max", profile.maximum)):
            options[f"trt_profile_{name}_shapes"] = f"{INPUT}:{'x'.join(map(str, (batch, *shape[1:])))}"
    return options


class OnnxEmbedder(Embedder):
    """An ONNX file of `pmm export`, run by ONNX Runtime; see `pmm_edge.load`."""

    def __init__(self, path: Path, device: str | int | None = None, content: bytes | None = None) -> None:
        if not path.is_file():
            raise ModelError(f"{path} does not exist", "Create it with pmm export")
        self._session, used, self.profile = open_session(path, content, device)
        backend = "onnxruntime-tensorrt" if self._session.get_providers()[0] == TENSORRT else "onnxruntime"
        super().__init__(_spec(self._session, path), path, backend, used)
        batch = self._session.get_inputs()[0].shape[0]
        if isinstance(batch, int):
            self.profile = BatchProfile(batch, batch, batch)
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

    def _embed(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> Embeddings:
        if self.profile is None:
            return self._run(images)
        count, size = len(images), self.profile.maximum
        missing = self.profile.minimum - (count % size or size)  # in the last batch
        if missing > 0:
            images = np.concatenate([images, np.zeros_like(images, shape=(missing, *images.shape[1:]))])
        embeddings = [self._run(images[start : start + size]) for start in range(0, len(images), size)]
        return np.concatenate(embeddings)[:count]

    def _run(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> Embeddings:
        try:
            (embeddings,) = self._session.run([OUTPUT], {INPUT: images})
        except Exception as error:  # its exceptions have no common base class
            raise ModelError(
                f"onnxruntime cannot run {self.path} at batch {len(images)} ({str(error).splitlines()[0]})",
                "Try a smaller batch if memory is short; otherwise export it again with pmm export",
            ) from error
        return np.asarray(embeddings, dtype=np.float32)


def _spec(session: onnxruntime.InferenceSession, path: Path) -> ModelSpec:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ModelError(
            f"{path} has no pmm-edge spec: it was not made by pmm export, or a tool removed its metadata",
            "Export it again with pmm export",
        )
    spec = ModelSpec.from_json(text, str(path))
    inputs = {tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_inputs()}
    outputs = {tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_outputs()}
    if inputs != {INPUT: spec.input.shape(1)[1:]} or outputs != {OUTPUT: (spec.embedding_size,)}:
        raise ModelError(
            f"the graph in {path} does not match its spec: inputs {inputs}, outputs {outputs}",
            "Export it again with pmm export",
        )
    return spec
