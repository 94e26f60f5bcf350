"""The doubles of TensorRT and cuda-python have no name, parameter or number that the real bindings lack.

The other tests run every line of the sources on the doubles, so every name that the sources use is real as well.
Wheels contain the whole Python API; those of TensorRT lack only its shared libraries. Libraries of the same names with
empty functions let them import without a GPU, in a process of their own.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import double
import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
TENSORRT = (
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu12-bindings==10.13.0.35",
    "tensorrt-cu13-bindings==11.4.0.106",
)
RTX = "tensorrt-rtx-cu13-bindings==1.7.1.116", "tensorrt-rtx-cu13-libs==1.7.1.116"
"""A compiler with its libraries, which needs no GPU."""
CUDA = {  # the oldest supported version, what `<13` installs, and CUDA 13
    "cuda-python==12.6.0": "cuda.cudart",
    "cuda-bindings==12.9.10": "cuda.bindings.runtime",
    "cuda-bindings==13.5.0": "cuda.bindings.runtime",
}
EMPTY = """
#define EMPTY(name) void *name(void) { return 0; }
EMPTY(createInferBuilder_INTERNAL) EMPTY(createInferRefitter_INTERNAL) EMPTY(createInferRuntime_INTERNAL)
EMPTY(getBuilderPluginRegistry) EMPTY(getPluginRegistry) EMPTY(createNvOnnxParser_INTERNAL)
EMPTY(createNvOnnxParserRefitter_INTERNAL) EMPTY(getNvOnnxParserVersion) EMPTY(initLibNvInferPlugins)
"""
DESCRIBE = """
import importlib, json
def describe(value):
    if isinstance(value, type):
        return {name: describe(getattr(value, name)) for name in dir(value) if name[:2] != "__" or name == "__init__"}
    return int(value) if isinstance(value, int) else value.__doc__ or ""
module = importlib.import_module(MODULE)
print(json.dumps({name: describe(value) for name, value in vars(module).items() if name[0] != "_"}))
"""


def run(*command: str) -> None:
    """Run a command; if it fails the tests are skipped, but fail in CI."""
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"the real bindings are not available: {error}: {getattr(error, 'stderr', '')}")


def installed(package: str, *more: str) -> Path:
    """Install packages into a cached folder, once."""
    cache = REPOSITORY / ".cache" / "tensorrt-bindings"
    folder = cache / f"{package}-{sys.implementation.cache_tag}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"), tempfile.TemporaryDirectory(dir=cache) as temporary:
        if folder.is_dir():  # another process has installed it
            return folder
        made, source = Path(temporary, "made"), Path(temporary, "empty.c")
        options = ["--no-deps"] if package in TENSORRT or more else []
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(made), *options, package, *more)
        if package in TENSORRT:
            source.write_text(EMPTY)
            major = package.partition("==")[2].partition(".")[0]
            for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
                run("gcc", "-shared", "-fPIC", str(source), "-o", str(made / f"lib{library}.so.{major}"))
        made.rename(folder)
    return folder


def run_with(package: str, script: str) -> str:
    """Return what a script prints with the real bindings of a package."""
    folder = installed(*RTX) if package == RTX[0] else installed(package)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{REPOSITORY}"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def api_of(package: str) -> dict[str, Any]:
    """Return the members of a class, the number of a constant, the docstring of anything else, for every name."""
    module = "tensorrt_rtx_bindings" if package == RTX[0] else CUDA.get(package, "tensorrt_bindings")
    return json.loads(run_with(package, DESCRIBE.replace("MODULE", repr(module))))


@pytest.mark.parametrize("package", [*TENSORRT, RTX[0]])
def test_the_double_of_tensorrt_is_real(package: str) -> None:
    make = double.tensorrt_rtx if package == RTX[0] else double.tensorrt
    api, version = api_of(package), package.partition("==")[2]
    fake = vars(make(double.FakeGpu(), version))
    assert len(fake) > 20
    same = "SAME_COMPUTE_CAPABILITY" in api["HardwareCompatibilityLevel"]
    assert package == RTX[0] or same == hasattr(fake["HardwareCompatibilityLevel"], "SAME_COMPUTE_CAPABILITY")
    for name, kind in fake.items():
        if name != "__version__":
            check_class(name, kind, api[name])


def check_class(name: str, kind: type, real: dict[str, Any]) -> None:
    for attribute, value in vars(kind).items():
        if attribute.startswith("_") and attribute != "__init__":
            continue
        assert attribute in real, f"{name}.{attribute}"
        if isinstance(value, type):
            check_class(f"{name}.{attribute}", value, real[attribute])
        elif inspect.isfunction(value):
            overloads = re.findall(rf"^(?:\d+\. )?{attribute}\((?!\*args)(.*)\) ->", real[attribute], re.MULTILINE)
            if attribute != "__init__" or overloads:  # objects without are created only by TensorRT
                assert any(accepts(text, value) for text in overloads), f"{name}.{attribute} takes {overloads}"


def accepts(text: str, function: Any) -> bool:
    """Whether parameters in a docstring of pybind11 include those of a function, and the others are optional."""
    nested = True
    while nested:  # types such as `Tuple[int, int]`, defaults such as `<Strategy.STATIC: 0>`
        text, nested = re.subn(r"\([^()]*\)|\[[^][]*\]|<[^<>]*>", "", text)
    names, given = (
        [part.split(":")[0].strip() for part in text.split(",")],
        list(inspect.signature(function).parameters),
    )
    return names[: len(given)] == given and all("=" in part for part in text.split(",")[len(given) :])


@pytest.mark.parametrize("package", TENSORRT)
def test_our_subclasses_work_with_the_real_classes(package: str) -> None:
    script = f"""
import tensorrt_bindings as trt
from pmm_edge.export.tensorrt import progress_monitor
from pmm_edge.runtime.tensorrt_backend import error_logger, last_error
assert trt.__version__ == {package.partition("==")[2]!r}
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
assert {{"node_name", "node_operator", "desc"}} <= set(dir(trt.ParserError))
assert {{"num_errors", "get_error"}} <= set(dir(trt.OnnxParser))
assert list(trt.Dims((1, 96, 64, 3))) == [1, 96, 64, 3]
assert 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
"""
    run_with(package, script)


@pytest.mark.parametrize("package", CUDA)
def test_the_double_of_cuda_is_real(package: str) -> None:
    api, fake = api_of(package), vars(double.cuda_runtime(double.FakeGpu()))
    assert len(fake) > 20
    for name, value in fake.items():
        if isinstance(value, int):
            assert api[name] == value
        elif isinstance(value, type):
            assert {member.name: member.value for member in value}.items() <= api[name].items()
        else:
            inside = re.match(rf"{name}\((.*)\)", api[name])
            assert inside, name
            names = [part.partition(":")[0].split()[-1] for part in inside[1].split(",") if part.strip()]
            assert names == list(inspect.signature(value).parameters), name


@pytest.mark.parametrize("package", CUDA)
def test_a_missing_gpu_is_recognized(package: str) -> None:
    """Versions of cuda-python report a missing driver in different ways."""
    script = f"""
import warnings
warnings.simplefilter("error", DeprecationWarning)
from pmm_edge.runtime.cuda import Cuda, NotOnThisMachineError, _import_runtime, native_handle
api = _import_runtime()
assert api.__name__ == {CUDA[package]!r}
assert native_handle(api.cudaStream_t(5)) == 5
try:
    Cuda().release()
except NotOnThisMachineError:
    pass
"""
    run_with(package, script)
