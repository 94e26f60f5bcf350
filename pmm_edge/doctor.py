"""What works on this machine, and what each command still needs. torch is not imported, which would take seconds."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pmm_edge.errors import CheckFailedError, OutputError, PmmError, did_you_mean, install
from pmm_edge.files import cache_folder, decode_json, encode_json, home_folder, with_tilde
from pmm_edge.machine import cores, instruction_set, processor, text_of

COMMANDS = ("train", "export", "trt", "bench", "embed", "eval", "visualize", "verify", "data", "synth")
"""What `pmm doctor` can check; `trt` is `pmm export --trt`."""
BASE, TRAIN_EXTRA = install(), install("train")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    value: str
    good: bool | None = None
    """None for information that is neither good nor bad."""
    remedy: str = ""


Diagnosis = dict[str, list[Finding]]
"""Findings by subject; the last one, `Commands`, has a finding for each command. No text names the home folder."""


def examine(commands: Sequence[str]) -> Diagnosis:
    """Examine this machine; whatever cannot be determined becomes a finding. Unknown `commands` raise PmmError."""
    for name in commands:
        if name not in COMMANDS:
            raise PmmError(f"unknown command '{name}'", f"{did_you_mean(name, COMMANDS)}Choose {', '.join(COMMANDS)}")
    with ThreadPoolExecutor() as pool:
        onnxruntime, tensorrt, driver = pool.map(probe, PROBES)
    return {
        "Machine": machine(Path("/")),
        "GPU": gpus(Path("/"), driver),
        "Engines": engines(onnxruntime, tensorrt, driver),
        "Packages": packages(),
        "Commands": [readiness(command, onnxruntime, tensorrt) for command in COMMANDS],
    }


def check_commands(diagnosis: Diagnosis, commands: Sequence[str]) -> None:
    """Check that commands can work.

    Raises:
        CheckFailedError: one cannot.
    """
    for found in diagnosis["Commands"]:
        if found.name in commands and found.good is False:
            raise CheckFailedError(f"{found.name} {found.value}", found.remedy)


ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", "|": r"\|", "`": "'", "@": "@\N{ZERO WIDTH SPACE}"})
"""Markdown in what packages and drivers say about themselves."""


def as_markdown(diagnosis: Diagnosis) -> str:
    """One table for each section, to paste into an issue."""
    marks = {True: "ok: ", False: "**problem**: ", None: ""}
    lines = []
    for title, findings in diagnosis.items():
        lines += [f"| {title} | |", "| --- | --- |"]
        for one in findings:
            text = marks[one.good] + ". ".join(filter(None, (one.value, one.remedy))).translate(ESCAPES)
            lines.append(f"| {one.name.translate(ESCAPES)} | {text} |")
        lines.append("")
    return "\n".join(lines)


def shareable(text: str) -> str:
    """Text as one line for other people: the home folder becomes `~`, other absolute paths keep only the file name."""
    folders = r"(?<![\w~.:/…])/(?:[^\s:;,'\"()|/]+/)+"  # of an absolute path, but not of a URL
    return " ".join(re.sub(folders, "…/", with_tilde(text)).split())


# Machine and packages

MIN_DISK_GIB = 2.0
JETPACKS = {"38": "7", "36.4.4": "6.2.1", "36.4.3": "6.2", "36.4": "6.1", "36.3": "6.0", "36": "6.0 preview", "35": "5"}
"""JetPack by the release of Jetson Linux; the first matching prefix counts."""
OLDEST_JETSON_LINUX = (36, 4)


def machine(root: Path) -> list[Finding]:
    """Operating system, board, processor, memory and cache folder."""
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable): *(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE))
    total, free = (f"{int(sizes.get(name, 0)) / 2**20:.1f} GiB" for name in ("MemTotal", "MemAvailable"))
    return [
        Finding("pmm-edge", version_of("pmm-edge") or "not installed"),
        Finding("Python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"),
        Finding("system", platform.platform()),
        *jetson(root),
        Finding("processor", f"{processor(root)}, {instruction_set(root)}"),
        Finding("cores", cores(root)),
        Finding("memory", f"{total}, {free} free" if len(sizes) == 2 else "unknown"),
        _cache_finding(),
    ]


def jetson(root: Path) -> list[Finding]:
    """Board and JetPack; empty on other machines."""
    release = re.search(r"R(\d+)\b.*?REVISION: *(\d+(?:\.\d+)*)", text_of(root / "etc/nv_tegra_release"))
    if not release:
        return []
    linux = f"{release[1]}.{release[2]}"
    jetpack = next((name for known, name in JETPACKS.items() if f"{linux}.".startswith(f"{known}.")), "unknown")
    old = tuple(map(int, linux.split("."))) < OLDEST_JETSON_LINUX
    remedy = "Update to JetPack 6.1 or later, which brings TensorRT 10.3 for pmm export --trt"
    board = Finding("Jetson", text_of(root / "proc/device-tree/model") or "unknown board")
    return [board, Finding("JetPack", f"{jetpack} (Jetson Linux {linux})", *((False, remedy) if old else ()))]


def _cache_finding() -> Finding:
    try:
        folder, home = cache_folder().absolute(), home_folder()
    except OutputError as error:
        return Finding("cache folder", error.problem, False, error.remedy)
    shown = shareable(str(folder)) if home and folder.is_relative_to(home) else "PMM_HOME"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("cache folder", f"{shown} cannot be written", False, "Set PMM_HOME to a writable folder")
    free = shutil.disk_usage(existing).free / 2**30
    verdict = (False, "Set PMM_HOME to a folder on a larger disk") if free < MIN_DISK_GIB else ()
    return Finding("cache folder", f"{shown}, {free:.1f} GiB free", *verdict)


PACKAGES = (
    *("numpy", "pillow", "typer", "rich", "msgspec", "jinja2", "filelock", "nvidia-ml-py", "onnxruntime"),
    *("onnxruntime-gpu", "torch", "torchvision", "onnx", "onnxscript", "safetensors", "tensorboard", "tomli-w"),
    *("matplotlib", "pyarrow", "tensorrt", "cuda-python", "openvino"),
)


def packages() -> list[Finding]:
    """Versions of the packages that pmm-edge uses; those that are not installed in one line."""
    versions = {name: version_of(name) for name in PACKAGES}
    found = [Finding(name, installed) for name, installed in versions.items() if installed]
    ort = versions["onnxruntime"], versions["onnxruntime-gpu"]
    if all(ort):
        found.append(Finding("onnxruntime", "two packages in one folder", False, "Uninstall both, then install one"))
    absent = [name for name in PACKAGES if not versions[name] and not (any(ort) and "onnxruntime" in name)]
    return [*found, Finding("not installed", ", ".join(absent) or "–")]


def version_of(package: str) -> str | None:
    """Version of a package by its metadata; None if it is not installed."""
    try:
        return version(package) or "unknown"
    except PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether a module is found, without importing it."""
    try:
        return find_spec(module) is not None
    except Exception:  # a broken package may raise anything
        return False


