"""Every name that this project uses of TensorRT and cuda-python exists in the real ones, and takes what it is given."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import double
import pytest
from bindings import (
    CUDA_VERSIONS,
    REPOSITORY,
    VERSIONS,
    Api,
    CudaApi,
    api_of,
    cuda_api_of,
    run_with,
    run_with_cuda,
)

USERS = (
    REPOSITORY / "pmm_edge/export/tensorrt.py",
    REPOSITORY / "pmm_edge/runtime/tensorrt_backend.py",
)
CUDA_USER = REPOSITORY / "pmm_edge/runtime/cuda.py"
CLASS_OF = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "plan": "IHostMemory",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
"""What variables of these names hold, in the sources that use TensorRT."""


@pytest.fixture(scope="module", params=VERSIONS)
def api(request: pytest.FixtureRequest) -> Api:
    return api_of(request.param)


def chain(node: ast.AST) -> list[str]:
    """`a.b.c` as its names; empty where it does not begin with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := chain(node.value)):
        return [*before, node.attr]
    return []


def chains(path: Path) -> Iterator[list[str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and (names := chain(node)):
            yield names


def used_names() -> set[str]:
    """All `trt.X.Y` of the sources, without the `trt`."""
    found = {
        ".".join(names[names.index(root) + 1 :])
        for path in USERS
        for names in chains(path)
        for root in ("trt", "_trt")
        if root in names[:2]
    }
    return found - {"__version__", ""}


def used_attributes() -> set[tuple[str, str]]:
    """Class and attribute of all `engine.x`, `self._engine.x` and the like."""
    found = set()
    for path in USERS:
        for names in chains(path):
            holder, attribute = names[-2].lstrip("_"), names[-1]
            if holder in CLASS_OF and len(names) - names.index(names[-2]) == 2:
                found.add((CLASS_OF[holder], attribute))
    return found


def test_the_sources_are_read_rightly() -> None:
    assert {"BuilderFlag.TF32", "ILogger.Severity.ERROR", "OnnxParser"} <= used_names()
    assert {("IExecutionContext", "execute_async_v3"), ("ICudaEngine", "device_memory_size_v2")} <= used_attributes()


def test_every_name_in_the_sources_is_real(api: Api) -> None:
    for name in used_names():
        holder, _, attribute = name.rpartition(".")
        assert name in api or attribute in api[holder], name


def test_every_attribute_in_the_sources_is_real(api: Api) -> None:
    for kind, attribute in used_attributes():
        assert attribute in api[kind], f"{kind}.{attribute}"


def test_the_double_offers_what_the_sources_use() -> None:
    trt = double.tensorrt(double.FakeGpu())
    for name in used_names():
        holder: Any = trt
        for part in name.split("."):
            holder = getattr(holder, part)
    for kind, attribute in used_attributes():
        assert attribute in vars(getattr(trt, kind)), f"{kind}.{attribute}"


def described(kind: type) -> Iterator[tuple[str, Any]]:
    """A double's public attributes: what its class declares, and annotates."""
    for name in {*vars(kind), *getattr(kind, "__annotations__", {})}:
        if not name.startswith("_") or name == "__init__":
            yield name, vars(kind).get(name)


def test_the_double_offers_nothing_that_is_not_real(api: Api) -> None:
    classes = {name: value for name, value in vars(double.tensorrt(double.FakeGpu())).items() if name[0] != "_"}
    classes["ILogger.Severity"] = classes["ILogger"].Severity
    assert len(classes) > 20
    for name, kind in classes.items():
        assert name in api, name
        for attribute, value in described(kind):
            assert attribute in api[name], f"{name}.{attribute}"
            real = api[name][attribute]
            if attribute == "__init__" and not real:
                continue  # TensorRT alone makes these, and so does the double
            if inspect.isfunction(value):
                assert takes_the_same(value, real), f"{name}.{attribute} takes {real}"


def takes_the_same(function: Any, overloads: list[dict[str, bool]]) -> bool:
    """One of the real overloads can be called as the double can, by position and by name."""
    given = [name for name in inspect.signature(function).parameters if name != "self"]
    return any(
        list(real)[: len(given)] == given and all(left_out for name, left_out in real.items() if name not in given)
        for real in overloads
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_subclasses_stand_on_the_real_classes(version: str) -> None:
    """TensorRT calls back into classes of ours: they can be made and called with the real ones beneath."""
    script = """
import tensorrt_bindings as trt
from pmm_edge.export.tensorrt import BuildProgress, progress_monitor
from pmm_edge.runtime.tensorrt_backend import error_logger, last_error
logger = error_logger(trt)
assert isinstance(logger, trt.ILogger)
logger.log(trt.ILogger.Severity.INFO, "fine")
logger.log(trt.ILogger.Severity.ERROR, "not  fine")
assert last_error(logger) == " (not fine)"
told = []
monitor = progress_monitor(trt, BuildProgress("model.engine", lambda *report: told.append(report)))
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("Building", None, 2)
assert monitor.step_complete("Building", 0)
monitor.phase_finish("Building")
assert [report[1] for report in told] == [0, 50, 100], told
assert list(trt.Dims((1, 96, 64, 3))) == [1, 96, 64, 3]
assert 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
print("held")
"""
    assert run_with(version, script).strip() == "held"


@pytest.fixture(scope="module", params=CUDA_VERSIONS)
def cuda_api(request: pytest.FixtureRequest) -> CudaApi:
    return cuda_api_of(request.param)


def cuda_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in vars(module).items() if name.startswith("cuda"))


def test_every_cuda_name_in_the_sources_is_real(cuda_api: CudaApi) -> None:
    used = set()
    for names in chains(CUDA_USER):
        position = next((number for number, name in enumerate(names) if re.match("cuda[A-Z]", name)), None)
        if position is not None:
            used.add(tuple(names[position:]))
    assert {("cudaGraphLaunch",), ("cudaError_t", "cudaSuccess")} <= used
    for name, *members in used:
        assert name in cuda_api, name
        for member in members:
            assert member in cuda_api[name], f"{name}.{member}"


def test_the_double_of_cuda_python_is_true(cuda_api: CudaApi) -> None:
    for name, value in cuda_names(double.cuda_runtime(double.FakeGpu())):
        if isinstance(value, int):
            assert cuda_api[name] == value
        elif isinstance(value, type):
            for member in value:
                assert cuda_api[name][member.name] == member.value
        else:
            inside = re.match(rf"{name}\((.*)\)", cuda_api[name])
            assert inside, name
            parameters = [part.partition(":")[0].split()[-1] for part in inside[1].split(",") if part.strip()]
            assert parameters == list(inspect.signature(value).parameters), name


@pytest.mark.parametrize("version", CUDA_VERSIONS)
def test_cuda_python_without_a_gpu_is_understood(version: str) -> None:
    """Versions say in ways of their own that there is no driver, and which error a number is."""
    script = """
from pmm_edge.runtime.cuda import Cuda, NotOnThisMachineError, _import_runtime
real = _import_runtime()
print(real.__name__)
try:
    Cuda().release()
    print("there is a GPU")
except NotOnThisMachineError as error:
    print(error.problem)
"""
    module, said = run_with_cuda(version, script).splitlines()
    assert module == CUDA_VERSIONS[version][1]
    assert re.match(r"there is a GPU|no GPU that CUDA can use \(cuda\w+: .|no NVIDIA driver \(.*libcuda", said), said
