"""Every name that the sources use of TensorRT and cuda-python exists in the real bindings and accepts its arguments."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import double
import pytest
from bindings import CUDA_VERSIONS, REPOSITORY, VERSIONS, Api, CudaApi, api_of, cuda_api_of, run_with, run_with_cuda

SOURCES = (REPOSITORY / "pmm_edge/export/tensorrt.py", REPOSITORY / "pmm_edge/runtime/tensorrt_backend.py")
CUDA_SOURCE = REPOSITORY / "pmm_edge/runtime/cuda.py"
CLASS_OF = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "plan": "IHostMemory",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
"""The class of variables with these names in the sources."""


@pytest.fixture(scope="module", params=VERSIONS)
def api(request: pytest.FixtureRequest) -> Api:
    return api_of(request.param)


@pytest.fixture(scope="module", params=CUDA_VERSIONS)
def cuda_api(request: pytest.FixtureRequest) -> CudaApi:
    return cuda_api_of(request.param)


def chain(node: ast.AST) -> list[str]:
    """`a.b.c` as its names; empty if it does not begin with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := chain(node.value)):
        return [*before, node.attr]
    return []


def chains(*paths: Path) -> Iterator[list[str]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (names := chain(node)):
                yield names


def used_names() -> set[str]:
    """All `trt.X.Y` of the sources, without `trt`."""
    found = {
        ".".join(names[names.index(root) + 1 :])
        for names in chains(*SOURCES)
        for root in ("trt", "_trt")
        if root in names[:2]
    }
    return found - {"__version__", ""}


def used_attributes() -> set[tuple[str, str]]:
    """Class and attribute of all `engine.x`, `self._engine.x` and the like."""
    holders = ((names[-2].lstrip("_"), names) for names in chains(*SOURCES))
    return {
        (CLASS_OF[holder], names[-1])
        for holder, names in holders
        if holder in CLASS_OF and len(names) - names.index(names[-2]) == 2
    }


def test_the_sources_are_parsed() -> None:
    assert {"BuilderFlag.TF32", "ILogger.Severity.ERROR", "OnnxParser"} <= used_names()
    attributes = used_attributes()
    assert {("IExecutionContext", "execute_async_v3"), ("ICudaEngine", "device_memory_size_v2")} <= attributes
    assert {kind for kind, _ in attributes} == set(CLASS_OF.values()) - {"INetworkDefinition"}


def test_every_name_in_the_sources_is_real(api: Api) -> None:
    for name in used_names():
        holder, _, attribute = name.rpartition(".")
        assert name in api or attribute in api[holder], name
    for kind, attribute in used_attributes():
        assert attribute in api[kind], f"{kind}.{attribute}"


def test_the_double_has_what_the_sources_use() -> None:
    trt = double.tensorrt(double.FakeGpu())
    for name in used_names():
        holder: Any = trt
        for part in name.split("."):
            holder = getattr(holder, part)
    for kind, attribute in used_attributes():
        assert attribute in vars(getattr(trt, kind)), f"{kind}.{attribute}"


def test_the_double_has_nothing_that_is_not_real(api: Api) -> None:
    classes = {name: value for name, value in vars(double.tensorrt(double.FakeGpu())).items() if name[0] != "_"}
    classes["ILogger.Severity"] = classes["ILogger"].Severity
    assert len(classes) > 20
    for name, kind in classes.items():
        for attribute in {*vars(kind), *getattr(kind, "__annotations__", {})}:
            if attribute.startswith("_") and attribute != "__init__":
                continue
            assert attribute in api[name], f"{name}.{attribute}"
            value, real = vars(kind).get(attribute), api[name][attribute]
            if inspect.isfunction(value) and (real or attribute != "__init__"):  # only TensorRT creates the others
                assert accepts_the_same(value, real), f"{name}.{attribute} takes {real}"


def accepts_the_same(function: Any, overloads: list[dict[str, bool]]) -> bool:
    """One of the real overloads accepts the arguments of the double, by position and by name."""
    given = [name for name in inspect.signature(function).parameters if name != "self"]
    return any(
        list(real)[: len(given)] == given and all(optional for name, optional in real.items() if name not in given)
        for real in overloads
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_our_subclasses_work_with_the_real_classes(version: str) -> None:
    script = """
import tensorrt_bindings as trt
from pmm_edge.export.tensorrt import progress_monitor
from pmm_edge.runtime.tensorrt_backend import error_logger, last_error
logger = error_logger(trt)
assert isinstance(logger, trt.ILogger)
logger.log(trt.ILogger.Severity.INFO, "fine")
logger.log(trt.ILogger.Severity.ERROR, "not  fine")
assert last_error(logger) == " (not fine)"
reported = []
monitor = progress_monitor(trt, "model.engine", lambda *progress: reported.append(progress))
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("Building", None, 2)
assert monitor.step_complete("Building", 0)
monitor.phase_finish("Building")
assert [progress[1] for progress in reported] == [0, 1, 2], reported
assert list(trt.Dims((1, 96, 64, 3))) == [1, 96, 64, 3]
assert 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
print("passed")
"""
    assert run_with(version, script).strip() == "passed"


def test_every_cuda_name_in_the_source_is_real(cuda_api: CudaApi) -> None:
    used = set()
    for names in chains(CUDA_SOURCE):
        position = next((number for number, name in enumerate(names) if re.match("cuda[A-Z]", name)), None)
        if position is not None:
            used.add(tuple(names[position:]))
    assert {("cudaGraphLaunch",), ("cudaError_t", "cudaSuccess")} <= used
    for name, *members in used:
        for member in members or [None]:
            assert name in cuda_api and (member is None or member in cuda_api[name]), f"{name}.{member}"


def test_the_double_of_cuda_is_real(cuda_api: CudaApi) -> None:
    names = {name: value for name, value in vars(double.cuda_runtime(double.FakeGpu())).items() if name[:4] == "cuda"}
    assert len(names) > 20
    for name, value in names.items():
        if isinstance(value, int):
            assert cuda_api[name] == value
        elif isinstance(value, type):
            assert {member.name: member.value for member in value}.items() <= cuda_api[name].items()
        else:
            inside = re.match(rf"{name}\((.*)\)", cuda_api[name])
            assert inside, name
            parameters = [part.partition(":")[0].split()[-1] for part in inside[1].split(",") if part.strip()]
            assert parameters == list(inspect.signature(value).parameters), name


@pytest.mark.parametrize("version", CUDA_VERSIONS)
def test_a_missing_gpu_is_recognized(version: str) -> None:
    """Versions of cuda-python report a missing driver in different ways."""
    script = """
import warnings
warnings.simplefilter("error", DeprecationWarning)
from pmm_edge.runtime.cuda import Cuda, NotOnThisMachineError, _import_runtime, native_handle
api = _import_runtime()
print(api.__name__)
assert native_handle(api.cudaStream_t(5)) == 5
try:
    Cuda().release()
except NotOnThisMachineError:
    pass
print("passed")
"""
    assert run_with_cuda(version, script).split() == [CUDA_VERSIONS[version][1], "passed"]
