"""What works on this machine, and what each command still needs. torch is not imported, which would take seconds."""

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
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pmm_edge.errors import CheckFailedError, OutputError, PmmError, did_you_mean, install
from pmm_edge.files import cache_folder, decode_json, encode_json, with_tilde
from pmm_edge.machine import text_of

COMMANDS = ("train", "export", "trt", "bench", "embed", "eval", "visualize", "verify", "data", "synth")
"""What `pmm doctor` can check; `trt` is `pmm export --trt`."""


class Status(Enum):
    """Result of a check."""

    OK = "ok"
    LIMITED = "limited"  # works in part
    PROBLEM = "problem"
    INFO = "info"  # neither good nor bad


@dataclass(frozen=True)
class Finding:
    """Result of a check. No text names the home folder."""

    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Findings by the name of the check and of the command."""

    checks: dict[str, Finding]
    commands: dict[str, Finding]


def examine(commands: Sequence[str] = ()) -> Diagnosis:
    """Examine this machine; whatever cannot be determined becomes a finding. Unknown `commands` raise PmmError."""
    for name in commands:
        if name not in COMMANDS:
            raise PmmError(f"unknown command '{name}'", f"{did_you_mean(name, COMMANDS)}Choose {', '.join(COMMANDS)}")
    with ThreadPoolExecutor() as pool:
        onnxruntime, tensorrt, gpus = pool.map(probe, PROBES)
    checks = {
        "system": _system(),
        "cache folder": _cache_folder(),
        "packages": _packages(),
        "GPU": _gpus(gpus),
        "ONNX Runtime": _onnxruntime(onnxruntime),
        "TensorRT": _tensorrt(tensorrt),
        "PyTorch": _torch(gpus),
    }
    return Diagnosis(checks, {command: readiness(command, onnxruntime, tensorrt) for command in COMMANDS})


def check_commands(diagnosis: Diagnosis, commands: Sequence[str]) -> None:
    """Raise CheckFailedError if one of the commands cannot work."""
    for name in commands:
        found = diagnosis.commands[name]
        if found.status is Status.PROBLEM:
            raise CheckFailedError(f"{name} {found.detail}", found.remedy)


def shareable(text: str) -> str:
    """Text as one line for other people: the home folder becomes `~`, other absolute paths keep only the file name."""
    folders = r"(?<![\w~.:/…])/(?:[^\s:;,'\"()|/]+/)+"  # of an absolute path, but not of a URL
    return " ".join(re.sub(folders, "…/", with_tilde(text)).split())


PACKAGES = (
    *("pmm-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "torchvision", "onnx", "onnxscript"),
    *("safetensors", "tensorboard", "tomli-w", "matplotlib", "pyarrow", "tensorrt", "cuda-python"),
)


def _system() -> Finding:
    board, linux = (text_of(Path("/", name)) for name in ("proc/device-tree/model", "etc/nv_tegra_release"))
    jetson = [board, linux.partition(", GCID")[0].lstrip("# ")]  # empty on other machines
    about = [f"Python {platform.python_version()}", platform.platform(), *filter(None, jetson)]
    return Finding(Status.INFO, ", ".join(about))


def _cache_folder() -> Finding:
    try:
        folder = cache_folder().absolute()
    except OutputError as error:
        return Finding(Status.PROBLEM, error.problem, error.remedy)
    existing, shown = next(parent for parent in (folder, *folder.parents) if parent.exists()), shareable(str(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(Status.PROBLEM, f"{shown} cannot be written", "Set PMM_HOME to a writable folder")
    return Finding(Status.OK, f"{shown}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free")


def _packages() -> Finding:
    versions = {name: found for name in PACKAGES if (found := version_of(name))}
    detail = ", ".join(f"{name} {found}" for name, found in versions.items())
    if {"onnxruntime", "onnxruntime-gpu"} <= versions.keys():
        remedy = "onnxruntime and onnxruntime-gpu share one folder: uninstall both, then install one"
        return Finding(Status.PROBLEM, detail, remedy)
    return Finding(Status.INFO, detail)


def version_of(package: str) -> str | None:
    """Version of a package by its metadata; None if it is not installed."""
    try:
        return version(package) or "unknown"
    except PackageNotFoundError:
        return None


def _absent(*modules: str) -> str:
    absent = ", ".join(module for module in modules if find_spec(module) is None)
    return absent and f"{absent} not installed"


# Probes, each in a process of its own: a broken library may crash or hang when it is loaded

TIMEOUT = 30.0
ADDITION = b64decode("CAg6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN")
"""An ONNX model that computes y = x + x for one float32; the onnx package may be missing."""


@dataclass(frozen=True)
class Probe:
    """What a probe found."""

    version: str | None = None
    """Of TensorRT, or the newest CUDA that the driver supports."""
    gpus: list[str] = field(default_factory=list)
    devices: dict[str, str | None] = field(default_factory=dict)
    """Why ONNX Runtime does not compute on the device `cpu` or `cuda`; None if it does."""
    error: str | None = None
    remedy: str = ""


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
    devices = {device: problem and shareable(problem) for device, problem in found.devices.items()}
    return replace(found, devices=devices, error=found.error and shareable(found.error))


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
    """Compute an addition on each device: ONNX Runtime also lists providers whose libraries do not load."""
    import numpy as np

    from pmm_edge.runtime.onnx_backend import driver_is_there, open_session

    devices: dict[str, str | None] = {}
    for device in ("cpu", "cuda") if driver_is_there() else ("cpu",):
        try:
            session, *_ = open_session(Path("the test network"), device, ADDITION)
            (sums,) = session.run(None, {"x": np.ones(1, np.float32)})
            devices[device] = None if sums.tolist() == [2.0] else f"it computes 1 + 1 = {sums.tolist()}"
        except PmmError as error:
            devices[device] = error.problem
    return Probe(devices=devices)


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


def probe_gpus() -> Probe:
    """List GPUs with NVML, which many Jetson boards lack."""
    import pynvml

    pynvml.nvmlInit()
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    return Probe(f"{cuda // 1000}.{cuda % 1000 // 10}", [pynvml.nvmlDeviceGetName(handle) for handle in handles])


PROBES = {"onnxruntime": probe_onnxruntime, "tensorrt": probe_tensorrt, "gpus": probe_gpus}


def _gpus(found: Probe) -> Finding:
    if found.error:
        return Finding(Status.INFO, f"none that NVML finds: {found.error}")
    return Finding(Status.OK, f"{', '.join(found.gpus)}; the driver supports CUDA {found.version}")


def _onnxruntime(found: Probe) -> Finding:
    if found.error:
        return Finding(Status.PROBLEM, _absent("onnxruntime") or found.error, install())
    states = {device: f"does not work: {problem}" if problem else "works" for device, problem in found.devices.items()}
    detail = "; ".join(f"{device} {state}" for device, state in states.items())
    if any(found.devices.values()):
        status = Status.PROBLEM if found.devices["cpu"] else Status.LIMITED
        return Finding(status, detail, f"{install('gpu')}: on x86-64, it brings matching CUDA and cuDNN")
    return Finding(Status.OK, detail)


def _tensorrt(found: Probe) -> Finding:
    if found.error and found.version:
        return Finding(Status.PROBLEM, f"{found.version}, without a GPU: {found.error}", found.remedy)
    if found.error:
        return Finding(Status.INFO, found.error, found.remedy)
    return Finding(Status.OK, f"{found.version} on {', '.join(found.gpus)}")


def _torch(gpus: Probe) -> Finding:
    torch = version_of("torch")
    if torch is None:
        return Finding(Status.INFO, "not installed", install("train"))
    if torch.endswith("+cpu") and gpus.gpus:
        return Finding(Status.PROBLEM, f"{torch}: cannot use the GPU", "Install a CUDA build of torch")
    return Finding(Status.INFO, f"{torch}, installed (not loaded)")


# Commands

EMBED = ("bench", "embed", "eval", "visualize")
CHECKPOINT_MODULES = ("torch", "torchvision", "safetensors")
TRAIN_MODULES = ("torch", "torchvision", "tensorboard", "tomli_w")


def readiness(command: str, onnxruntime: Probe, tensorrt: Probe) -> Finding:
    """Whether a command can work, from the results of the probes."""
    problem = onnxruntime.error or onnxruntime.devices.get("cpu")
    onnx = _absent("onnxruntime") or (f"onnxruntime: {problem}" if problem else "")
    torch, export = _absent(*CHECKPOINT_MODULES), _absent(*CHECKPOINT_MODULES, "onnx", "onnxscript")
    trt, base, train = tensorrt.error, install(), install("train")
    needs = [  # commands, why they cannot work, what to do
        (COMMANDS, _absent("numpy", "PIL"), base),
        (["train"], _absent(*TRAIN_MODULES), train),
        (["export", "trt"], onnx, base),  # engines are built from a file that ONNX Runtime has checked
        (["trt"], trt, tensorrt.remedy),
        (["visualize"], _absent("matplotlib"), train),
        (EMBED, onnx and torch and trt and "no engine that runs models", train),
    ]
    limits = [  # commands, what of them does not work, what to do
        (["export"], export and f"only bundles of an exported .onnx file ({export})", train),
        (EMBED, onnx and f"no .onnx files ({onnx})", base),
        (EMBED, torch and f"no .pt and .safetensors files ({torch})", train),
        (EMBED, trt and f"no .engine files ({trt})", ""),  # nothing to install on a machine without a GPU
        (["bench"], torch and "needs --reference MODEL.onnx, because the default reference is a checkpoint", ""),
        (["visualize"], torch and "only galleries of exported models", train),
        (["embed"], _absent("pyarrow") and "no .parquet files", install("parquet")),
    ]
    for rules, state, status in ((needs, "cannot work: ", Status.PROBLEM), (limits, "ready, but ", Status.LIMITED)):
        if found := {problem: remedy for names, problem, remedy in rules if problem and command in names}:
            remedy = ". ".join(dict.fromkeys(filter(None, found.values())))
            return Finding(status, state + "; ".join(found), remedy)
    return Finding(Status.OK, "ready")