# Probes, each in a process of its own: a broken library may crash or hang when it is loaded

TIMEOUT = 30.0
ADDITION = b64decode("CAg6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN")
"""An ONNX model that computes y = x + x for one float32; the onnx package may be missing."""
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True)
class Probe:
    """What a probe found."""

    version: str | None = None
    """Of TensorRT, or the newest CUDA that the driver supports."""
    gpus: list[str] = field(default_factory=list)
    providers: dict[str, str | None] = field(default_factory=dict)
    """For each provider of ONNX Runtime why it does not compute; None if it does."""
    no_driver: bool = False
    """There is no NVIDIA driver."""
    error: str | None = None
    remedy: str = ""


NO_DRIVER = "there is no NVIDIA driver (libcuda.so.1)"


def probe(name: str) -> Probe:
    """Run one of `PROBES` in a new process. The result has an `error` if it failed, crashed or hung."""
    path = "sys.path[:] = [*sys.path[1:], sys.argv[1]]"  # without the current folder, which may hold other packages
    script = f"import sys; {path}; from pmm_edge.doctor import main; main(sys.argv[2])"
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), name]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return Probe(error=f"did not answer within {TIMEOUT:g} s")
    if ended.returncode < 0:
        return Probe(error=f"crashed with signal {-ended.returncode} when it was loaded")
    try:
        found = decode_json(Probe, ended.stdout.splitlines()[-1], name)
    except (PmmError, IndexError):
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        found = Probe(error=f"ended with code {ended.returncode} when it was loaded ({last})")
    providers = {provider: problem and shareable(problem) for provider, problem in found.providers.items()}
    return replace(found, providers=providers, error=found.error and shareable(found.error))


