"""ONNX Runtime on the requested device. There is no silent fallback: the reason is raised or warned about."""

import ctypes
import io
import os
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pmm_edge.errors import ModelError, PmmWarning
from pmm_edge.images import Pixels, network_input
from pmm_edge.machine import threads
from pmm_edge.runtime.embedder import INPUT, OUTPUT, Embedder, Embeddings, parse_device
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.runtime.model_file import ModelFile
from pmm_edge.spec import METADATA_KEY, ModelSpec

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_WARNING, _FATAL = 2, 4
_BIAS_QUANTIZATION = "WeightBiasQuantization"
"""An optimization of INT8 graphs. Its bias scales are products of float16 scales in float16, where they lose digits."""
_LOCATION = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (/\S+:\d+ .*?\)( const)? )?")
"""`[ONNXRuntimeError] : 1 : FAIL : /path/file.cc:46 void function(types) `, which precedes the actual message."""


class OnnxEmbedder(Embedder):
    """An ONNX file of `pmm export`, run by ONNX Runtime; see `pmm_edge.load`."""

    def __init__(self, file: ModelFile, device: str | int | None = None) -> None:
        path, text = file.path, file.metadata.get(METADATA_KEY)
        if text is None:
            raise ModelError(
                f"{path} has no pmm-edge spec: it was not made by pmm export, or a tool removed its metadata",
                "Export it again with pmm export",
            )
        self._session, used = open_session(path, device, file.content)
        super().__init__(ModelSpec.from_json(text, str(path)), path, "onnxruntime", used)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        try:
            shapes = {tensor.name: tuple(tensor.shape[1:]) for tensor in (*inputs, *outputs)}
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is damaged ({error})", "Copy it again, or export it again") from error
        if shapes != {INPUT: self.spec.input.shape(1)[1:], OUTPUT: (self.spec.embedding_size,)}:
            raise ModelError(
                f"the graph in {path} is not that of its spec: {shapes}", "Export it again with pmm export"
            )
        batch = inputs[0].shape[0]
        if isinstance(batch, int):
            self.profile = BatchProfile(batch, batch, batch)
        self.threads = self._session.get_session_options().intra_op_num_threads or None

    def embed_prepared(self, images: Pixels) -> Embeddings:
        inputs = network_input(images, self.spec.input)
        if self.profile is None:
            return self._run(inputs)
        count, batch = len(inputs), self.profile.maximum
        inputs = np.concatenate([inputs, np.zeros_like(inputs, shape=(-count % batch, *inputs.shape[1:]))])
        return np.concatenate([self._run(inputs[start : start + batch]) for start in range(0, count, batch)])[:count]

    def _run(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> Embeddings:
        try:
            (embeddings,) = self._session.run([OUTPUT], {INPUT: images})
        except Exception as error:  # its exceptions have no common base class
            raise ModelError(
                f"onnxruntime cannot run {self.path} at batch {len(images)} ({_message(error)})",
                "Try a smaller batch if memory is short; otherwise export it again with pmm export",
            ) from error
        return np.asarray(embeddings, dtype=np.float32)


def open_session(path: Path, device: str | int | None, model: bytes) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a session for the content of a file; return it and its device. A listed provider may fail to load."""
    kind, index = ("cuda", 0) if device is None else parse_device(device)
    if kind == "cpu" or (device is None and not driver_is_there()):
        return _session(path, model, [_CPU]), "cpu"
    if _CUDA not in onnxruntime.get_available_providers():
        reason = f"it was built without the {_CUDA}"
    elif not driver_is_there():
        reason = "there is no NVIDIA driver (libcuda.so.1)"
    else:
        if hasattr(onnxruntime, "preload_dlls"):  # since 1.21; also finds the CUDA libraries that come with torch
            with redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        # TF32 keeps 10 mantissa bits, so an FP32 network would differ from its reference. An exhaustive search of cuDNN
        # algorithms takes seconds for each new batch size.
        options = {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        reason = "onnxruntime gives no reason"
        try:
            session = _session(path, model, [(_CUDA, options), _CPU])
            if session.get_providers()[0] == _CUDA:
                return session, f"cuda:{index}"
        except ModelError as error:
            reason = _message(error.__cause__)
        reason = load_error() or reason
    on_cpu = _session(path, model, [_CPU])  # raises if the file is the problem
    version = onnxruntime.__version__
    if device is not None:
        raise ModelError(
            f"onnxruntime {version} cannot use the device {device}: {reason}",
            "Omit the device, or install onnxruntime-gpu with its CUDA and cuDNN libraries",
        )
    warnings.warn(
        f"onnxruntime {version} cannot use the GPU and runs on the CPU: {reason}. Run pmm doctor, or choose device cpu"
        " to silence this warning",
        PmmWarning,
        stacklevel=2,
    )
    return on_cpu, "cpu"


def _session(path: Path, model: bytes, providers: list[Any]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    # 0 lets ONNX Runtime choose, but it counts all cores. In a container or under taskset, surplus threads only wait.
    usable = threads()
    options.intra_op_num_threads = usable if usable < (os.cpu_count() or 1) else 0
    onnxruntime.set_default_logger_severity(_FATAL)  # its log repeats the exception
    try:
        # Without enable_fallback=0, ONNX Runtime prints the failure of a provider and continues with the next one.
        return onnxruntime.InferenceSession(
            model, options, providers=providers, enable_fallback=0, disabled_optimizers=[_BIAS_QUANTIZATION]
        )
    except Exception as error:  # its exceptions have no common base class
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path} ({_message(error)})",
            "The file may be truncated, or too new for this onnxruntime; export it again with pmm export",
        ) from error
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)


def _message(error: BaseException | None) -> str:
    """The first line of an ONNX Runtime message without the location in its source code."""
    lines = _LOCATION.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else "onnxruntime gives no reason"


def driver_is_there() -> bool:
    """Return whether there is an NVIDIA driver, without loading gigabytes of CUDA libraries."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def load_error() -> str | None:
    """Return why the library of the CUDA provider does not load, which ONNX Runtime only logs."""
    library = Path(onnxruntime.__file__).with_name("capi") / "libonnxruntime_providers_cuda.so"
    try:
        if library.is_file():
            ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None
