"""Engines of TensorRT on the GPU that they were built for, and of TensorRT for RTX on any GPU that they list."""

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import ModelError, OutputError, install
from pmm_edge.files import cache_folder, written_whole
from pmm_edge.images import Pixels, network_input
from pmm_edge.runtime.cuda import OUT_OF_MEMORY, Cuda, GpuError, NotOnThisMachineError
from pmm_edge.runtime.embedder import INPUT, OUTPUT, Embedder, Embeddings, parse_device
from pmm_edge.runtime.manifest import BuildSettings, Machine, check_files, check_machine, onnx_of, read_manifest
from pmm_edge.runtime.model_file import ModelFile


def import_rtx() -> Any:
    """Import `tensorrt_rtx`, or the bindings that it re-exports; raise NotOnThisMachineError if both are missing."""
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        with suppress(ImportError, OSError):
            return import_module(name)
    raise NotOnThisMachineError("TensorRT for RTX is not installed", f"{install('rtx')}, for Python 3.10 to 3.12")


def import_tensorrt() -> Any:
    """Import `tensorrt`; raise NotOnThisMachineError if it is missing or older than 10.3."""
    remedy = f"{install('trt')}; on Jetson it comes with JetPack 6.1 or later"
    try:
        trt = import_module("tensorrt")
        version: str = trt.__version__
    except (ImportError, AttributeError, OSError) as error:  # its packages import without their libraries
        raise NotOnThisMachineError("TensorRT is not installed", remedy) from error
    if tuple(map(int, version.split(".")[:2])) < (10, 3):
        raise NotOnThisMachineError(f"TensorRT {version} is older than 10.3", remedy)
    return trt


def this_machine(trt: Any, cuda: Cuda) -> Machine:
    """Return what an engine built here depends on."""
    return Machine(cuda.name, cuda.compute_capability, trt.__version__, cuda.runtime_version)


def error_logger(trt: Any) -> Any:
    """Return a logger that collects errors in its list `errors` and prints nothing."""
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
    """Return the last error in parentheses, or nothing."""
    return f" ({logger.errors[-1]})" if logger.errors else ""


def load_engine(trt: Any, logger: Any, plan: Any, path: Path, settings: BuildSettings) -> Any:
    """Deserialize an engine from a buffer; raise ModelError, which names `path`, if TensorRT refuses it."""
    runtime = trt.Runtime(logger)
    if settings.version_compatible:
        # Such an engine contains the runtime it was built with. That is code; the SHA-256 of the file is checked.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        problem = f"{settings.compiler} {trt.__version__} cannot load {path}{last_error(logger)}"
        raise ModelError(
            problem, f"Build it again on this machine with pmm export {'--rtx' if settings.gpus else '--trt'}"
        )
    return engine


