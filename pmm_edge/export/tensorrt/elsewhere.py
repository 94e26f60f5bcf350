"""What to run on the machine that has the GPU."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from pmm_edge.runtime.build_settings import BuildSettings
from pmm_edge.runtime.embedder import INPUT
from pmm_edge.spec import ModelSpec


def commands_for_target(
    onnx: Path, out: Path, spec: ModelSpec, settings: BuildSettings, also: Sequence[str] = ()
) -> str:
    """Say what builds the engine on the target: with `pmm`, or with `trtexec`, which writes no manifest.

    Args:
        also: further words for `pmm`; see `BuildSettings.command`.
    """
    pmm = settings.command(Path(onnx.name), Path(out.name), also)  # folders of this machine mean nothing there
    return f"Copy it to the target and run there: {pmm}   (or: {trtexec_command(onnx, out, spec, settings)})"


def trtexec_command(onnx: Path, out: Path, spec: ModelSpec, settings: BuildSettings) -> str:
    """The `trtexec` line that builds the same engine from a copy of the ONNX file."""
    batch = settings.batch
    sizes = {"min": batch.minimum, "opt": batch.optimal, "max": batch.maximum}
    words = ["trtexec", f"--onnx={onnx.name}", f"--saveEngine={out.name}", "--stronglyTyped", "--noTF32"]
    words += [f"--{name}Shapes={INPUT}:{'x'.join(map(str, spec.input.shape(size)))}" for name, size in sizes.items()]
    words += [f"--builderOptimizationLevel={settings.optimization_level}", "--profilingVerbosity=detailed"]
    if settings.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{settings.workspace_gib * 1024:g}")
    if settings.hardware_compatible:
        words.append("--hardwareCompatibilityLevel=ampere+")
    if settings.version_compatible:
        words.append("--versionCompatible")
    return shlex.join(words)
