# ruff: noqa: N803, N806, E731  names are those of CUDA and TensorRT
"""Doubles of TensorRT and cuda-python that run an engine's ONNX file in ONNX Runtime.

They are as strict as the real ones where a mistake would show only on a GPU: work waits until the stream is
synchronized, a shape cannot be captured before it has run, a context must live and must not change under its graph, and
scratch memory must be provided. Every public name exists in the real packages (test_trt_contract.py compares them).
"""

import ctypes
import functools
import json
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

FP32, FP16, INT8 = (
    {"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": kind}} for kind in ("Float", "Half", "Int8")
)
SCRATCH = 4096
STREAM = 7


class FakeGpu:
    """One GPU, and what a test decides about it and about TensorRT."""

    def __init__(self, name: str = "Orin", compute_capability: str = "8.7") -> None:
        self.name, self.count = name, 1
        self.major, self.minor = map(int, compute_capability.split("."))
        self.calls: Counter[str] = Counter()
        self.fails: dict[str, int] = {}  # the status of CUDA calls that fail
        self.memory: dict[int, np.ndarray] = {}
        self.queues: list[list[Callable[[], None]]] = [[]]  # of the stream, then of the graph that is captured
        self.clock = 0.0  # milliseconds of work done: 1 per copy, 10 per image
        self.layers: list[Any] = [FP32]  # what the inspector reports
        self.error = ""  # in the log, with which the next call of TensorRT fails
        self.built: list[Any] = []  # the configuration of each build

    def allocate(self, size: int) -> int:
        memory = np.zeros(size, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        del self.memory[address]


def cuda_runtime(gpu: FakeGpu) -> SimpleNamespace:
    """`cuda.bindings.runtime` over one GPU."""
    api = SimpleNamespace(
        cudaError_t=IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2}),
        cudaMemcpyKind=IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2}),
        cudaStreamCaptureMode=IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1}),
        cudaStreamNonBlocking=1,
    )

    def add(name: str, function: Callable[..., Any]) -> None:
        """Add a function that returns its status and, unless it is None, the value of `function`."""

        @functools.wraps(function)
        def call(*arguments: Any) -> tuple[Any, ...]:
            gpu.calls[name] += 1
            value, status = function(*arguments), api.cudaError_t(gpu.fails.get(name, 0))
            return (status,) if value is None else (status, value)

        setattr(api, name, call)

    def copy(dst, src, count, kind, stream):
        def work():
            ctypes.memmove(dst, src, count)
            gpu.clock += 1

        gpu.queues[-1].append(work)

    def synchronize(stream):
        while gpu.queues[0]:
            gpu.queues[0].pop(0)()

    def wait(event):
        while event["time"] is None:
            gpu.queues[0].pop(0)()

    def record(event, stream):
        assert len(gpu.queues) == 1, "an event in a graph has no time"
        event["time"] = None
        gpu.queues[0].append(lambda: event.update(time=gpu.clock))

    for name, function in {
        "GetDeviceCount": lambda: gpu.count,
        "GetDeviceProperties": lambda device: SimpleNamespace(name=gpu.name.encode(), major=gpu.major, minor=gpu.minor),
        "SetDevice": lambda device: None,
        "RuntimeGetVersion": lambda: 12060,
        "GetErrorName": lambda error: error.name.encode(),
        "GetErrorString": lambda error: b"what went wrong",
        "StreamCreateWithFlags": lambda flags: STREAM * (flags == api.cudaStreamNonBlocking),
        "StreamDestroy": lambda stream: None,
        "StreamSynchronize": synchronize,
        "MallocHost": gpu.allocate,
        "Malloc": gpu.allocate,
        "FreeHost": lambda ptr: gpu.free(ptr),
        "Free": lambda devPtr: gpu.free(devPtr),
        "MemcpyAsync": copy,
        "EventCreate": lambda: {"time": None},
        "EventDestroy": lambda event: None,
        "EventRecord": record,
        "EventSynchronize": wait,
        "EventElapsedTime": lambda start, end: end["time"] - start["time"],
        "StreamBeginCapture": lambda stream, mode: gpu.queues.append([]),
        "StreamEndCapture": lambda stream: gpu.queues.pop(),
        "GraphInstantiate": lambda graph, flags: list(graph),
        "GraphDestroy": lambda graph: None,
        "GraphLaunch": lambda graphExec, stream: gpu.queues[0].extend(graphExec),
        "GraphExecDestroy": lambda graphExec: None,
    }.items():
        add(f"cuda{name}", function)
    return api