class RuntimeCache:
    """The kernels that TensorRT for RTX compiles at the first run of an engine, kept in a file for the next process."""

    def __init__(self, trt: Any, engine: Any, key: str) -> None:
        self._path: Path | None = None
        self.config = config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # The default compiles in the background and would leave its temporary kernels in a captured CUDA graph.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = config.create_runtime_cache()
        with suppress(OutputError, OSError):  # without a cache folder, each process compiles again
            self._path = cache_folder() / "tensorrt-rtx" / f"{key}.kernels"
            self._cache.deserialize(self._path.read_bytes())  # False for one of another GPU, driver or release
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache; a failure only costs time in the next process."""
        if self._path:
            with suppress(OutputError), written_whole(self._path) as temporary:
                temporary.write_bytes(self._cache.serialize())


class _Buffer(NamedTuple):
    """Page-locked memory for the largest batch, and the event after the copy of its embeddings."""

    images: NDArray[Any]
    embeddings: Embeddings
    done: Any


class TensorRTEmbedder(Embedder):
    """An engine with its manifest; see `pmm_edge.load`.

    Batches larger than the profile are split, and the next chunk is prepared while the GPU computes the previous one;
    smaller ones are padded. Each batch size runs as one CUDA graph, captured at its first use; `cuda_graphs=False`
    enqueues layer by layer. Thread-safe: threads take turns, because they share one stream and its buffers.
    """

    def __init__(self, file: ModelFile, device: str | int | None = None, cuda_graphs: bool = True) -> None:
        path, manifest = file.path, read_manifest(file.path)
        check_files(manifest, file)
        kind, index = parse_device("cuda" if device is None else device)
        if kind != "cuda":
            remedy = f"TensorRT runs only on GPUs; load {onnx_of(manifest, path)} instead"
            raise ModelError(f"{path} cannot run on the device {device}", remedy)
        try:
            self._trt = trt = import_rtx() if manifest.settings.gpus else import_tensorrt()
            self._cuda = cuda = Cuda(index)
        except NotOnThisMachineError as error:
            remedy = f"{error.remedy}, or load {onnx_of(manifest, path)} instead"
            raise NotOnThisMachineError(f"{path} cannot run here: {error.problem}", remedy) from error
        self._release = weakref.finalize(self, cuda.release)
        check_machine(manifest, path, this_machine(trt, cuda))
        super().__init__(manifest.spec, path, "tensorrt", f"cuda:{index}")
        self.profile = self._batch = manifest.settings.batch
        self.cuda_graphs = cuda_graphs
        self._logger, self._lock = error_logger(trt), threading.Lock()
        self._engine = load_engine(trt, self._logger, file.content, path, manifest.settings)
        self._jit = RuntimeCache(trt, self._engine, manifest.engine_sha256) if manifest.settings.gpus else None
        self._contexts: dict[int, Any] = {}  # by batch size; a CUDA graph needs the context it was captured from
        self._graphs: dict[int, Callable[[], None]] = {}
        size, batch = self.spec.input, self._batch.maximum
        inputs, outputs = size.shape(batch), (batch, self.spec.embedding_size)
        self._buffers = [
            _Buffer(cuda.pinned(inputs, size.dtype), cuda.pinned(outputs, np.float32), cuda.event()) for _ in range(2)
        ]
        self._images = cuda.device_memory(self._buffers[0].images.nbytes)
        self._embeddings = cuda.device_memory(self._buffers[0].embeddings.nbytes)
        self._scratch_size: int = self._engine.device_memory_size_v2
        self._scratch = cuda.device_memory(self._scratch_size)  # shared by all contexts, which run in turn

    def embed_prepared(self, images: Pixels) -> Embeddings:
        embeddings = np.empty((len(images), self.spec.embedding_size), np.float32)
        with self._lock:
            self._cuda.use()
            try:
                running: list[tuple[_Buffer, Embeddings]] = []
                for number, start in enumerate(range(0, len(images), self._batch.maximum)):
                    rows = slice(start, start + self._batch.maximum)
                    # Two buffers suffice: the chunk before the running one is done.
                    buffer = self._buffers[number % len(self._buffers)]
                    self._enqueue(images[rows], buffer)
                    running.append((buffer, embeddings[rows]))
                    if len(running) == len(self._buffers):
                        self._collect(*running.pop(0))
                for buffer, target in running:
                    self._collect(buffer, target)
            except BaseException:
                with suppress(GpuError):  # the next call must not find work of this one in its buffers
                    self._cuda.synchronize()
                raise
        return embeddings

    def gpu_milliseconds(self, images: Pixels) -> float:
        total, buffer = 0.0, self._buffers[0]
        with self._lock:
            self._cuda.use()
            for start in range(0, len(images), self._batch.maximum):
                chunk = images[start : start + self._batch.maximum]
                self._enqueue(chunk, buffer)  # copies the images in, so that the timed run computes on them
                self._cuda.wait(buffer.done)
                total += self._cuda.milliseconds(partial(self._enqueue_layers, max(len(chunk), self._batch.minimum)))
        return total

    def _enqueue(self, images: Pixels, buffer: _Buffer) -> None:
        """Prepare images, at most the maximum of the profile, and start the GPU."""
        batch = max(len(images), self._batch.minimum)
        buffer.images[: len(images)] = network_input(images, self.spec.input)
        buffer.images[len(images) : batch] = 0  # padding; rows of a batch are independent
        self._cuda.copy_in(self._images, buffer.images[:batch])
        self._enqueue_layers(batch)
        self._cuda.copy_out(buffer.embeddings[:batch], self._embeddings)
        self._cuda.record(buffer.done)

    def _collect(self, buffer: _Buffer, target: Embeddings) -> None:
        """Wait for a chunk and copy its embeddings out of its buffer."""
        self._cuda.wait(buffer.done)
        target[:] = buffer.embeddings[: len(target)]

    def _enqueue_layers(self, batch: int) -> None:
        """Enqueue the network; at the first use of a batch size, create its context and capture its graph."""
        if batch not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(self._jit.config if self._jit else strategy)
            if context is None:
                raise GpuError(f"TensorRT cannot prepare {self.path}{last_error(self._logger)}", OUT_OF_MEMORY)
            context.set_device_memory(self._scratch, self._scratch_size)
            accepted = (
                context.set_input_shape(INPUT, self.spec.input.shape(batch))
                and context.set_tensor_address(INPUT, self._images)
                and context.set_tensor_address(OUTPUT, self._embeddings)
            )
            if not accepted:
                problem = f"{self.path} does not accept a batch of {batch}, contrary to its manifest"
                raise ModelError(problem + last_error(self._logger), "Build it again with pmm export --trt")
            if self.cuda_graphs or self._jit:
                # The first run after a change of shape does extra work, which cannot be captured.
                self._execute(context, batch)
                self._cuda.synchronize()
            if self._jit:
                self._jit.save()
            if self.cuda_graphs:
                self._graphs[batch] = self._cuda.capture(lambda: self._execute(context, batch))
            self._contexts[batch] = context
        if self.cuda_graphs:
            self._graphs[batch]()
        else:
            self._execute(self._contexts[batch], batch)

    def _execute(self, context: Any, batch: int) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise GpuError(f"TensorRT cannot run {self.path} at batch {batch}{last_error(self._logger)}", OUT_OF_MEMORY)
