"""The real Python bindings of TensorRT and CUDA, on a machine without a GPU and without TensorRT.

Their wheels contain the whole Python API; those of TensorRT lack only its shared libraries. Libraries of the same names
with empty functions let them import, in a process of their own. The bindings of CUDA import as they are.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / ".cache" / "tensorrt-bindings"
VERSIONS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.13.0.35": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
CUDA_VERSIONS = {
    "12.6.0": ("cuda-python", "cuda.cudart"),
    "12.9.10": ("cuda-bindings", "cuda.bindings.runtime"),
    "13.5.0": ("cuda-bindings", "cuda.bindings.runtime"),
}
"""Package and runtime module of the oldest supported version, of what `<13` gives, and of CUDA 13."""
EMPTY = """
#define EMPTY(name) void *name(void) { return 0; }
EMPTY(createInferBuilder_INTERNAL) EMPTY(createInferRefitter_INTERNAL) EMPTY(createInferRuntime_INTERNAL)
EMPTY(getBuilderPluginRegistry) EMPTY(getPluginRegistry) EMPTY(createNvOnnxParser_INTERNAL)
EMPTY(createNvOnnxParserRefitter_INTERNAL) EMPTY(getNvOnnxParserVersion) EMPTY(initLibNvInferPlugins)
"""
Api = dict[str, dict[str, list[dict[str, bool]]]]
"""Class -> attribute -> for a method its signatures: parameter -> whether it is optional."""
CudaApi = dict[str, dict[str, int] | int | str]
"""Name -> the members of an enumeration, a number, or the docstring of a function."""


def _installed(name: str, packages: Sequence[str], finish: Callable[[str], None] = lambda temporary: None) -> Path:
    """Install packages into a cached folder, once."""
    folder = CACHE / f"{name}-{sys.implementation.cache_tag}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            _run(sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{temporary}/made", *packages)
            finish(temporary)
            Path(temporary, "made").rename(folder)
    return folder


def _run(*command: str) -> None:
    """Run a command; if it fails the tests are skipped, but fail in CI."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = "".join(ended.stderr.strip().splitlines()[-1:]) if ended.returncode else None
    except FileNotFoundError as error:
        problem = str(error)
    if problem is not None:
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"the real bindings are not available: {' '.join(command[:4])}: {problem}")


def run_with(version: str, script: str) -> str:
    """Return what a script prints with the real `tensorrt_bindings` of a version."""

    def add_libraries(temporary: str) -> None:
        Path(temporary, "empty.c").write_text(EMPTY)
        for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
            target = f"{temporary}/made/lib{library}.so.{version.partition('.')[0]}"
            _run("gcc", "-shared", "-fPIC", f"{temporary}/empty.c", "-o", target)

    packages = ("--no-deps", f"{VERSIONS[version]}=={version}")
    return _printed(_installed(version, packages, add_libraries), script)


def run_with_cuda(version: str, script: str) -> str:
    """Return what a script prints with the real CUDA bindings of a version."""
    package = CUDA_VERSIONS[version][0]
    return _printed(_installed(f"{package}-{version}", (f"{package}=={version}",)), script)


def _printed(folder: Path, script: str) -> str:
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{REPOSITORY}"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def api_of(version: str) -> Api:
    """Return all classes of a version of TensorRT."""
    script = """
import json, tensorrt_bindings as trt
classes = {}
def describe(name, kind):
    classes[name] = {attribute: getattr(kind, attribute).__doc__ or "" for attribute in dir(kind)
                     if not attribute.startswith("__") or attribute == "__init__"}
    for attribute in classes[name]:
        if isinstance(getattr(kind, attribute), type):
            describe(f"{name}.{attribute}", getattr(kind, attribute))
for name in dir(trt):
    if isinstance(getattr(trt, name), type):
        describe(name, getattr(trt, name))
print(json.dumps({"version": trt.__version__, "classes": classes}))
"""
    found = json.loads(run_with(version, script))
    assert found["version"] == version
    return {
        name: {attribute: _signatures(attribute, doc) for attribute, doc in members.items()}
        for name, members in found["classes"].items()
    }


def cuda_api_of(version: str) -> CudaApi:
    """Return the runtime API of a version of CUDA."""
    script = f"""
import importlib, json
api = importlib.import_module({CUDA_VERSIONS[version][1]!r})
found = {{}}
for name in dir(api):
    value = getattr(api, name)
    if name.startswith("cuda"):
        if isinstance(value, type):
            members = {{member: getattr(value, member) for member in dir(value) if member.startswith("cuda")}}
            found[name] = {{member: int(number) for member, number in members.items()}}
        else:
            found[name] = int(value) if isinstance(value, int) else value.__doc__ or ""
print(json.dumps(found))
"""
    return json.loads(run_with_cuda(version, script))


def _signatures(name: str, doc: str) -> list[dict[str, bool]]:
    """Return the parameters of each overload in a docstring of pybind11, without self."""
    found = re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((?!\*args)(.*)\) ->", doc, flags=re.MULTILINE)
    return [_parameters(inside) for inside in found]


def _parameters(inside: str) -> dict[str, bool]:
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "([<{") - (letter in ")]>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    named = {part.partition(":")[0].strip(): " = " in part for part in parts if part.strip()}
    named.pop("self", None)
    return named
