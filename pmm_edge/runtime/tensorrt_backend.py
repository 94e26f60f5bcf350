"""TensorRT, loaded only when it is needed, and what it says when it fails."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels, network_input
from pmm_edge.runtime.cuda import Cuda, GpuError, NotOnThisMachineError
from pmm_edge.runtime.embedder import INPUT, OUTPUT, Embedder, Embeddings, parse_device
from pmm_edge.runtime.manifest import Machine, check_files, check_machine, onnx_of, read_manifest
from pmm_edge.spec import InputSpec

OLDEST = (10, 3)


def import_tensorrt() -> Any:
    """The `tensorrt` module.

    Raises:
        NotOnThisMachineError: it is missing, does not load, or is older than 10.3.
    """
    install = "On a Jetson it comes with JetPack 6.1 or later, elsewhere: pip install 'pmm-edge[trt]'"
    try:
        trt = import_module("tensorrt")
        version: str = trt.__version__
    # Its packages import without their libraries, then break as they please.
    except (ImportError, AttributeError, OSError) as error:
        raise NotOnThisMachineError("TensorRT is not installed", install) from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise NotOnThisMachineError(f"TensorRT {version} is older than 10.3", install)
    return trt


def this_machine(trt: Any, cuda: Cuda) -> Machine:
    """What an engine built here depends on."""
    return Machine(cuda.name, cuda.compute_capability, trt.__version__, cuda.runtime_version, cuda.driver)


def error_logger(trt: Any) -> Any:
    """A logger that keeps the errors in its list `errors` and prints nothing."""
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class ErrorLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe:
                self.errors.append(" ".join(msg.split()))

    return ErrorLogger()


def last_error(logger: Any) -> str:
    """What TensorRT said last, in brackets; nothing where it was silent."""
    return f" ({logger.errors[-1]})" if logger.errors else ""


def load_engine(trt: Any, logger: Any, plan: Any, path: Path, version_compatible: bool) -> Any:
    """Deserialize an engine.

    Args:
        plan: a buffer with the engine.
        path: where it comes from, for messages.

    Raises:
        ModelError: TensorRT refuses it.
    """
    runtime = trt.Runtime(logger)
    if version_compatible:
        # Such an engine brings the runtime that it was built with: code, trusted as the file's SHA-256 is known.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ModelError(
            f"TensorRT {trt.__version__} cannot load {path}{last_error(logger)}",
            "Build it again on this machine with pmm export --trt",
        )
    return engine


@dataclass(frozen=True, eq=False)
class _Buffer:
    """Page-locked memory for the largest batch, in and out."""

    images: NDArray[Any]
    embeddings: Embeddings
    done: Any
    """The event behind the copy of the embeddings."""


class TensorRTEmbedder(Embedder):
    """An engine with its manifest, run on the GPU that it was built for.

    Any number of crops: they go through in chunks of the profile's maximum, and fewer than its minimum are padded.
    For each batch size all layers are one CUDA graph, recorded when that size first comes. Of several chunks the next
    one is prepared while the GPU works on the one before it.

    Thread-safe: threads take turns, for all share one stream and its buffers. What runs beside the GPU is the
    preparation of other threads' crops.

    Args:
        path: the engine; its `.manifest.json` lies beside it.
        device: `cuda` or `cuda:N`; None takes the first GPU.
        cuda_graphs: False enqueues layer by layer, for engines whose layers cannot be captured.
        content: the engine's bytes, where they were read already.

    Raises:
        ModelError: the engine or its manifest is missing, changed, or of another GPU or TensorRT; or the device is
            none that TensorRT runs on.
        NotOnThisMachineError: TensorRT, cuda-python, the driver or the GPU is missing.
        GpuError: the GPU refuses: out of memory, for one.
    """

    def __init__(
        self, path: Path, device: str | int | None = None, cuda_graphs: bool = True, content: bytes | None = None
    ) -> None:
        manifest = read_manifest(path)
        check_files(manifest, path)
        kind, index = parse_device("cuda" if device is None else device)
        if kind != "cuda":
            raise ModelError(
                f"{path} cannot run on the device {device}",
                f"Load {onnx_of(manifest, path)} there; TensorRT runs on GPUs alone",
            )
        trt = import_tensorrt()
        self._cuda = Cuda(index)
        self._release = weakref.finalize(self, self._cuda.release)
        check_machine(manifest, path, this_machine(trt, self._cuda))
        super().__init__(manifest.spec, path, "tensorrt", f"cuda:{index}")
        self._trt, self._logger = trt, error_logger(trt)
        plan = content or path.read_bytes()
        self._engine = load_engine(trt, self._logger, plan, path, manifest.settings.version_compatible)
        self._batch, self.cuda_graphs = manifest.settings.batch, cuda_graphs
        self.profile = self._batch
        self._lock = threading.Lock()
        self._contexts: dict[int, Any] = {}
        """By batch size; a CUDA graph needs the one it was recorded from."""
        self._graphs: dict[int, Callable[[], None]] = {}
        self._take_memory(self.spec.input, self._batch.maximum)

    def embed_prepared(self, images: Pixels) -> Embeddings:
        embeddings = np.empty((len(images), self.spec.embedding_size), np.float32)
        starts = range(0, len(images), self._batch.maximum)
        with self._lock:
            self._cuda.use()
            try:
                working: tuple[_Buffer, Embeddings] | None = None
                for number, start in enumerate(starts):
                    chunk = images[start : start + self._batch.maximum]
                    # The chunk before the last one is done: its buffer is free, while the GPU works on the last one.
                    buffer = self._buffers[number % len(self._buffers)]
                    self._enqueue(chunk, buffer)
                    self._collect(working)
                    working = buffer, embeddings[start : start + len(chunk)]
                self._collect(working)
            except BaseException:
                with suppress(GpuError):  # the call after this one must not find work of this one in its buffers
                    self._cuda.synchronize()
                raise
        return embeddings

    def gpu_milliseconds(self, images: Pixels) -> float:
        with self._lock:
            self._cuda.use()
            return sum(
                self._chunk_milliseconds(images[start : start + self._batch.maximum])
                for start in range(0, len(images), self._batch.maximum)
            )

    def _enqueue(self, images: Pixels, buffer: _Buffer) -> None:
        """Prepare at most the profile's maximum, and let the GPU begin."""
        batch = max(len(images), self._batch.minimum)
        buffer.images[: len(images)] = network_input(images, self.spec.input)
        buffer.images[len(images) : batch] = 0  # padding: a row of a batch does not see the others
        self._cuda.copy_in(self._images, buffer.images[:batch])
        self._enqueue_layers(batch)
        self._cuda.copy_out(buffer.embeddings[:batch], self._embeddings)
        self._cuda.record(buffer.done)

    def _collect(self, working: tuple[_Buffer, Embeddings] | None) -> None:
        """Wait for a chunk, and take its embeddings out of its buffer."""
        if working:
            buffer, embeddings = working
            self._cuda.wait(buffer.done)
            embeddings[:] = buffer.embeddings[: len(embeddings)]

    def _chunk_milliseconds(self, images: Pixels) -> float:
        buffer = self._buffers[0]
        self._enqueue(images, buffer)  # copies them in: what is timed computes on the images themselves
        self._cuda.wait(buffer.done)
        return self._cuda.milliseconds(lambda: self._enqueue_layers(max(len(images), self._batch.minimum)))

    def _enqueue_layers(self, batch: int) -> None:
        """From the images to the embeddings on the GPU; a batch size is prepared when it is first asked for."""
        if batch not in self._contexts:
            context = self._context(batch)
            if self.cuda_graphs:
                # The first run after a change of shape does work of its own, which cannot be captured.
                self._execute(context, batch)
                self._cuda.synchronize()
                self._graphs[batch] = self._cuda.capture(lambda: self._execute(context, batch))
            self._contexts[batch] = context
        if self.cuda_graphs:
            self._graphs[batch]()
        else:
            self._execute(self._contexts[batch], batch)

    def _execute(self, context: Any, batch: int) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise GpuError(
                f"TensorRT cannot run {self.path} at batch {batch}{last_error(self._logger)}",
                "Is the GPU's memory full? nvidia-smi or tegrastats shows it",
            )

    def _take_memory(self, size: InputSpec, batch: int) -> None:
        """Two buffers for the largest batch, and the scratch memory that all contexts share."""
        cuda = self._cuda
        outputs = (batch, self.spec.embedding_size)
        self._buffers = [
            _Buffer(cuda.pinned(size.shape(batch), size.dtype), cuda.pinned(outputs, np.float32), cuda.event())
            for _ in range(2)
        ]
        self._images = cuda.device_memory(self._buffers[0].images.nbytes)
        self._embeddings = cuda.device_memory(self._buffers[0].embeddings.nbytes)
        self._scratch_size: int = self._engine.device_memory_size_v2
        self._scratch = cuda.device_memory(self._scratch_size)

    def _context(self, batch: int) -> Any:
        """A context for one batch size: a CUDA graph is valid while the context it was recorded from lives and stays.

        Contexts run one after another on one stream, so that they can share their scratch memory.
        """
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise GpuError(
                f"TensorRT cannot prepare {self.path}{last_error(self._logger)}",
                "Is the GPU's memory full? nvidia-smi or tegrastats shows it",
            )
        context.set_device_memory(self._scratch, self._scratch_size)
        accepted = (
            context.set_input_shape(INPUT, self.spec.input.shape(batch))
            and context.set_tensor_address(INPUT, self._images)
            and context.set_tensor_address(OUTPUT, self._embeddings)
        )
        if not accepted:
            raise ModelError(
                f"{self.path} does not take a batch of {batch}, as its manifest says{last_error(self._logger)}",
                "Build it again with pmm export --trt",
            )
        return context
