"""The CUDA runtime calls that an engine needs, with every status checked."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pmm_edge.errors import PmmError, install

OUT_OF_MEMORY = "The GPU may be out of memory; check nvidia-smi or tegrastats"


class NotOnThisMachineError(PmmError):
    """A GPU, a driver or a library is missing here; the same command can succeed on another machine."""

    exit_code = 1


class GpuError(PmmError):
    """The GPU or its driver failed, for example because memory ran out."""


class Cuda:
    """One GPU with one stream, and the memory allocated on it until `release`.

    Not thread-safe: hold a lock to share it, and call `use` first, because the current GPU is a property of a thread.
    Raises NotOnThisMachineError if cuda-python, the driver or the GPU is missing, GpuError if a CUDA call fails.
    """

    def __init__(self, index: int = 0) -> None:
        self.index, self._free = index, list[Callable[[], object]]()
        self._api = api = _import_runtime()
        try:
            status, count = api.cudaGetDeviceCount()
        except RuntimeError as error:  # raised by cuda-python if libcuda.so.1 is missing
            raise NotOnThisMachineError(f"there is no NVIDIA driver ({error})", "Install the driver") from error
        if status != api.cudaError_t.cudaSuccess:
            remedy = "Install a driver that supports this CUDA"
            raise NotOnThisMachineError(f"CUDA cannot use a GPU ({status.name})", remedy)
        if index >= count:
            raise NotOnThisMachineError(f"there is no GPU cuda:{index}; CUDA finds {count}", "Omit the device")
        self.use()
        properties = self._checked(api.cudaGetDeviceProperties(index), "reading GPU properties")
        self.name: str = properties.name.decode().rstrip("\0")
        self.compute_capability = f"{properties.major}.{properties.minor}"
        version = self._checked(api.cudaRuntimeGetVersion(), "reading the CUDA version")
        self.runtime_version = f"{version // 1000}.{version % 1000 // 10}"  # 13020 is 13.2
        # Non-blocking: the default stream of other libraries neither waits for this one nor breaks a graph capture.
        self._stream = self._checked(api.cudaStreamCreateWithFlags(api.cudaStreamNonBlocking), "creating a stream")
        self._free.append(lambda: api.cudaStreamDestroy(self._stream))
        self.stream = native_handle(self._stream)  # its address, as other libraries take it
        self._before, self._after = self.event(), self.event()

    def use(self) -> None:
        """Make this the current GPU of the calling thread."""
        self._checked(self._api.cudaSetDevice(self.index), f"selecting cuda:{self.index}")

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate an array in page-locked host memory, from which copies run asynchronously."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._checked(self._api.cudaMallocHost(size), f"allocating {size} bytes of pinned memory")
        self._free.append(lambda: self._api.cudaFreeHost(address))
        memory = (ctypes.c_uint8 * size).from_address(int(address))
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def device_memory(self, size: int) -> int:
        """Allocate bytes on the GPU and return their address."""
        # Engines without scratch memory request 0 bytes, for which CUDA returns no address.
        address = self._checked(self._api.cudaMalloc(max(size, 1)), f"allocating {size} bytes on the GPU")
        self._free.append(lambda: self._api.cudaFree(address))
        return int(address)

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a pinned array to the GPU."""
        kind, source = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice, array.ctypes.data
        self._checked(self._api.cudaMemcpyAsync(address, source, array.nbytes, kind, self._stream), "copying")

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Enqueue a copy from the GPU to a pinned array."""
        kind, target = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost, array.ctypes.data
        self._checked(self._api.cudaMemcpyAsync(target, address, array.nbytes, kind, self._stream), "copying")

    def synchronize(self) -> None:
        self._checked(self._api.cudaStreamSynchronize(self._stream), "running on the GPU")

    def event(self) -> Any:
        event = self._checked(self._api.cudaEventCreate(), "creating an event")
        self._free.append(lambda: self._api.cudaEventDestroy(event))
        return event

    def record(self, event: Any) -> None:
        """Enqueue an event after the work that is already enqueued."""
        self._checked(self._api.cudaEventRecord(event, self._stream), "recording an event")

    def wait(self, event: Any) -> None:
        """Wait until the work enqueued before an event is done."""
        self._checked(self._api.cudaEventSynchronize(event), "running on the GPU")

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Capture what `enqueue` enqueues as a CUDA graph; return a function that launches it."""
        # Thread-local: other threads may call CUDA during the capture.
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(self._api.cudaStreamBeginCapture(self._stream, mode), "capturing a CUDA graph")
        try:
            enqueue()
        except BaseException:
            self._api.cudaStreamEndCapture(self._stream)  # otherwise the stream stays unusable
            raise
        graph = self._checked(self._api.cudaStreamEndCapture(self._stream), "capturing a CUDA graph")
        executable = self._checked(self._api.cudaGraphInstantiate(graph, 0), "instantiating a CUDA graph")
        self._checked(self._api.cudaGraphDestroy(graph), "freeing a CUDA graph")
        self._free.append(lambda: self._api.cudaGraphExecDestroy(executable))
        return lambda: self._checked(self._api.cudaGraphLaunch(executable, self._stream), "launching a CUDA graph")

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        """Run what `enqueue` enqueues and return the time between two events around it."""
        self.record(self._before)
        enqueue()
        self.record(self._after)
        self.synchronize()
        return float(self._checked(self._api.cudaEventElapsedTime(self._before, self._after), "timing on the GPU"))

    def release(self) -> None:
        """Free everything; errors are ignored, as the failed call has raised already."""
        while self._free:
            self._free.pop()()

    def _checked(self, result: tuple[Any, ...], doing: str) -> Any:
        """Return the value of a call, whose first item is its status."""
        status, *values = result
        if status != self._api.cudaError_t.cudaSuccess:
            full = status == self._api.cudaError_t.cudaErrorMemoryAllocation
            remedy = OUT_OF_MEMORY if full else "Start the program again; if it fails again, check nvidia-smi and dmesg"
            raise GpuError(f"CUDA failed while {doing} ({status.name})", remedy)
        return values[0] if values else None


def native_handle(handle: Any) -> int:
    """Return the address that an object of cuda-python holds; `int(handle)` is deprecated since cuda-bindings 13."""
    with suppress(ImportError, AttributeError, TypeError):
        return int(import_module("cuda.bindings.utils").get_cuda_native_handle(handle))
    return int(handle)


def _import_runtime() -> Any:
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # of cuda-python since 12.6, and before
        with suppress(ImportError):
            return import_module(name)
    raise NotOnThisMachineError(
        "cuda-python is not installed",
        f"{install('trt')}, with [rtx] for TensorRT for RTX, [jetson6] on JetPack 6, [jetson7] on JetPack 7",
    )
