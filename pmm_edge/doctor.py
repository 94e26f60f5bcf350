"""What a probe says: a name, a value, whether that is good, and what to do where it is not."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pmm_edge.errors import OutputError, PmmError
from pmm_edge.files import cache_folder, home_folder, with_tilde
from pmm_edge.machine import cores, cpuinfo, processor, text_of

_FOLDERS = re.compile(r"(?<![\w~.:/…])/(?:[^\s:;,'\"()|/]+/)+")
"""The folders of an absolute path, but not of a URL."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    value: str
    good: bool | None = None
    """None for a mere fact."""
    remedy: str = ""


@dataclass(frozen=True)
class Section:
    """Findings about one thing."""

    title: str
    findings: list[Finding]


def shareable(text: str) -> str:
    """Text in one line, to be shown to others: the home folder is `~`, of other paths only the file's name stays."""
    return " ".join(_FOLDERS.sub("…/", with_tilde(text)).split())


_SHOWN = (
    "numpy",
    "pillow",
    "typer",
    "rich",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "safetensors",
    "tensorboard",
    "tomli-w",
    "matplotlib",
    "pyarrow",
    "tensorrt",
    "cuda-python",
    "cuda-bindings",
    "openvino",
)
_INSTEAD = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-gpu": "onnxruntime", "cuda-python": "cuda-bindings"}
"""What need not be there where the other is."""
_MODULES = {"pillow": "PIL", "onnxruntime-gpu": "onnxruntime", "tomli-w": "tomli_w", "cuda-bindings": "cuda.bindings"}


def packages() -> Section:
    """The versions of all that pmm-edge uses; those that are not installed in one line."""
    found, absent = [], []
    for name in _SHOWN:
        installed = version_of(name)
        if installed is None:
            if not version_of(_INSTEAD.get(name, name)):
                absent.append(name)
        elif name != "cuda-python" and not importable(_MODULES.get(name, name)):
            found.append(Finding(name, f"{installed}, but cannot be imported", False, f"pip install -U {name}"))
        else:
            found.append(Finding(name, installed))
    if version_of("onnxruntime") and version_of("onnxruntime-gpu"):
        found.append(
            Finding(
                "onnxruntime twice",
                "onnxruntime and onnxruntime-gpu write to the same folder; which one works is chance",
                False,
                "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
            )
        )
    found.append(Finding("not installed", ", ".join(absent) or "–"))
    return Section("Packages", found)


def version_of(package: str) -> str | None:
    """A package's version by its metadata; None where it is not installed."""
    try:
        return version(package) or "unknown"
    except PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether a module would be found; of a dotted name the packages before its end are imported."""
    try:
        return find_spec(module) is not None
    # A package that is broken raises whatever it likes.
    except Exception:
        return False


_X86 = {
    "FP32": (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("sse2", "SSE2")),
    "INT8": (("amx_int8", "AMX"), ("avx512_vnni", "AVX-512 VNNI"), ("avx_vnni", "AVX VNNI")),
    "BF16": (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")),
    "FP16": (("amx_fp16", "AMX"), ("avx512_fp16", "AVX-512")),
}
_ARM = {
    "INT8": (("i8mm", "i8mm"), ("asimddp", "dot products")),
    "BF16": (("bf16", "bf16"),),
    "FP16": (("asimdhp", "half precision"),),
}
"""For each type the flags of /proc/cpuinfo that speed it up, and what they are called."""
_TENSOR_CORES = (((7, 0), "FP16"), ((7, 2), "INT8"), ((8, 0), "BF16"), ((8, 9), "FP8"), ((10, 0), "FP4"))
"""The first compute capability whose tensor cores multiply in a type (CUDA C++ Programming Guide)."""


def processor_precision(root: Path) -> Finding:
    """What the processor's flags say."""
    info = cpuinfo(root)
    table, flags = (_X86, info["flags"]) if "flags" in info else (_ARM, info.get("Features", ""))
    there = set(flags.split())
    if not there:
        return Finding("processor", "unknown: it names no flags")
    fast, slow = [], []
    for kind, known in table.items():
        named = [name for flag, name in known if flag in there]
        if kind == "FP32":
            named = named[:1]  # the widest
        if named:
            fast.append(f"{kind} ({', '.join(named)})")
        else:
            slow.append(kind)
    said = f"made for {', '.join(fast)}" if fast else ""
    return Finding(
        "processor", "; ".join(part for part in (said, f"not for {', '.join(slow)}" if slow else "") if part)
    )


