"""Questions to NVML: their signatures are the real ones, and a library of that interface answers them."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from pmm_edge.bench.resources import CLOCK_SM, CUDA, NVML, SLOWED_BY, Gpu, Memory, open_gpu

C_TYPES = {
    "nvmlDevice_t": ctypes.c_void_p,
    "nvmlDevice_t*": ctypes.POINTER(ctypes.c_void_p),
    "char*": ctypes.c_char_p,
    "const char*": ctypes.c_char_p,
    "int": ctypes.c_int,
    "CUdevice": ctypes.c_int,
    "CUdevice*": ctypes.POINTER(ctypes.c_int),
    "nvmlClockType_t": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned int*": ctypes.POINTER(ctypes.c_uint),
    "unsigned long long": ctypes.c_ulonglong,
    "unsigned long long*": ctypes.POINTER(ctypes.c_ulonglong),
    "nvmlMemory_v2_t*": ctypes.POINTER(Memory),
}


def declarations(name: str) -> str:
    """The C interface that cuda-bindings was compiled with, as it ships it."""
    found = find_spec("cuda.bindings") if find_spec("cuda") else None
    path = Path(*(found.submodule_search_locations if found else [""]), name)
    if not path.is_file():
        pytest.skip(f"cuda-bindings with {name} is not installed")
    return path.read_text()


@pytest.mark.parametrize(("signatures", "header"), [(NVML, "cynvml.pxd"), (CUDA, "cydriver.pxd")])
def test_signatures_are_those_of_the_headers(signatures: dict[str, tuple[type, ...]], header: str) -> None:
    text = declarations(header)
    for name, types in signatures.items():
        declared = re.search(rf"^cdef \w+ {name}\((.*?)\)", text, flags=re.MULTILINE)
        assert declared, name
        real = [C_TYPES[argument.strip().rpartition(" ")[0]] for argument in declared[1].split(",") if argument]
        assert list(types) == real, name


def test_structures_and_numbers_are_those_of_the_headers() -> None:
    text = declarations("cynvml.pxd")
    declared = re.search(r"ctypedef struct nvmlMemory_v2_t .*:\n((?:    .*\n)+)", text)
    assert declared
    real = [line.strip().rpartition(" ") for line in declared[1].splitlines()]
    assert [(name, C_TYPES[kind]) for kind, _, name in real] == list(Memory._fields_)
    # NVML_STRUCT_VERSION of nvml.h
    assert ctypes.sizeof(Memory) | 2 << 24 == Memory.VERSION
    assert f'NVML_CLOCK_SM "NVML_CLOCK_SM" = {CLOCK_SM}' in text
    nvml = pytest.importorskip("cuda.bindings.nvml")
    slower = ("SLOWDOWN", "POWER_CAP", "POWER_BRAKE")
    named = {reason.value for reason in nvml.ClocksEventReasons if any(word in reason.name for word in slower)}
    assert named == set(SLOWED_BY)


SOURCE = """
#include <string.h>
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_t;
static int handle, ready;
static unsigned long long energy = 5000;
int cuInit(unsigned int flags) { ready = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = 40 + number; return ready && number < 2 ? 0 : 101; }
int cuDeviceGetPCIBusId(char *bus, int size, int device) {
    strncpy(bus, device == 41 ? "0000:C1:00.0" : "0000:01:00.0", size); return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned int size) { strncpy(text, "580.65.06", size); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    *device = &handle; return strcmp(bus, "0000:C1:00.0") ? 6 : 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned int size) {
    strncpy(text, "NVIDIA H100", size); return device == &handle ? 0 : 2; }
#ifdef FULL
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *value) { *value = energy += 1500; return 0; }
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_t *memory) {
    memory->used = 3ull << 30; return memory->version == (sizeof(memory_t) | 2 << 24) ? 0 : 25; }
int nvmlDeviceGetClockInfo(void *device, int type, unsigned int *clock) { *clock = 1410; return type == 1 ? 0 : 2; }
int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned int *clock) { *clock = 1980; return type == 1 ? 0 : 2; }
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *bits) { *bits = 0x65; return 0; }
#else
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *value) { return 3; }  /* not supported */
#endif
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A shared library that is NVML and CUDA's driver for one GPU, the second of CUDA's."""
    if not (compiler := shutil.which("gcc")):
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("nvml")

    def made(options: str = "-DFULL") -> Path:
        path = folder / f"lib{options}.so"
        (folder / "nvml.c").write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", options, str(folder / "nvml.c"), "-o", str(path)], check=True)
        return path

    return made


def opened(path: Path, device: str = "cuda:1") -> Gpu | None:
    return open_gpu(device, str(path), str(path))


def test_a_gpu_that_tells_all(library: Callable[..., Path]) -> None:
    gpu = opened(library())
    assert gpu
    assert (gpu.name, gpu.driver) == ("NVIDIA H100", "580.65.06")
    first, second = gpu.joules, gpu.joules
    assert (first, second) == (6.5, 8.0)
    assert gpu.used_mib == 3072
    assert (gpu.clock_mhz, gpu.most_mhz) == (1410, 1980)
    assert gpu.slowed_by == ["its power limit", "its temperature"]


def test_a_gpu_that_tells_little(library: Callable[..., Path]) -> None:
    gpu = opened(library("-DPART"))
    assert gpu
    assert gpu.name == "NVIDIA H100"
    assert (gpu.joules, gpu.used_mib, gpu.clock_mhz, gpu.most_mhz, gpu.slowed_by) == (None, None, None, None, [])


def test_no_gpu(library: Callable[..., Path]) -> None:
    path = library()
    assert opened(path, "cuda:0") is None  # CUDA has it, NVML does not
    assert opened(path, "cuda:2") is None
    assert opened(path, "cpu") is None
    assert open_gpu("cuda", "libmissing.so.1", "libmissing.so.1") is None
