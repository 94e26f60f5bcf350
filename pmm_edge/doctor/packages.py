"""Which Python packages are there: asked of their metadata, so that none of them is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from pmm_edge.doctor.findings import Finding, Section

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
