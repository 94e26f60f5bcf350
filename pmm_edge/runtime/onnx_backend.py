"""Exported networks in ONNX Runtime."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pmm_edge.errors import ModelError
from pmm_edge.machine import usable_cores
from pmm_edge.runtime.build_settings import BatchProfile
from pmm_edge.runtime.crops import Pixels, network_input
from pmm_edge.runtime.embedder import INPUT as INPUT
from pmm_edge.runtime.embedder import OUTPUT as OUTPUT
from pmm_edge.runtime.embedder import Embedder, Embeddings, parse_device
from pmm_edge.spec import METADATA_KEY, ModelSpec

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_WARNING, _FATAL = 2, 4


class OnnxEmbedder(Embedder):
    """An ONNX file of `pmm export`, run by ONNX Runtime.

    Args:
        path: the file.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where ONNX Runtime can use one.
        content: the file's bytes, where they were read already.

    Raises:
        ModelError: the file is missing, truncated or not ours, or the device cannot be used.
    """

    def __init__(self, path: Path, device: str | None = None, content: bytes | None = None) -> None:
        if not path.is_file():
            raise ModelError(f"{path} does not exist", "Make it with pmm export")
        self._session, used = _open(path, content, device)
        super().__init__(_spec(self._session, path), path, "onnxruntime", used)
        batch = self._session.get_inputs()[0].shape[0]
        # Asked of the session, as a device is: what was really set.
        self.threads = self._session.get_session_options().intra_op_num_threads or None
        self._only_batch = batch if isinstance(batch, int) else None
        if self._only_batch:
            self.profile = BatchProfile(self._only_batch, self._only_batch, self._only_batch)

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
        if self._only_batch is None:
            return self._run(fed)
        count, missing = len(fed), -len(fed) % self._only_batch
        fed = np.concatenate([fed, np.zeros_like(fed, shape=(missing, *fed.shape[1:]))])
        batches = [self._run(fed[start : start + self._only_batch]) for start in range(0, len(fed), self._only_batch)]
        return np.concatenate(batches)[:count]

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


def _open(path: Path, content: bytes | None, device: str | None) -> tuple[onnxruntime.InferenceSession, str]:
    """A session, and the device that it really runs on.

    ONNX Runtime lists its CUDA provider as available even where its library cannot load, logs that and runs on
    the CPU. So the session is asked, not the package.
    """
    kind, index = parse_device(device) if device else ("cuda", 0)
    if kind == "cuda" and cuda_may_work():
        session = _session(path, content, [(_CUDA, _cuda_options(index)), _CPU])
        if session.get_providers()[0] == _CUDA:
            return session, f"cuda:{index}"
    if device and kind == "cuda":
        raise ModelError(
            f"device {device} cannot be used by onnxruntime {onnxruntime.__version__}",
            "Leave the device out, or install onnxruntime-gpu and the CUDA and cuDNN libraries that it wants",
        )
    return _session(path, content, [_CPU]), "cpu"


def _session(path: Path, content: bytes | None, providers: list[Any]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = _threads()
    try:
        with _quiet():
            return onnxruntime.InferenceSession(content or path, options, providers=providers)
    # Its exceptions have nothing in common but this.
    except Exception as error:
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path} ({str(error).splitlines()[0]})",
            "Is it truncated? Export it again with pmm export",
        ) from error


def _threads() -> int:
    """How many a session takes; 0 leaves it to ONNX Runtime, which counts the machine's cores and not the usable ones.

    In a container, or behind `taskset`, threads beyond the cores that may be used wait for each other.
    """
    usable = usable_cores()
    return max(1, int(usable)) if usable < (os.cpu_count() or 1) else 0


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


def cuda_may_work() -> bool:
    """Whether asking for CUDA is worth it; where it is, its libraries are loaded as far as they are found."""
    if _CUDA not in onnxruntime.get_available_providers():
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False  # no NVIDIA driver: spare loading gigabytes of libraries to find that out
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21; finds the libraries that torch's wheels bring
        with redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    return True


def _cuda_options(index: int) -> dict[str, str]:
    # TF32 keeps 10 bits of a mantissa: an FP32 network would depart from its reference. Searching all of
    # cuDNN's algorithms takes seconds for each new batch size.
    return {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ONNX Runtime's own log, which repeats what is raised, from standard error."""
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
