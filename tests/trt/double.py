# ruff: noqa: N801, N802, N803, N806, N815, E731  names are those of CUDA and TensorRT
"""Stand-ins for TensorRT and cuda-python that run an engine's ONNX file in ONNX Runtime.

They are as strict as the real ones where a mistake would show only on a GPU: work waits until the stream is
synchronized, a shape cannot be captured before it has run, a context must live and must not change under its graph, and
scratch memory must be provided. Every public name exists in the real packages (test_trt_contract.py compares them);
what only tests need begins with an underscore or is in FakeGpu.
"""

import ctypes
import json
import struct
import weakref
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

FP16_LAYERS = [{"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": "Half", "Count": 9}}]
FP32_LAYERS = [{"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": "Float", "Count": 9}}]
SCRATCH = 4096


class FakeGpu:
    """One GPU, and what a test decides about it and about TensorRT."""

    def __init__(self, name: str = "Orin", capability: tuple[int, int] = (8, 7)) -> None:
        self.name, self.capability = name, capability
        self.count = 1
        self.fails: dict[str, int] = {}
        """Status of the CUDA calls that fail."""
        self.calls: Counter[str] = Counter()
        self.memory: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.layers: list[Any] = FP32_LAYERS
        """What the inspector reports."""
        self.parser_errors: list[tuple[str, str, str]] = []
        """Node, operator and description."""
        self.error: str | None = None
        """An error in the log, with which the next call of TensorRT fails."""
        self.clock = 0.0
        """Milliseconds of work done: 1 per copy, 10 per image."""
        self.built: list[Any] = []
        """The configuration of each build."""

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def allocate(self, size: int) -> int:
        memory = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def array(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        memory = np.ctypeslib.as_array(self.memory[address])
        return memory[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


Install = Callable[..., FakeGpu]
"""The fixture `install`: put a GPU and a version of TensorRT on this machine."""


def cuda_runtime(gpu: FakeGpu) -> ModuleType:
    """`cuda.bindings.runtime` over one GPU."""

    class cudaError_t(IntEnum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2
        cudaErrorInsufficientDriver = 35

    class cudaMemcpyKind(IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaStreamCaptureMode(IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    cudaStreamNonBlocking = 1

    def status(name: str) -> cudaError_t:
        gpu.calls[name] += 1
        return cudaError_t(gpu.fails.get(name, 0))

    cudaGetDeviceCount = lambda: (status("cudaGetDeviceCount"), gpu.count)
    cudaSetDevice = lambda device: (status("cudaSetDevice"),)
    cudaRuntimeGetVersion = lambda: (status("cudaRuntimeGetVersion"), 12060)
    cudaDriverGetVersion = lambda: (status("cudaDriverGetVersion"), 12080)
    cudaGetErrorName = lambda error: (status("cudaGetErrorName"), cudaError_t(error).name.encode())
    cudaGetErrorString = lambda error: (status("cudaGetErrorString"), b"what went wrong")
    cudaStreamCreateWithFlags = lambda flags: (status("cudaStreamCreateWithFlags"), 7 * (flags == 1))
    cudaStreamDestroy = lambda stream: (status("cudaStreamDestroy"),)
    cudaMallocHost = lambda size: (status("cudaMallocHost"), gpu.allocate(size))
    cudaMalloc = lambda size: (status("cudaMalloc"), gpu.allocate(size))
    cudaFreeHost = lambda ptr: (status("cudaFreeHost"), gpu.memory.pop(ptr))[:1]
    cudaFree = lambda devPtr: (status("cudaFree"), gpu.memory.pop(devPtr))[:1]
    cudaEventCreate = lambda: (status("cudaEventCreate"), [None])
    cudaEventDestroy = lambda event: (status("cudaEventDestroy"),)
    cudaGraphInstantiate = lambda graph, flags: (status("cudaGraphInstantiate"), list(graph))
    cudaGraphDestroy = lambda graph: (status("cudaGraphDestroy"),)
    cudaGraphExecDestroy = lambda graphExec: (status("cudaGraphExecDestroy"),)

    def cudaGetDeviceProperties(device):
        properties = SimpleNamespace(name=gpu.name.encode(), major=gpu.capability[0], minor=gpu.capability[1])
        return status("cudaGetDeviceProperties"), properties

    def cudaMemcpyAsync(dst, src, count, kind, stream):
        def copy():
            ctypes.memmove(dst, src, count)
            gpu.clock += 1

        gpu.enqueue(copy)
        return (status("cudaMemcpyAsync"),)

    def cudaStreamSynchronize(stream):
        while gpu.queue:
            gpu.queue.pop(0)()
        return (status("cudaStreamSynchronize"),)

    def cudaEventSynchronize(event):
        while event[0] is None and gpu.queue:
            gpu.queue.pop(0)()
        return (status("cudaEventSynchronize"),)

    def cudaEventRecord(event, stream):
        event[0] = None

        def record():
            event[0] = gpu.clock

        assert gpu.recording is None, "an event in a graph has no time"
        gpu.enqueue(record)
        return (status("cudaEventRecord"),)

    def cudaEventElapsedTime(start, end):
        assert not gpu.queue, "cudaErrorNotReady: the stream was not synchronized"
        return status("cudaEventElapsedTime"), end[0] - start[0]

    def cudaStreamBeginCapture(stream, mode):
        gpu.recording = []
        return (status("cudaStreamBeginCapture"),)

    def cudaStreamEndCapture(stream):
        graph, gpu.recording = gpu.recording, None
        return status("cudaStreamEndCapture"), graph

    def cudaGraphLaunch(graphExec, stream):
        for work in graphExec:
            gpu.enqueue(work)
        return (status("cudaGraphLaunch"),)

    return _module("cuda.bindings.runtime", locals(), "cuda")


def tensorrt(gpu: FakeGpu, version: str = "10.3.0") -> ModuleType:
    """`tensorrt` over one GPU."""
    __version__ = version
    NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    BuilderFlag = IntEnum("BuilderFlag", {"TF32": 6, "VERSION_COMPATIBLE": 13})
    MemoryPoolType = IntEnum("MemoryPoolType", {"WORKSPACE": 0})
    HardwareCompatibilityLevel = IntEnum("HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1})
    ProfilingVerbosity = IntEnum("ProfilingVerbosity", {"LAYER_NAMES_ONLY": 0, "DETAILED": 2})
    LayerInformationFormat = IntEnum("LayerInformationFormat", {"JSON": 1})
    ExecutionContextAllocationStrategy = IntEnum("ExecutionContextAllocationStrategy", {"STATIC": 0, "USER_MANAGED": 2})

    class ILogger:
        class Severity(IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            INFO = 3

        def __init__(self):
            self._initialized = True

        def log(self, severity, msg):
            raise NotImplementedError

    class IProgressMonitor:
        def __init__(self):
            self._initialized = True

        def phase_start(self, phase_name, parent_phase, num_steps):
            raise NotImplementedError

        def step_complete(self, phase_name, step):
            raise NotImplementedError

        def phase_finish(self, phase_name):
            raise NotImplementedError

    class IHostMemory(bytearray):
        @property
        def nbytes(self):
            return len(self)

    class ITimingCache:
        def __init__(self, _content):
            self._content = _content

        def serialize(self):
            return IHostMemory(self._content)

    class IOptimizationProfile:
        def set_shape(self, input, min, opt, max):
            self._shapes = {"name": input, "min": min, "opt": opt, "max": max}

    class IBuilderConfig:
        builder_optimization_level = 3
        profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        progress_monitor: Any = None

        def __init__(self):
            self._flags, self._pools, self._cache = {BuilderFlag.TF32}, {}, None

        def set_flag(self, flag):
            self._flags.add(flag)

        def clear_flag(self, flag):
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool, pool_size):
            self._pools[pool] = pool_size

        def add_optimization_profile(self, profile):
            self._profile = profile._shapes
            return 0

        def create_timing_cache(self, serialized_timing_cache):
            known = serialized_timing_cache in (b"", b"OTHER") or serialized_timing_cache.startswith(b"TIMES")
            return ITimingCache(serialized_timing_cache) if known else None

        def set_timing_cache(self, cache, ignore_mismatch):
            self._cache = cache
            return cache._content != b"OTHER"  # timings of another device

        def get_timing_cache(self):
            return self._cache

    class INetworkDefinition:
        pass

    class ParserError:
        def __init__(self, _node, _operator, _text):
            self._fields = _node, _operator, _text

        def node_name(self):
            return self._fields[0]

        def node_operator(self):
            return self._fields[1]

        def desc(self):
            return self._fields[2]

    class OnnxParser:
        def __init__(self, network, logger):
            self._network = network

        @property
        def num_errors(self):
            return len(gpu.parser_errors)

        def get_error(self, index):
            return ParserError(*gpu.parser_errors[index])

        def parse_from_file(self, model):
            self._network._onnx = Path(model).read_bytes()
            return not gpu.parser_errors

    class Builder:
        def __init__(self, logger):
            assert logger._initialized, "the __init__ of TensorRT was not called"
            self._logger = logger

        def create_network(self, flags=0):
            assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return INetworkDefinition()

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            gpu.built.append(config)
            if gpu.error:
                self._logger.log(ILogger.Severity.ERROR, gpu.error)
                return None
            if config.progress_monitor and not _report_phases(config.progress_monitor):
                return None
            if config._cache:
                config._cache._content = b"TIMES" + bytes([len(config._cache._content)])
            shapes = json.dumps(config._profile).encode()
            return IHostMemory(struct.pack("<I", len(shapes)) + shapes + network._onnx)

    def _report_phases(monitor: Any) -> bool:
        assert monitor._initialized, "the __init__ of TensorRT was not called"
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 4)
        goes_on = all(monitor.step_complete("Timing", step) for step in range(3))  # finishes early
        monitor.phase_finish("Timing")
        goes_on &= monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        return goes_on

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            if gpu.error:
                self._logger.log(ILogger.Severity.ERROR, gpu.error)
                return None
            return ICudaEngine(bytes(serialized_engine), self._logger)

    class ICudaEngine:
        device_memory_size_v2 = SCRATCH

        def __init__(self, _plan, _logger):
            (size,) = struct.unpack("<I", _plan[:4])
            self._profile, self._logger = json.loads(_plan[4 : 4 + size]), _logger
            self._session = onnxruntime.InferenceSession(_plan[4 + size :], providers=["CPUExecutionProvider"])

        def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
            return IExecutionContext(self, strategy)

        def create_engine_inspector(self):
            return EngineInspector()

    class IExecutionContext:
        def __init__(self, _engine, _strategy):
            self._engine, self._addresses, self._shape, self._has_run = _engine, {}, None, False
            self._memory = SCRATCH if _strategy == ExecutionContextAllocationStrategy.STATIC else 0

        def set_device_memory(self, memory, size):
            assert memory in gpu.memory
            self._memory = size

        def set_input_shape(self, name, shape):
            profile = self._engine._profile
            fits = name == profile["name"] and list(shape[1:]) == profile["opt"][1:]
            self._shape = shape
            return fits and profile["min"][0] <= shape[0] <= profile["max"][0]

        def set_tensor_address(self, name, memory):
            self._addresses[name] = memory
            return memory in gpu.memory

        def execute_async_v3(self, stream_handle):
            assert stream_handle == 7
            if gpu.error or self._memory < SCRATCH or (gpu.recording is not None and not self._has_run):
                error = gpu.error or "no scratch memory, or captured too early"
                self._engine._logger.log(ILogger.Severity.ERROR, error)
                return False
            self._has_run, shape, context = True, self._shape, weakref.ref(self)

            def run():
                alive = context()
                assert alive, "the context was destroyed before its work was done, or under its CUDA graph"
                alive._run(shape)

            gpu.enqueue(run)
            return True

        def _run(self, shape):
            gpu.clock += 10 * shape[0]
            assert shape == self._shape, "the context has changed under its CUDA graph"
            session = self._engine._session
            (images,), (embeddings,) = session.get_inputs(), session.get_outputs()
            dtype = "uint8" if "uint8" in images.type else "float32"
            result = session.run(None, {images.name: gpu.array(self._addresses[images.name], shape, dtype)})[0]
            gpu.array(self._addresses[embeddings.name], result.shape, "float32")[:] = result

    class EngineInspector:
        execution_context: Any = None

        def get_engine_information(self, format):
            assert self.execution_context, "no shape: the types of dynamic tensors are not reported"
            return json.dumps({"Layers": gpu.layers})

    return _module("tensorrt", locals())


def _module(name: str, names: dict[str, Any], prefix: str = "") -> ModuleType:
    """A module of the classes, functions and numbers whose names begin with `prefix`."""
    module = ModuleType(name)
    for public, value in names.items():
        named = public[0] != "_" and public.startswith(prefix)
        if public == "__version__" or (named and isinstance(value, type | FunctionType | int)):
            setattr(module, public, value)
    return module
