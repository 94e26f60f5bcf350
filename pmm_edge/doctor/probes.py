"""Probes of libraries that may hang or crash, each run in a process of its own.

A driver that does not fit its kernel module, or a library that does not fit its driver, can end the process that loads
it. That is the very thing to find out, so it must not end the doctor.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pmm_edge.errors import PmmError

_SECONDS = 30.0
_SCRIPT = """
import sys
folder = sys.argv[1]
sys.path[:1] = [] if folder in sys.path[1:] else [folder]
from pmm_edge.doctor.probes import main
main(sys.argv[2])
"""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*."""


def probe(name: str) -> dict[str, Any]:
    """Run one of `PROBES` in a process of its own.

    Returns:
        What it found; `error`, and perhaps `remedy`, where it failed, crashed or hung.
    """
    package = Path(__file__).parents[2]
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(package), name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {_SECONDS:g} s"}
    except OSError as error:
        return {"error": f"cannot be asked ({error.strerror})"}
    if ended.returncode < 0:
        return {"error": f"crashed with signal {-ended.returncode} when it was loaded"}
    try:
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"ended with code {ended.returncode} when it was loaded ({last})"}
    return found


def main(name: str) -> None:
    """Run a probe here and print what it found as JSON, in the last line of standard output."""
    try:
        found = PROBES[name]()
    except PmmError as error:
        found = {"error": error.problem, "remedy": error.remedy}
    # Broken libraries raise what they like; whatever it is becomes a line.
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def onnxruntime_providers() -> dict[str, Any]:
    """For each provider that ONNX Runtime lists, None where a session really computes with it, else why not."""
    import onnxruntime

    from pmm_edge.runtime.onnx_session import driver_is_there, load_cuda_libraries

    listed = onnxruntime.get_available_providers()
    nvidia = "CUDAExecutionProvider" in listed and driver_is_there()
    if nvidia:
        load_cuda_libraries()
    providers: dict[str, str | None] = {}
    for provider in listed:
        needs_driver = provider.startswith(("CUDA", "Tensorrt", "NvTensorRt"))
        providers[provider] = (
            "there is no NVIDIA driver (libcuda.so.1)" if needs_driver and not nvidia else _computes(provider)
        )
    return {"version": onnxruntime.__version__, "providers": providers}


def _computes(provider: str) -> str | None:
    """Why a session does not compute with a provider; None where it does."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which hold the reason
    if provider != "CPUExecutionProvider":
        # Else the processor would quietly do the work of a provider that takes nothing.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    problem = None
    with tempfile.TemporaryFile() as log:
        before = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            session = onnxruntime.InferenceSession(addition(), options, providers=[provider])
            (sums,) = session.run(None, {"x": np.ones(1, np.float32)})
            if provider not in session.get_providers():
                problem = "a session does not take it"
            elif sums.tolist() != [2.0]:
                problem = f"1 + 1 is {sums.tolist()} with it"
        # Its exceptions have nothing in common but this.
        except Exception as error:
            problem = str(error).splitlines()[0]
        finally:
            os.dup2(before, 2)
            os.close(before)
        log.seek(0)
        unloaded = re.search(r"with error: (.+)", log.read().decode(errors="replace"))
    if problem and unloaded:
        return unloaded[1]
    return "it leaves the work to the CPU" if problem and "fallback to CPU EP" in problem else problem


def addition() -> bytes:
    """An ONNX model that computes x + x of one float32: protobuf by hand, for the package onnx may not be there."""

    def part(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return bytes([number << 3, content])
        return bytes([number << 3 | 2, len(content)]) + content

    one_float = part(1, part(1, 1) + part(2, part(1, part(1, 1))))  # elem_type FLOAT, shape of one dimension of 1
    node = part(1, b"x") + part(1, b"x") + part(2, b"y") + part(4, b"Add")
    values = part(11, part(1, b"x") + part(2, one_float)) + part(12, part(1, b"y") + part(2, one_float))
    return part(1, 8) + part(7, part(1, node) + part(2, b"g") + values) + part(8, part(1, b"") + part(2, 13))


def tensorrt() -> dict[str, Any]:
    """TensorRT's version, and the GPU that it would run on."""
    from pmm_edge.runtime.cuda import Cuda
    from pmm_edge.runtime.tensorrt_library import import_tensorrt

    trt = import_tensorrt()
    found: dict[str, Any] = {"version": trt.__version__}
    try:
        cuda = Cuda()
    except PmmError as error:
        return found | {"cuda_error": error.problem, "cuda_remedy": error.remedy}
    found |= {"gpu": cuda.name, "cuda": cuda.runtime_version}
    cuda.release()
    return found


def gpus() -> dict[str, Any]:
    """The GPUs of the NVIDIA driver, asked without CUDA's runtime or any package."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"gpus": [], "error": "there is no NVIDIA driver (libcuda.so.1)"}
    if status := driver.cuInit(0):
        return {"gpus": [], "error": f"the NVIDIA driver does not start (cuInit gives {status})"}
    count, newest = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(newest))
    found = []
    for index in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, 256, device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        name_text = name.value.decode(errors="replace")
        found.append({"name": name_text, "capability": [major.value, minor.value], "memory": memory.value})
    return {"gpus": found, "cuda": f"{newest.value // 1000}.{newest.value % 1000 // 10}"}


PROBES = {"onnxruntime": onnxruntime_providers, "tensorrt": tensorrt, "gpus": gpus}