def gpu_precision(capability: tuple[int, int]) -> str:
    """The types of a GPU's tensor cores, by its compute capability."""
    kinds = [kind for first, kind in _TENSOR_CORES if capability >= first]
    return f"tensor cores for {', '.join(kinds)}" if kinds else "no tensor cores"


_LITTLE_DISK_GIB = 2.0
_JETPACKS = (
    ("38", "7"),
    ("36.4.4", "6.2.1"),
    ("36.4.3", "6.2"),
    ("36.4", "6.1"),
    ("36.3", "6.0"),
    ("36", "6.0 preview"),
    ("35", "5"),
    ("32", "4"),
)
"""JetPack by the release of Jetson Linux; the first prefix counts."""
_OLDEST_JETPACK = (6, 1)


def machine(root: Path) -> Section:
    """What the operating system says of the machine and of this Python."""
    findings = [
        Finding("pmm-edge", version_of("pmm-edge") or "not installed"),
        Finding("Python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"),
        Finding("system", platform.platform()),
        *jetson(root),
        Finding("processor", processor(root)),
        Finding("cores", cores(root)),
        Finding("memory", _memory(root)),
        _disk(),
    ]
    return Section("Machine", findings)


def jetson(root: Path) -> list[Finding]:
    """Board, Jetson Linux and JetPack; nothing where this is no Jetson."""
    release = re.search(r"R(\d+)\b.*?REVISION: *([\d.]+)", text_of(root / "etc/nv_tegra_release"))
    if not release:
        return []
    board = text_of(root / "proc/device-tree/model") or "unknown board"
    linux = f"{release[1]}.{release[2]}"
    package = re.search(r"Package: nvidia-jetpack\n(?:.+\n)*?Version: *([\d.]+)", text_of(root / "var/lib/dpkg/status"))
    jetpack = (
        package[1] if package else next((jp for known, jp in _JETPACKS if f"{linux}.".startswith(f"{known}.")), "")
    )
    numbers = tuple(int(part) for part in re.findall(r"\d+", jetpack)[:2])
    old = bool(numbers) and (*numbers, 0)[:2] < _OLDEST_JETPACK
    remedy = "Update to JetPack 6.1 or later: it brings TensorRT 10.3, which pmm export --trt needs" if old else ""
    shown = f"{jetpack or 'unknown'} (Jetson Linux {linux})"
    return [Finding("Jetson", board), Finding("JetPack", shown, False if old else None, remedy)]