class Strict:
    """A class whose public attributes can be set only where it declares them, as classes of pybind11."""

    def __setattr__(self, name: str, value: Any) -> None:
        assert name[0] == "_" or name in vars(type(self)), name
        super().__setattr__(name, value)


def tensorrt(gpu: FakeGpu, version: str = "10.3.0") -> SimpleNamespace:
    """`tensorrt` over one GPU."""
    NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"])
    BuilderFlag = IntEnum("BuilderFlag", ["TF32", "VERSION_COMPATIBLE"])
    MemoryPoolType = IntEnum("MemoryPoolType", ["WORKSPACE"])
    newer = ["SAME_COMPUTE_CAPABILITY"] * (tuple(map(int, version.split(".")[:2])) >= (10, 9))
    HardwareCompatibilityLevel = IntEnum("HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS", *newer])
    ProfilingVerbosity = IntEnum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
    LayerInformationFormat = IntEnum("LayerInformationFormat", ["JSON"])
    ExecutionContextAllocationStrategy = IntEnum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])

    class ILogger:
        Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "INFO"])

    def failed(logger: ILogger, error: str = "") -> bool:
        if error := gpu.error or error:
            logger.log(ILogger.Severity.ERROR, error)
        return error != ""

    class IProgressMonitor:
        pass

    class IHostMemory(bytes):
        nbytes = property(len)

    class ITimingCache(bytearray):
        serialize = lambda self: IHostMemory(self)

    class IOptimizationProfile(Strict):
        def set_shape(self, input, min, opt, max):
            self._shapes = {"name": input, "min": min, "opt": opt, "max": max}

    class IBuilderConfig(Strict):
        builder_optimization_level = 3
        profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        progress_monitor = _cache = None

        def __init__(self):
            self._flags, self._pools = {BuilderFlag.TF32}, {}

        set_flag = lambda self, flag: self._flags.add(flag)
        clear_flag = lambda self, flag: self._flags.discard(flag)
        set_memory_pool_limit = lambda self, pool, pool_size: self._pools.update({pool: pool_size})
        get_timing_cache = lambda self: self._cache

        def add_optimization_profile(self, profile):
            self._profile = profile._shapes

        def create_timing_cache(self, serialized_timing_cache):
            return None if serialized_timing_cache == b"damaged" else ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache, ignore_mismatch):
            self._cache = cache
            return cache != b"of another device"

    class INetworkDefinition:
        pass

    class OnnxParser(Strict):
        def __init__(self, network, logger):
            self._network = network

        def parse(self, model):
            self._network._onnx = model
            return True

    class Builder(Strict):
        def __init__(self, logger):
            self._logger = logger

        create_builder_config = lambda self: IBuilderConfig()
        create_optimization_profile = lambda self: IOptimizationProfile()

        def create_network(self, flags=0):
            assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return INetworkDefinition()

        def build_serialized_network(self, network, config):
            gpu.built.append(config)
            if failed(self._logger):
                return None
            if config._cache is not None:
                config._cache += b"timings"
            return IHostMemory(pickle.dumps((config._profile, network._onnx)))

    class Runtime(Strict):
        engine_host_code_allowed = False

        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            return None if failed(self._logger) else ICudaEngine(serialized_engine, self._logger)

    class ICudaEngine(Strict):
        device_memory_size_v2 = SCRATCH

        def __init__(self, _plan, _logger):
            (self._profile, onnx), self._logger = pickle.loads(_plan), _logger
            self._session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])

        create_engine_inspector = lambda self: EngineInspector()

        def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
            return IExecutionContext(self, strategy)

    class IExecutionContext(Strict):
        def __init__(self, _engine, _strategy):
            self._engine, self._addresses, self._has_run = _engine, {}, False
            self._memory = SCRATCH if _strategy == ExecutionContextAllocationStrategy.STATIC else 0

        def set_device_memory(self, memory, size):
            assert memory in gpu.memory
            self._memory = size

        def set_input_shape(self, name, shape):
            self._shape, profile = shape, self._engine._profile
            fits = name == profile["name"] and shape[1:] == profile["opt"][1:]
            return fits and profile["min"][0] <= shape[0] <= profile["max"][0]

        def set_tensor_address(self, name, memory):
            self._addresses[name] = memory
            return memory in gpu.memory

        def execute_async_v3(self, stream_handle):
            assert stream_handle == STREAM
            refused = self._memory < SCRATCH or (len(gpu.queues) > 1 and not self._has_run)
            if failed(self._engine._logger, "no scratch memory, or captured too early" if refused else ""):
                return False
            self._has_run, shape, context = True, self._shape, weakref.ref(self)

            def run():
                alive = context()
                assert alive, "the context was destroyed before its work was done, or under its CUDA graph"
                assert shape == alive._shape, "the context has changed under its CUDA graph"
                gpu.clock += 10 * shape[0]
                session = alive._engine._session
                (images,), (embeddings,) = session.get_inputs(), session.get_outputs()
                dtype = "uint8" if "uint8" in images.type else "float32"
                pixels = gpu.memory[alive._addresses[images.name]].view(dtype)[: np.prod(shape)].reshape(shape)
                (result,) = session.run(None, {images.name: pixels})
                gpu.memory[alive._addresses[embeddings.name]].view("float32")[: result.size] = result.ravel()

            gpu.queues[-1].append(run)
            return True

    class EngineInspector(Strict):
        execution_context = None

        def get_engine_information(self, format):  # without a context and its shape, types are not reported
            return json.dumps({"Layers": gpu.layers if self.execution_context else []})

    public = {name: value for name, value in locals().items() if isinstance(value, type)}
    return SimpleNamespace(**public, __version__=version)


