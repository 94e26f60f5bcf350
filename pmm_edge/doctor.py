"""What works on this machine, and what each command still needs. torch is not imported, which would take seconds."""

import os
import platform
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

from pmm_edge.console import print_json, print_plain
from pmm_edge.errors import CHECKPOINT_MODULES, EXPORT_MODULES, OutputError, PmmError, absent, did_you_mean, install
from pmm_edge.files import cache_folder, decode_json, with_tilde
from pmm_edge.machine import text_of

EMBED = ("bench", "embed", "eval", "calibrate", "match", "visualize")
COMMANDS = ("train", "export", "trt", "rtx", *EMBED, "verify", "data", "synth", "gallery")
"""What `pmm doctor` can check; `trt` and `rtx` are `pmm export --trt` and `--rtx`."""
PACKAGES = (
    *("pmm-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "torchvision", "onnx", "onnxscript"),
    *("safetensors", "tensorboard", "tomli-w", "matplotlib", "pyarrow", "tensorrt", "tensorrt-rtx-cu13-libs"),
    "cuda-python",
)
ADDITION = b64decode("CAg6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN")
"""An ONNX model that computes y = x + x for one float32; the onnx package may be missing."""
TIMEOUT = 30.0


class Status(Enum):
    """Result of a check."""

    OK = "ok"
    LIMITED = "limited"  # works in part
    PROBLEM = "problem"
    INFO = "info"  # neither good nor bad


@dataclass(frozen=True)
class Finding:
    """Result of a check; no text names the home folder."""

    status: Status
    detail: str
    remedy: str = ""


Diagnosis = dict[str, dict[str, Finding]]
"""`checks` of the machine and `commands`, each by name."""


def examine(commands: Sequence[str] = ()) -> Diagnosis:
    """Examine this machine; whatever cannot be determined becomes a finding. Unknown `commands` raise PmmError."""
    for name in commands:
        if name not in COMMANDS:
            raise PmmError(f"unknown command '{name}'", f"{did_you_mean(name, COMMANDS)}Choose {', '.join(COMMANDS)}")
    with ThreadPoolExecutor() as pool:
        checks = dict(zip(CHECKS, pool.map(isolated, CHECKS), strict=True))
    engines = [checks[name] for name in ("ONNX Runtime", "TensorRT", "TensorRT for RTX")]
    ready = {name: readiness(name, *engines) for name in COMMANDS}
    return {"checks": checks, "commands": ready}


def check_system() -> Finding:
    """Python, operating system and, on a Jetson, board and release."""
    board, linux = (text_of(Path("/", name)) for name in ("proc/device-tree/model", "etc/nv_tegra_release"))
    jetson = filter(None, [board, linux.partition(", GCID")[0].lstrip("# ")])
    return Finding(Status.INFO, ", ".join([f"Python {platform.python_version()}", platform.platform(), *jetson]))


def check_cache_folder() -> Finding:
    """Whether the cache folder can be written."""
    try:
        folder = cache_folder().absolute()
    except OutputError as error:
        return Finding(Status.PROBLEM, error.problem, error.remedy)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(Status.PROBLEM, f"{folder} cannot be written", "Set PMM_HOME to a writable folder")
    return Finding(Status.OK, f"{folder}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free")


def check_packages() -> Finding:
    """Versions of the packages that pmm-edge uses."""
    installed = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    detail = ", ".join(f"{name} {found}" for name, found in versions.items())
    if versions.get("torch", "").endswith("+cpu") and Path("/proc/driver/nvidia").exists():
        return Finding(Status.PROBLEM, detail, "This torch cannot use the GPU: install a CUDA build of torch")
    if {"onnxruntime", "onnxruntime-gpu"} <= versions.keys():
        remedy = "onnxruntime and onnxruntime-gpu share one folder: uninstall both, then install one"
        return Finding(Status.PROBLEM, detail, remedy)
    return Finding(Status.INFO, detail)


def check_gpus() -> Finding:
    """List GPUs with NVML, which many Jetson boards lack."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        gpus = ", ".join(pynvml.nvmlDeviceGetName(handle) for handle in handles)
    except pynvml.NVMLError as error:
        return Finding(Status.INFO, f"none that NVML finds: {error}")
    return Finding(Status.OK, f"{gpus}; the driver supports CUDA {cuda // 1000}.{cuda % 1000 // 10}")


def check_onnxruntime() -> Finding:
    """Compute an addition on each device: ONNX Runtime also lists providers whose libraries do not load."""
    if missing := absent("onnxruntime"):
        return Finding(Status.PROBLEM, missing, install())
    import numpy as np

    from pmm_edge.runtime.onnx_backend import driver_is_there, open_session

    found, status, remedy = [], Status.OK, ""
    for device in ("cpu", "cuda") if driver_is_there() else ("cpu",):
        try:
            session, *_ = open_session(Path("the test network"), device, ADDITION)
            (sums,) = session.run(None, {"x": np.ones(1, np.float32)})
            if sums[0] != 2:
                raise PmmError(f"it computes 1 + 1 = {sums[0]:g}")
            found.append(f"{device} works")
        except PmmError as error:
            found.append(f"{device} does not work: {error.problem}")
            status = Status.PROBLEM if device == "cpu" else Status.LIMITED
            remedy = f"{install('gpu')}: on x86-64, it brings matching CUDA and cuDNN"
    return Finding(status, "; ".join(found), remedy)


def check_tensorrt(rtx: bool = False) -> Finding:
    """Import TensorRT, or TensorRT for RTX, which also builds without a GPU, and open the GPU that it would run on."""
    from pmm_edge.runtime.cuda import Cuda
    from pmm_edge.runtime.tensorrt_backend import import_rtx, import_tensorrt

    try:
        installed = (import_rtx if rtx else import_tensorrt)().__version__
    except PmmError as error:
        return Finding(Status.INFO, error.problem, error.remedy)
    try:
        cuda = Cuda()
    except PmmError as error:
        status, detail = (Status.LIMITED, "builds engines, ") if rtx else (Status.PROBLEM, "")
        return Finding(status, f"{installed}, {detail}without a GPU: {error.problem}", error.remedy)
    cuda.release()
    return Finding(Status.OK, f"{installed} on {cuda.name} with CUDA {cuda.runtime_version}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "system": check_system,
    "cache folder": check_cache_folder,
    "packages": check_packages,
    "GPU": check_gpus,
    "ONNX Runtime": check_onnxruntime,
    "TensorRT": check_tensorrt,
    "TensorRT for RTX": partial(check_tensorrt, rtx=True),
}


def isolated(name: str) -> Finding:
    """Run one of `CHECKS` in a process of its own: a broken library may crash or hang when it is loaded."""
    path = "sys.path[:] = [*sys.path[1:], sys.argv[1]]"  # without the current folder, which may hold other packages
    script = f"import sys; {path}; from pmm_edge.doctor import main; main(sys.argv[2])"
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1]), name]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
        found = decode_json(Finding, ended.stdout.splitlines()[-1], name)
    except subprocess.TimeoutExpired:
        found = Finding(Status.PROBLEM, f"did not answer within {TIMEOUT:g} s")
    except (PmmError, IndexError):
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        found = Finding(Status.PROBLEM, f"crashed with exit code {ended.returncode} when it was loaded ({last})")
    return replace(found, detail=shareable(found.detail))


def main(name: str) -> None:
    """Run a check in this process and print the finding as the last line of standard output."""
    try:
        found = CHECKS[name]()
    except Exception as error:  # a broken library may raise anything
        found = Finding(Status.PROBLEM, f"{type(error).__name__}: {error}")
    print_plain("\n")
    print_json(found, indent=0)


def shareable(text: str) -> str:
    """Text as one line for other people: the home folder becomes `~`, other absolute paths keep only the file name."""
    folders = r"(?<![\w~.:/…])/(?:[^\s:;,'\"()|/]+/)+"  # of an absolute path, but not of a URL
    return " ".join(re.sub(folders, "…/", with_tilde(text)).split())


def readiness(command: str, onnxruntime: Finding, tensorrt: Finding, rtx: Finding) -> Finding:
    """Whether a command can work, from the findings about the engines."""
    onnx = f"onnxruntime: {onnxruntime.detail}" if onnxruntime.status is Status.PROBLEM else ""
    trt = "" if tensorrt.status is Status.OK else tensorrt.detail
    engines = trt if rtx.status is not Status.OK else ""
    torch, export = absent(*CHECKPOINT_MODULES), absent(*EXPORT_MODULES)
    faiss, qdrant = absent("faiss"), absent("qdrant_client")
    base, train = install(), install("train")
    needs = [  # commands, why they cannot work, what to do
        (COMMANDS, absent("numpy", "PIL"), base),
        (["train"], absent("torch", "torchvision", "tensorboard", "tomli_w"), train),
        (["export", "trt", "rtx"], onnx, base),  # engines are built from a file that ONNX Runtime has checked
        (["trt"], trt, tensorrt.remedy),
        (["rtx"], rtx.detail if rtx.status not in (Status.OK, Status.LIMITED) else "", rtx.remedy),
        (["visualize"], absent("matplotlib"), train),
        (["gallery"], faiss and qdrant and f"{faiss}, {qdrant}", install("gallery")),
        (EMBED, onnx and torch and engines and "no engine that runs models", train),
    ]
    limits = [  # commands, what of them does not work, what to do
        (["export"], export and f"only --deepstream of a raw .onnx file or --triton of a uint8 one ({export})", train),
        (EMBED, onnx and f"no .onnx files ({onnx})", base),
        (EMBED, torch and f"no .pt and .safetensors files ({torch})", train),
        (EMBED, engines and f"no .engine files ({engines})", ""),  # nothing to install on a machine without a GPU
        (["bench"], torch and "needs --reference MODEL.onnx, because the default reference is a checkpoint", ""),
        (["visualize"], torch and "only galleries of exported models", train),
        (["gallery"], faiss and f"no folders ({faiss})", install("gallery")),
        (["gallery"], qdrant and f"no collections of Qdrant ({qdrant})", install("gallery")),
        (["embed"], absent("pyarrow") and "no .parquet files", install("parquet")),
    ]
    for rules, state, status in ((needs, "cannot work: ", Status.PROBLEM), (limits, "ready, but ", Status.LIMITED)):
        if found := {problem: remedy for names, problem, remedy in rules if problem and command in names}:
            remedy = ". ".join(dict.fromkeys(filter(None, found.values())))
            return Finding(status, state + "; ".join(found), remedy)
    return Finding(Status.OK, "ready")