def _memory(root: Path) -> str:
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable): *(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" not in sizes:
        return "unknown"
    free = f", {int(sizes['MemAvailable']) / 2**20:.1f} GiB free" if "MemAvailable" in sizes else ""
    return f"{int(sizes['MemTotal']) / 2**20:.1f} GiB{free}"


def _disk() -> Finding:
    try:
        folder, home = cache_folder().absolute(), home_folder()
    except OutputError as error:
        return Finding("cache folder", shareable(error.problem), False, error.remedy)
    shown = shareable(str(folder)) if home and folder.is_relative_to(home) else "the folder that is set"
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        free = shutil.disk_usage(there).free / 2**30
    except OSError as error:
        return Finding("cache folder", f"{shown}: {error.strerror}", False, "Set PMM_HOME to a folder that works")
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("cache folder", f"{shown} cannot be written", False, "Set PMM_HOME to a folder that is writable")
    little = free < _LITTLE_DISK_GIB
    remedy = "Set PMM_HOME to a folder on a larger disk" if little else ""
    return Finding("cache folder", f"{shown}, {free:.1f} GiB free", False if little else None, remedy)


_SECONDS = 30.0
_SCRIPT = """
import sys
folder = sys.argv[1]
sys.path[:1] = [] if folder in sys.path[1:] else [folder]
from pmm_edge.doctor import main
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

    from pmm_edge.runtime.onnx_backend import driver_is_there, load_cuda_libraries

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
    from pmm_edge.runtime.tensorrt_backend import import_tensorrt

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


_TRAIN_EXTRA = "pip install 'pmm-edge[train]'"
_BASE = "pip install -U pmm-edge"
_ENGINES = ("bench", "embed", "eval", "visualize")
COMMANDS = ("train", "export", "trt", *_ENGINES, "verify", "data", "synth")
"""As `pmm doctor` takes them; `trt` is `pmm export --trt`."""

_TOML = () if sys.version_info >= (3, 11) else ("tomli",)
_COMMANDS_MODULES = {
    "train": ("torch", "torchvision", "tensorboard", "tomli_w", *_TOML),
}
"""Modules of the extra `train` without which a command cannot work."""
_EXPORT = ("torch", "torchvision", "onnx", "onnxscript", "safetensors")
"""Those without which a checkpoint cannot be exported; a .onnx file can still be bundled."""
_EVERY = {"numpy": "numpy", "PIL": "pillow"}
_CHECKPOINTS = ("torch", "torchvision", "safetensors")
_OPTIONAL = {
    "bench": ("onnx", "no --explain", _TRAIN_EXTRA),
    "eval": ("matplotlib", "no --cmc plot", _TRAIN_EXTRA),
    "embed": ("pyarrow", "no .parquet files", "pip install 'pmm-edge[parquet]'"),
}


@dataclass(frozen=True)
class Readiness:
    """Whether a command can work here."""

    command: str
    missing: list[str] = field(default_factory=list)
    """Why it cannot work."""
    limits: list[str] = field(default_factory=list)
    """What of it does not work."""
    remedies: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not self.missing

    @property
    def words(self) -> str:
        """`ready`, `cannot work: ...` or `ready, but ...`."""
        if self.missing:
            return f"cannot work: {'; '.join(self.missing)}"
        return f"ready, but {'; '.join(self.limits)}" if self.limits else "ready"


def check_commands(names: Sequence[str]) -> None:
    """Refuse names that are no commands.

    Raises:
        PmmError: one is not in `COMMANDS`.
    """
    for name in names:
        if name not in COMMANDS:
            raise PmmError(f"there is no command '{name}' to examine", f"Choose of {', '.join(COMMANDS)}")


def readiness(onnxruntime: dict[str, Any], tensorrt: dict[str, Any]) -> list[Readiness]:
    """Whether each command can work.

    Args:
        onnxruntime: what the probe of ONNX Runtime found.
        tensorrt: what the probe of TensorRT found.
    """
    engines = _engines(onnxruntime, tensorrt)
    return [_ready(command, engines) for command in COMMANDS]


@dataclass(frozen=True)
class _Engine:
    files: str
    problem: str | None
    remedy: str


def _engines(onnxruntime: dict[str, Any], tensorrt: dict[str, Any]) -> list[_Engine]:
    """The three engines with the files that each runs, and what is wrong with it."""
    absent = [module for module in _CHECKPOINTS if not importable(module)]
    torch = f"{absent[0]} is not installed" if absent else None
    trt = tensorrt.get("error") or tensorrt.get("cuda_error")
    return [
        _Engine(".onnx", _onnxruntime_problem(onnxruntime), _BASE),
        _Engine(".pt and .safetensors", torch, _TRAIN_EXTRA),
        _Engine(".engine", trt, tensorrt.get("remedy") or tensorrt.get("cuda_remedy") or ""),
    ]


def _onnxruntime_problem(found: dict[str, Any]) -> str | None:
    if "error" in found:
        return "onnxruntime is not installed" if not importable("onnxruntime") else f"onnxruntime: {found['error']}"
    cpu = found["providers"].get("CPUExecutionProvider", "it has no CPU provider")
    return f"onnxruntime: {cpu}" if cpu else None


def _ready(command: str, engines: list[_Engine]) -> Readiness:
    onnx, torch, trt = engines
    missing, limits, remedies = _absent(command), list[str](), list[str]()
    if command in ("export", "trt") and onnx.problem:  # every engine is built from a file that ONNX Runtime has read
        missing[onnx.problem] = onnx.remedy
    if command == "export" and (absent := [module for module in _EXPORT if not importable(module)]):
        limits.append(f"only --triton and --deepstream of a .onnx file ({', '.join(absent)} not installed)")
        remedies.append(_TRAIN_EXTRA)
    if command == "trt" and trt.problem:
        missing[trt.problem] = trt.remedy
    if command in _ENGINES:
        broken = [engine for engine in engines if engine.problem]
        if len(broken) == len(engines):
            missing["no engine that runs models"] = f"{_BASE}, or {_TRAIN_EXTRA}"
        else:
            limits += [f"no {engine.files} files ({engine.problem})" for engine in broken]
            # An engine that needs a GPU is nothing to install where there is none.
            remedies += [engine.remedy for engine in broken if engine is not trt]
    if command in _OPTIONAL and not importable(_OPTIONAL[command][0]):
        _, lost, remedy = _OPTIONAL[command]
        limits.append(lost)
        remedies.append(remedy)
    if command == "bench" and torch.problem and not onnx.problem:
        limits.append("needs --reference MODEL.onnx, as the usual reference is a checkpoint")
    if command == "visualize" and torch.problem:
        limits.append("no cams and no mixing, which are of checkpoints")
    found = list(dict.fromkeys([*missing.values()] if missing else remedies))
    return Readiness(command, list(missing), limits, [remedy for remedy in found if remedy])


def _absent(command: str) -> dict[str, str]:
    """Why a command cannot work for want of packages, with what installs them."""
    groups = (
        ([package for module, package in _EVERY.items() if not importable(module)], _BASE),
        ([module for module in _COMMANDS_MODULES.get(command, ()) if not importable(module)], _TRAIN_EXTRA),
    )
    return {f"{', '.join(absent)} not installed": remedy for absent, remedy in groups if absent}


_USED = ("CPUExecutionProvider", "CUDAExecutionProvider")
"""Providers that pmm-edge asks for; that others do not work harms nobody."""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; no text in it names a home folder."""

    sections: list[Section]
    commands: list[Readiness]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        sections = {
            section.title: {
                finding.name: {"value": finding.value, "good": finding.good, "remedy": finding.remedy}
                for finding in section.findings
            }
            for section in self.sections
        }
        commands = {item.command: {"usable": item.usable, **asdict(item)} for item in self.commands}
        return {"sections": sections, "commands": commands}


def examine(root: Path = Path("/")) -> Diagnosis:
    """Examine this machine. What cannot be found out becomes a line that says so.

    Args:
        root: where the files of the operating system are read.
    """
    with ThreadPoolExecutor() as pool:
        onnxruntime, tensorrt, gpus = pool.map(probe, ("onnxruntime", "tensorrt", "gpus"))
    sections = [
        machine(root),
        _gpus(root, gpus),
        Section("Engines", [*_onnxruntime(onnxruntime), *_tensorrt(tensorrt), *_torch(gpus)]),
        Section("Precision", [processor_precision(root), *_gpu_precision(gpus)]),
        packages(),
    ]
    return Diagnosis(
        [Section(section.title, [_shareable(finding) for finding in section.findings]) for section in sections],
        [_shareable_readiness(item) for item in readiness(onnxruntime, tensorrt)],
    )


def _gpus(root: Path, found: dict[str, Any]) -> Section:
    driver = text_of(root / "sys/module/nvidia/version")
    findings = [Finding("driver", driver)] if driver else []
    if "cuda" in found:
        findings.append(Finding("newest CUDA", f"{found['cuda']}, which the driver supports"))
    for index, gpu in enumerate(found.get("gpus", [])):
        capability = ".".join(map(str, gpu["capability"]))
        memory = f"{gpu['memory'] / 2**30:.1f} GiB"
        findings.append(Finding(f"cuda:{index}", f"{gpu['name']}, compute capability {capability}, {memory}", True))
    if not found.get("gpus"):
        why = found.get("error", "the driver finds no GPU")
        broken = "there is no NVIDIA driver" not in why
        remedy = "Does nvidia-smi work? After an update of the driver a restart helps" if broken else ""
        findings.append(Finding("GPU", f"none: {why}", False if broken else None, remedy))
    return Section("GPU", findings)


def _onnxruntime(found: dict[str, Any]) -> list[Finding]:
    if "error" in found:
        remedy = found.get("remedy") or "pip install -U pmm-edge"
        there = importable("onnxruntime")
        return [Finding("ONNX Runtime", found["error"] if there else "not installed", False, remedy)]
    findings = []
    for provider, problem in found["providers"].items():
        name = f"ONNX Runtime, {provider.removesuffix('ExecutionProvider')}"
        if problem is None:
            findings.append(Finding(name, "works", True))
            continue
        no_driver = "no NVIDIA driver" in problem
        wrong = provider in _USED and not no_driver
        remedy = _cuda_remedy() if wrong and provider == "CUDAExecutionProvider" else ""
        findings.append(Finding(name, f"listed, but does not work: {problem}", False if wrong else None, remedy))
    return findings


def _cuda_remedy() -> str:
    build = f"onnxruntime-gpu {version_of('onnxruntime-gpu') or ''}".strip()
    return (
        f"Install the CUDA and cuDNN that {build} was built for: pip install 'onnxruntime-gpu[cuda,cudnn]'; until then"
        " models run on the CPU"
    )


def _tensorrt(found: dict[str, Any]) -> list[Finding]:
    if "error" in found:
        return [Finding("TensorRT", found["error"], None, found.get("remedy", ""))]
    if "cuda_error" in found:
        shown = f"{found['version']}, but no GPU for it: {found['cuda_error']}"
        return [Finding("TensorRT", shown, False, found["cuda_remedy"])]
    return [Finding("TensorRT", f"{found['version']} with CUDA {found['cuda']} on {found['gpu']}", True)]


def _torch(gpus: dict[str, Any]) -> list[Finding]:
    """From its metadata alone: importing torch takes seconds."""
    version = version_of("torch")
    if version is None or not importable("torch"):
        return [Finding("PyTorch", "not installed", None, "pip install 'pmm-edge[train]'")]
    if "+cpu" in version and gpus.get("gpus"):
        return [Finding("PyTorch", f"{version}: it cannot use the GPU", False, "Install a build of torch for CUDA")]
    return [Finding("PyTorch", f"{version}, installed (not tried)")]


def _gpu_precision(found: dict[str, Any]) -> list[Finding]:
    return [
        Finding(f"cuda:{index}", gpu_precision((gpu["capability"][0], gpu["capability"][1])))
        for index, gpu in enumerate(found.get("gpus", []))
    ]


def _shareable(finding: Finding) -> Finding:
    return replace(finding, value=shareable(finding.value), remedy=shareable(finding.remedy))


def _shareable_readiness(item: Readiness) -> Readiness:
    return replace(
        item,
        missing=[shareable(text) for text in item.missing],
        limits=[shareable(text) for text in item.limits],
    )


MARKS = {True: "ok", False: "wrong", None: ""}


def as_markdown(diagnosis: Diagnosis) -> str:
    """One table for each section, and one for the commands."""
    parts = [
        _table(section.title, ((finding.name, _value(finding)) for finding in section.findings))
        for section in diagnosis.sections
    ]
    commands = (
        (f"pmm {_command(item.command)}", "; ".join([item.words, *item.remedies])) for item in diagnosis.commands
    )
    return "\n".join([*parts, _table("Commands", commands)])


def _command(name: str) -> str:
    return "export --trt" if name == "trt" else name


def _value(finding: Finding) -> str:
    mark = f"**{MARKS[finding.good]}**" if finding.good is False else MARKS[finding.good]
    return ". ".join(part for part in (f"{mark}: {finding.value}" if mark else finding.value, finding.remedy) if part)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {title} | |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """What a package or a driver says of itself is text, not markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|").replace("`", "'")
    return text.replace("@", "@\N{ZERO WIDTH SPACE}")


__all__ = ["COMMANDS", "Diagnosis", "Finding", "Readiness", "Section", "as_markdown", "examine"]
