"""The examination: all probes, and what follows from them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pmm_edge.doctor.commands import Readiness, readiness
from pmm_edge.doctor.findings import Finding, Section, shareable
from pmm_edge.doctor.machine import machine
from pmm_edge.doctor.packages import importable, packages, version_of
from pmm_edge.doctor.precision import gpu_precision, processor_precision
from pmm_edge.doctor.probes import probe
from pmm_edge.machine import text_of

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
