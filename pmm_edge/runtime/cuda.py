"""The few CUDA calls that running an engine takes, each status checked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pmm_edge.errors import PmmError

_LAYOUTS = ("cuda.bindings.runtime", "cuda.cudart")
"""Where cuda-python keeps the runtime API: since 12.6, and before."""
_DRIVER = Path("/sys/module/nvidia/version")


class NotOnThisMachineError(PmmError):
    """A GPU, a driver or a library that the work needs is not here; elsewhere the same command succeeds."""

    exit_code = 1


class GpuError(PmmError):
    """The GPU or its driver refused: out of memory, or a call that failed."""


class Cuda:
    """One GPU with one stream, and the memory that was taken on it until `release`.

    Not thread-safe: whoever shares it holds a lock, and calls `use` first, for CUDA's current GPU is one of a thread.

    Args:
        index: number of the GPU.

    Raises:
        NotOnThisMachineError: cuda-python, the driver or the GPU is missing.
        GpuError: the GPU cannot be used.
    """

    def __init__(self, index: int = 0) -> None:
        self._api = api = _import_runtime()
        count = self._count()
        if index >= count:
            raise NotOnThisMachineError(
                f"there is no GPU cuda:{index}: CUDA finds {count}", "Choose another device, or leave it out"
            )
        self.index = index
        self.use()
        properties = self._checked(api.cudaGetDeviceProperties(index), "reading the GPU's properties")
        self.name: str = properties.name.decode().rstrip("\0")
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self.runtime_version = _version(self._checked(api.cudaRuntimeGetVersion(), "reading CUDA's version"))
        newest = _version(self._checked(api.cudaDriverGetVersion(), "reading the driver's version"))
        self.driver = f"{newest} ({_DRIVER.read_text().strip()})" if _DRIVER.is_file() else newest
        self._freed_by: list[Callable[[], object]] = []
        self._events: tuple[Any, Any] | None = None
        # Non-blocking: work of others on CUDA's default stream neither waits for this one nor breaks a recording.
        self._stream = self._checked(api.cudaStreamCreateWithFlags(api.cudaStreamNonBlocking), "creating a stream")
        self._freed_by.append(lambda: api.cudaStreamDestroy(self._stream))

    @property
    def stream(self) -> int:
        """The stream's handle, as other libraries take it."""
        return int(self._stream)

    def use(self) -> None:
        """Make this the current GPU of the calling thread."""
        self._checked(self._api.cudaSetDevice(self.index), f"choosing cuda:{self.index}")

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array in page-locked host memory: only from there do copies run beside the CPU's work."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._checked(self._api.cudaMallocHost(size), f"taking {size} bytes of pinned memory")
        self._freed_by.append(lambda: self._api.cudaFreeHost(address))
        memory = (ctypes.c_uint8 * size).from_address(int(address))
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def device_memory(self, size: int) -> int:
        """Address of `size` bytes on the GPU."""
        # An engine that needs no scratch asks for 0, and CUDA gives no address for that.
        address = self._checked(self._api.cudaMalloc(max(size, 1)), f"taking {size} bytes on the GPU")
        self._freed_by.append(lambda: self._api.cudaFree(address))
        return int(address)

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a pinned array to the GPU."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        copied = self._api.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self._stream)
        self._checked(copied, "copying to the GPU")

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Enqueue a copy from the GPU to a pinned array."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copied = self._api.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self._stream)
        self._checked(copied, "copying from the GPU")

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        self._checked(self._api.cudaStreamSynchronize(self._stream), "running on the GPU")

    def event(self) -> Any:
        """What `record` puts on the stream and `wait` waits for."""
        event = self._checked(self._api.cudaEventCreate(), "creating an event")
        self._freed_by.append(lambda: self._api.cudaEventDestroy(event))
        return event

    def record(self, event: Any) -> None:
        """Enqueue an event behind what is enqueued already."""
        self._checked(self._api.cudaEventRecord(event, self._stream), "marking a place on the stream")

    def wait(self, event: Any) -> None:
        """Wait until all that was enqueued before an event is done; what came behind it goes on."""
        self._checked(self._api.cudaEventSynchronize(event), "running on the GPU")

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` enqueues as a CUDA graph; what is returned enqueues all of it in one call."""
        # Other threads may go on calling CUDA while this one records.
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(self._api.cudaStreamBeginCapture(self._stream, mode), "starting a CUDA graph")
        try:
            enqueue()
        except BaseException:
            self._api.cudaStreamEndCapture(self._stream)  # or the stream stays unusable
            raise
        graph = self._checked(self._api.cudaStreamEndCapture(self._stream), "recording a CUDA graph")
        executable = self._checked(self._api.cudaGraphInstantiate(graph, 0), "preparing a CUDA graph")
        self._checked(self._api.cudaGraphDestroy(graph), "preparing a CUDA graph")
        self._freed_by.append(lambda: self._api.cudaGraphExecDestroy(executable))

        def launch() -> None:
            self._checked(self._api.cudaGraphLaunch(executable, self._stream), "launching a CUDA graph")

        return launch

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        """Run what `enqueue` enqueues, and wait for it.

        Returns:
            Time between an event right before and one right behind it on the stream; resolution 0.5 µs.
        """
        if self._events is None:
            self._events = self.event(), self.event()
        before, behind = self._events
        self.record(before)
        enqueue()
        self.record(behind)
        self.synchronize()
        return float(self._checked(self._api.cudaEventElapsedTime(before, behind), "timing on the GPU"))

    def release(self) -> None:
        """Give back the stream, events, graphs and memory. A GPU that fails here has failed before, and said so."""
        while self._freed_by:
            self._freed_by.pop()()

    def _count(self) -> int:
        try:
            status, count = self._api.cudaGetDeviceCount()
        except RuntimeError as error:  # how cuda-python says that libcuda.so.1 is not there
            raise NotOnThisMachineError(f"no NVIDIA driver ({error})", "Install the driver") from error
        if status != self._api.cudaError_t.cudaSuccess:
            raise NotOnThisMachineError(
                f"no GPU that CUDA can use ({self._says(status)})",
                "Install a GPU, or a driver as new as the CUDA in use",
            )
        return int(count)

    def _checked(self, result: tuple[Any, ...], doing: str) -> Any:
        """The value of a call, whose first item is its status."""
        status, *values = result
        if status != self._api.cudaError_t.cudaSuccess:
            remedy = (
                "Start the program again; should that not help, nvidia-smi or dmesg tells of the GPU and its driver"
            )
            if status == self._api.cudaError_t.cudaErrorMemoryAllocation:
                remedy = "Is the GPU's memory full? nvidia-smi or tegrastats shows it"
            raise GpuError(f"CUDA failed while {doing} ({self._says(status)})", remedy)
        return values[0] if values else None

    def _says(self, status: Any) -> str:
        (_, name), (_, text) = self._api.cudaGetErrorName(status), self._api.cudaGetErrorString(status)
        return f"{name.decode()}: {text.decode()}"


def _import_runtime() -> Any:
    for layout in _LAYOUTS:
        with suppress(ImportError):
            return import_module(layout)
    raise NotOnThisMachineError(
        "cuda-python is not installed",
        "pip install 'cuda-python>=12.6,<13' where CUDA is 12, as on JetPack 6, and 'cuda-python>=13' where it is 13",
    )


def _version(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"
