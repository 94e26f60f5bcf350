"""TensorRT, loaded only when it is needed, and what it says when it fails."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from pmm_edge.errors import ModelError
from pmm_edge.runtime.cuda import Cuda, NotOnThisMachineError
from pmm_edge.runtime.engine_manifest import Machine

OLDEST = (10, 3)


def import_tensorrt() -> Any:
    """The `tensorrt` module.

    Raises:
        NotOnThisMachineError: it is missing, does not load, or is older than 10.3.
    """
    install = "On a Jetson it comes with JetPack 6.1 or later, elsewhere: pip install 'pmm-edge[trt]'"
    try:
        trt = import_module("tensorrt")
        version: str = trt.__version__
    # Its packages import without their libraries, then break as they please.
    except (ImportError, AttributeError, OSError) as error:
        raise NotOnThisMachineError("TensorRT is not installed", install) from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise NotOnThisMachineError(f"TensorRT {version} is older than 10.3", install)
    return trt


def this_machine(trt: Any, cuda: Cuda) -> Machine:
    """What an engine built here depends on."""
    return Machine(cuda.name, cuda.compute_capability, trt.__version__, cuda.runtime_version, cuda.driver)


def error_logger(trt: Any) -> Any:
    """A logger that keeps the errors in its list `errors` and prints nothing."""
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class ErrorLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in severe:
                self.errors.append(" ".join(msg.split()))

    return ErrorLogger()


def last_error(logger: Any) -> str:
    """What TensorRT said last, in brackets; nothing where it was silent."""
    return f" ({logger.errors[-1]})" if logger.errors else ""


def load_engine(trt: Any, logger: Any, plan: Any, path: Path, version_compatible: bool) -> Any:
    """Deserialize an engine.

    Args:
        plan: a buffer with the engine.
        path: where it comes from, for messages.

    Raises:
        ModelError: TensorRT refuses it.
    """
    runtime = trt.Runtime(logger)
    if version_compatible:
        # Such an engine brings the runtime that it was built with: code, trusted as the file's SHA-256 is known.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ModelError(
            f"TensorRT {trt.__version__} cannot load {path}{last_error(logger)}",
            "Build it again on this machine with pmm export --trt",
        )
    return engine