def main(name: str) -> None:
    """Run a probe in this process and print the result as the last line of standard output."""
    try:
        found = PROBES[name]()
    except PmmError as error:
        found = Probe(error=error.problem, remedy=error.remedy)
    except Exception as error:  # a broken library may raise anything
        found = Probe(error=f"{type(error).__name__}: {error}")
    sys.stdout.write("\n" + encode_json(found, indent=0) + "\n")


def probe_onnxruntime() -> Probe:
    """Compute an addition with each provider that pmm-edge uses: a listed provider may not work."""
    import onnxruntime

    from pmm_edge.runtime.onnx_backend import driver_is_there, load_cuda_libraries

    listed, driver = onnxruntime.get_available_providers(), driver_is_there()
    if driver:
        load_cuda_libraries()
    used = [name for name in (CUDA_PROVIDER, CPU_PROVIDER) if name in listed]
    providers = {name: _problem_with(name) if driver or name == CPU_PROVIDER else NO_DRIVER for name in used}
    return Probe(providers=providers, no_driver=not driver)


def _problem_with(provider: str) -> str | None:
    """Why a session does not compute with a provider; None if it does."""
    import numpy as np
    import onnxruntime

    from pmm_edge.runtime.onnx_backend import load_error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal; its log repeats the exception
    if provider != CPU_PROVIDER:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(ADDITION, options, providers=[provider])
        (sums,) = session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # its exceptions share no other base class
        return load_error(provider) or str(error).splitlines()[0]
    if provider not in session.get_providers():
        return load_error(provider) or "a session does not use it"
    return None if sums.tolist() == [2.0] else f"it computes 1 + 1 = {sums.tolist()}"


def probe_tensorrt() -> Probe:
    """Import TensorRT and open the GPU that it would run on."""
    from pmm_edge.runtime.cuda import Cuda
    from pmm_edge.runtime.tensorrt_backend import import_tensorrt

    installed = import_tensorrt().__version__
    try:
        cuda = Cuda()
    except PmmError as error:
        return Probe(installed, error=error.problem, remedy=error.remedy)
    cuda.release()
    return Probe(installed, [f"{cuda.name} with CUDA {cuda.runtime_version}"])