def tensorrt_rtx(gpu: FakeGpu, version: str = "1.7.1.116") -> SimpleNamespace:
    """`tensorrt_rtx` over one GPU: the runtime, which compiles when a context is created."""
    trt = tensorrt(gpu, version)
    DynamicShapesKernelSpecializationStrategy = IntEnum("DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER"])

    class IRuntimeCache(Strict):
        _content = b""

        def serialize(self):
            return trt.IHostMemory(self._content + b"kernels")

        def deserialize(self, blob):
            if blob.startswith(b"kernels"):
                self._content = blob
            return blob.startswith(b"kernels")

    class IRuntimeConfig(Strict):
        dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        create_runtime_cache = lambda self: IRuntimeCache()

        def set_runtime_cache(self, cache):
            self._cache = cache
            return True

        def set_execution_context_allocation_strategy(self, strategy):
            self._strategy = strategy

    class ICudaEngine(trt.ICudaEngine):
        create_runtime_config = lambda self: IRuntimeConfig()

        def create_execution_context(self, runtime_config=None):
            eager = DynamicShapesKernelSpecializationStrategy.EAGER  # a graph would keep temporary kernels
            assert runtime_config.dynamic_shapes_kernel_specialization_strategy == eager
            return super().create_execution_context(runtime_config._strategy)

    class Runtime(trt.Runtime):
        deserialize_cuda_engine = lambda self, serialized_engine: ICudaEngine(serialized_engine, self._logger)

    own = {name: value for name, value in locals().items() if isinstance(value, type)}
    return SimpleNamespace(**vars(trt) | own)
