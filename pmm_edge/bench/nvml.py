"""The few questions to NVIDIA's management library (NVML), which comes with the driver; no package is needed.

Signatures are those of the C headers; a test holds them against the ones that cuda-bindings was compiled with.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_uint, c_ulonglong, c_void_p

from pmm_edge.runtime.embedder import parse_device

_TEXT = 96
"""Bytes of a name; NVML and CUDA want no more."""
CLOCK_SM = 1
SLOWED_BY = {
    0x4: "its power limit",
    0x8: "a hardware slowdown",
    0x20: "its temperature",
    0x40: "its temperature",
    0x80: "an external power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons that mean less speed than the clocks were set to."""


class Memory(ctypes.Structure):
    """nvmlMemory_v2_t."""

    _fields_ = (
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    )
    VERSION = 40 | 2 << 24  # its size, and 2


NVML = {
    "nvmlInit_v2": (),
    "nvmlSystemGetDriverVersion": (c_char_p, c_uint),
    "nvmlDeviceGetHandleByPciBusId_v2": (c_char_p, POINTER(c_void_p)),
    "nvmlDeviceGetName": (c_void_p, c_char_p, c_uint),
    "nvmlDeviceGetTotalEnergyConsumption": (c_void_p, POINTER(c_ulonglong)),
    "nvmlDeviceGetMemoryInfo_v2": (c_void_p, POINTER(Memory)),
    "nvmlDeviceGetClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetMaxClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetCurrentClocksEventReasons": (c_void_p, POINTER(c_ulonglong)),
}
CUDA = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
}


class Gpu:
    """One GPU, as NVML sees it. What the GPU or its driver does not tell is None."""

    def __init__(self, library: ctypes.CDLL, handle: c_void_p) -> None:
        self._library, self._handle = library, handle

    @property
    def name(self) -> str | None:
        text = ctypes.create_string_buffer(_TEXT)
        return text.value.decode(errors="replace") if self._ask("nvmlDeviceGetName", text, _TEXT) else None

    @property
    def driver(self) -> str | None:
        text = ctypes.create_string_buffer(_TEXT)
        told = _call(self._library, NVML, "nvmlSystemGetDriverVersion", text, _TEXT)
        return text.value.decode(errors="replace") if told else None

    @property
    def joules(self) -> float | None:
        """Energy since the driver was loaded; of Volta and later."""
        millijoules = c_ulonglong()
        told = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.byref(millijoules))
        return millijoules.value / 1000 if told else None

    @property
    def used_mib(self) -> float | None:
        """Memory that all processes together hold."""
        memory = Memory(version=Memory.VERSION)
        return memory.used / 2**20 if self._ask("nvmlDeviceGetMemoryInfo_v2", ctypes.byref(memory)) else None

    @property
    def clock_mhz(self) -> int | None:
        """Of the multiprocessors, at this moment."""
        clock = c_uint()
        return clock.value if self._ask("nvmlDeviceGetClockInfo", CLOCK_SM, ctypes.byref(clock)) else None

    @property
    def most_mhz(self) -> int | None:
        """The highest clock that the multiprocessors can have."""
        clock = c_uint()
        return clock.value if self._ask("nvmlDeviceGetMaxClockInfo", CLOCK_SM, ctypes.byref(clock)) else None

    @property
    def slowed_by(self) -> list[str]:
        """What keeps the clocks down at this moment; empty where nothing does, or the driver does not tell."""
        reasons = c_ulonglong()
        if not self._ask("nvmlDeviceGetCurrentClocksEventReasons", ctypes.byref(reasons)):
            return []
        return list(dict.fromkeys(text for bit, text in SLOWED_BY.items() if reasons.value & bit))

    def _ask(self, name: str, *arguments: object) -> bool:
        return _call(self._library, NVML, name, self._handle, *arguments)


def open_gpu(device: str, nvml: str = "libnvidia-ml.so.1", cuda: str = "libcuda.so.1") -> Gpu | None:
    """The GPU that CUDA calls `cuda:N`: NVML counts in another order, and knows nothing of CUDA_VISIBLE_DEVICES.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; `tensorrt:N`, ONNX Runtime's provider, is on the GPU of the same number.
        nvml, cuda: the libraries.

    Returns:
        None for the CPU, without a driver, and for a GPU that NVML does not know.
    """
    kind, index = parse_device(device, tensorrt=True)
    if kind == "cpu":
        return None
    try:
        library, driver = ctypes.CDLL(nvml), ctypes.CDLL(cuda)
    except OSError:
        return None
    number, bus, handle = c_int(), ctypes.create_string_buffer(_TEXT), c_void_p()
    found = (
        _call(driver, CUDA, "cuInit", 0)
        and _call(driver, CUDA, "cuDeviceGet", ctypes.byref(number), index)
        and _call(driver, CUDA, "cuDeviceGetPCIBusId", bus, _TEXT, number)
        and _call(library, NVML, "nvmlInit_v2")
        and _call(library, NVML, "nvmlDeviceGetHandleByPciBusId_v2", bus, ctypes.byref(handle))
    )
    return Gpu(library, handle) if found else None


def _call(library: ctypes.CDLL, signatures: dict[str, tuple[type, ...]], name: str, *arguments: object) -> bool:
    """Whether a function is there and says that it succeeded."""
    try:
        function = library[name]
    except AttributeError:
        return False
    function.argtypes, function.restype = signatures[name], c_int
    return function(*arguments) == 0