def probe_driver() -> Probe:
    """List GPUs through the driver alone, without the CUDA runtime; NVML is missing on many Jetson boards."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Probe(no_driver=True, error=NO_DRIVER)
    if status := driver.cuInit(0):
        return Probe(error=f"the NVIDIA driver does not start (cuInit returns {status})")

    def ask(function: Any, kind: Any, *arguments: Any) -> Any:
        result = kind()
        function(ctypes.byref(result), *arguments)
        return result

    found, attributes = [], (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    for index in range(ask(driver.cuDeviceGetCount, ctypes.c_int).value):
        device, name = ask(driver.cuDeviceGet, ctypes.c_int, index), ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, 256, device)
        memory = ask(driver.cuDeviceTotalMem_v2, ctypes.c_size_t, device).value / 2**30
        major, minor = (ask(driver.cuDeviceGetAttribute, ctypes.c_int, one, device).value for one in attributes)
        shown = name.value.decode(errors="replace")
        found.append(f"{shown}, compute capability {major}.{minor}, {memory:.1f} GiB")
    cuda = ask(driver.cuDriverGetVersion, ctypes.c_int).value
    error = None if found else "the driver finds no GPU"
    return Probe(f"{cuda // 1000}.{cuda % 1000 // 10}", found, error=error)


PROBES = {"onnxruntime": probe_onnxruntime, "tensorrt": probe_tensorrt, "driver": probe_driver}


def gpus(root: Path, driver: Probe) -> list[Finding]:
    """The NVIDIA driver and its GPUs."""
    loaded = text_of(root / "sys/module/nvidia/version")
    findings = [Finding("driver", loaded)] if loaded else []
    if driver.version:
        findings.append(Finding("newest CUDA", f"{driver.version}, supported by the driver"))
    findings += [Finding(f"cuda:{index}", gpu, True) for index, gpu in enumerate(driver.gpus)]
    if driver.error:
        remedy = "" if driver.no_driver else "Check nvidia-smi; restart after a driver update"
        findings.append(Finding("GPU", f"none: {driver.error}", None if driver.no_driver else False, remedy))
    return findings


def engines(onnxruntime: Probe, tensorrt: Probe, driver: Probe) -> list[Finding]:
    """ONNX Runtime with each of its providers, TensorRT and PyTorch."""
    findings = []
    if onnxruntime.error:
        findings.append(Finding("ONNX Runtime", _absent("onnxruntime") or onnxruntime.error, False, BASE))
    for provider, problem in onnxruntime.providers.items():
        cuda = provider == CUDA_PROVIDER and not onnxruntime.no_driver
        remedy = f"{install('gpu')}: it brings matching CUDA and cuDNN" if problem and cuda else ""
        good = problem is None or (False if cuda or provider == CPU_PROVIDER else None)
        value = f"listed, but does not work: {problem}" if problem else "works"
        findings.append(Finding(f"ONNX Runtime, {provider.removesuffix('ExecutionProvider')}", value, good, remedy))
    if tensorrt.error:
        found = f"{tensorrt.version}, without a GPU: {tensorrt.error}" if tensorrt.version else tensorrt.error
        findings.append(Finding("TensorRT", found, False if tensorrt.version else None, tensorrt.remedy))
    else:
        findings.append(Finding("TensorRT", f"{tensorrt.version} on {', '.join(tensorrt.gpus)}", True))
    torch = version_of("torch")
    if torch is None or not importable("torch"):
        findings.append(Finding("PyTorch", "not installed", None, TRAIN_EXTRA))
    elif torch.endswith("+cpu") and driver.gpus:
        findings.append(Finding("PyTorch", f"{torch}: cannot use the GPU", False, "Install a CUDA build of torch"))
    else:
        findings.append(Finding("PyTorch", f"{torch}, installed (not loaded)"))
    return findings


# Commands

EMBED = ("bench", "embed", "eval", "visualize")
CHECKPOINT_MODULES = ("torch", "torchvision", "safetensors")
EXPORT_MODULES = (*CHECKPOINT_MODULES, "onnx", "onnxscript")
TRAIN_MODULES = ("torch", "torchvision", "tensorboard", "tomli_w")


def readiness(command: str, onnxruntime: Probe, tensorrt: Probe) -> Finding:
    """Whether a command can work, from the results of the probes; `good` is None if only a part of it can."""
    problem = onnxruntime.error or onnxruntime.providers.get(CPU_PROVIDER, "it has no CPU provider")
    onnx = _absent("onnxruntime") or (f"onnxruntime: {problem}" if problem else "")
    torch, export = _absent(*CHECKPOINT_MODULES), _absent(*EXPORT_MODULES)
    charts, trt = _absent("matplotlib"), tensorrt.error
    needs = [  # commands, why they cannot work, what to do
        (COMMANDS, _absent("numpy", "PIL"), BASE),
        (["train"], _absent(*TRAIN_MODULES), TRAIN_EXTRA),
        (["export", "trt"], onnx, BASE),  # engines are built from a file that ONNX Runtime has checked
        (["trt"], trt, tensorrt.remedy),
        (["visualize"], charts, TRAIN_EXTRA),
        (EMBED, onnx and torch and trt and "no engine that runs models", TRAIN_EXTRA),
    ]
    limits = [  # commands, what of them does not work, what to do
        (["export"], export and f"only bundles of an exported .onnx file ({export})", TRAIN_EXTRA),
        (EMBED, onnx and f"no .onnx files ({onnx})", BASE),
        (EMBED, torch and f"no .pt and .safetensors files ({torch})", TRAIN_EXTRA),
        (EMBED, trt and f"no .engine files ({trt})", ""),  # nothing to install on a machine without a GPU
        (["bench"], torch and "needs --reference MODEL.onnx, because the default reference is a checkpoint", ""),
        (["bench"], _absent("onnx") and "no --explain", TRAIN_EXTRA),
        (["bench"], charts and "no charts in report.html", TRAIN_EXTRA),
        (["visualize"], torch and "only galleries of exported models", TRAIN_EXTRA),
        (["eval"], charts and "no --cmc plot", TRAIN_EXTRA),
        (["embed"], _absent("pyarrow") and "no .parquet files", install("parquet")),
    ]
    for rules, state, good in ((needs, "cannot work: ", False), (limits, "ready, but ", None)):
        if found := {problem: remedy for names, problem, remedy in rules if problem and command in names}:
            remedy = ". ".join(dict.fromkeys(filter(None, found.values())))
            return Finding(command, state + "; ".join(found), good, remedy)
    return Finding(command, "ready", True)


def _absent(*modules: str) -> str:
    absent = ", ".join(module for module in modules if not importable(module))
    return absent and f"{absent} not installed"
