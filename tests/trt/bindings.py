"""The real Python bindings of TensorRT and of CUDA, on a machine without a GPU and without TensorRT.

Their wheels hold the whole Python API; what TensorRT's lack are its shared libraries. Libraries of the same names
with empty functions let them import, in a process of their own, and tell what they offer. CUDA's import as they are.
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
"""The package, and the module with the runtime API: the oldest that is let in, what `<13` gives, and CUDA 13's."""
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
EMPTY = """
#define EMPTY(name) void *name(void) { return 0; }
EMPTY(createInferBuilder_INTERNAL) EMPTY(createInferRefitter_INTERNAL) EMPTY(createInferRuntime_INTERNAL)
EMPTY(getBuilderPluginRegistry) EMPTY(getPluginRegistry) EMPTY(createNvOnnxParser_INTERNAL)
EMPTY(createNvOnnxParserRefitter_INTERNAL) EMPTY(getNvOnnxParserVersion) EMPTY(initLibNvInferPlugins)
"""
Api = dict[str, dict[str, list[dict[str, bool]]]]
"""Class -> attribute -> its signatures, for a method."""
CudaApi = dict[str, dict[str, int] | int | str]
"""Name -> the numbers of an enumeration, a number, or the text that describes a function."""


def installed(version: str) -> Path:
    """A folder with a version's bindings of TensorRT and their empty libraries; made once."""

    def add_libraries(temporary: str) -> None:
        source = Path(temporary, "empty.c")
        source.write_text(EMPTY)
        major = version.partition(".")[0]
        for library in LIBRARIES:
            _run("gcc", "-shared", "-fPIC", str(source), "-o", f"{temporary}/made/lib{library}.so.{major}")

    return _made(version, ("--no-deps", f"{VERSIONS[version]}=={version}"), add_libraries)


def installed_cuda(version: str) -> Path:
    """A folder with a version's bindings of CUDA; made once."""
    package, _ = CUDA_VERSIONS[version]
    return _made(f"{package}-{version}", (f"{package}=={version}",), lambda temporary: None)


def _made(name: str, packages: Sequence[str], finish: Callable[[str], None]) -> Path:
    folder = CACHE / f"{name}-{sys.implementation.cache_tag}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        _run(sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{temporary}/made", *packages)
        finish(temporary)
        Path(temporary, "made").rename(folder)
    return folder


def run_with(version: str, script: str) -> str:
    """What a script prints in a process where `tensorrt_bindings` is the real one of a version."""
    return _printed(installed(version), script)


def run_with_cuda(version: str, script: str) -> str:
    """What a script prints in a process where CUDA's Python API is that of a version."""
    return _printed(installed_cuda(version), script)


def _printed(folder: Path, script: str) -> str:
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{REPOSITORY}"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


DUMP = """
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


def api_of(version: str) -> Api:
    """All classes of a version."""
    told = json.loads(run_with(version, DUMP))
    assert told["version"] == version
    return {
        name: {attribute: signatures(attribute, doc) for attribute, doc in members.items()}
        for name, members in told["classes"].items()
    }


CUDA_DUMP = """
import importlib, json
api = importlib.import_module({module!r})
told = {{}}
for name in dir(api):
    value = getattr(api, name)
    if name.startswith("cuda"):
        if isinstance(value, type):
            members = {{member: getattr(value, member) for member in dir(value) if member.startswith("cuda")}}
            told[name] = {{member: int(number) for member, number in members.items()}}
        else:
            told[name] = int(value) if isinstance(value, int) else value.__doc__ or ""
print(json.dumps({{"file": api.__file__, "names": told}}))
"""


def cuda_api_of(version: str) -> CudaApi:
    """CUDA's runtime API in a version."""
    told = json.loads(run_with_cuda(version, CUDA_DUMP.format(module=CUDA_VERSIONS[version][1])))
    assert told["file"].startswith(str(installed_cuda(version)))
    return told["names"]


def signatures(name: str, doc: str) -> list[dict[str, bool]]:
    """Parameters, without self, of each overload that pybind11 documents: name -> whether it may be left out."""
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


def _run(*command: str) -> None:
    """Run what makes the bindings; without it these tests skip, but in CI they fail."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        problem = ended.stderr.strip().splitlines()[-1:] if ended.returncode else None
    except FileNotFoundError as error:
        problem = [str(error)]
    if problem is None:
        return
    reason = f"the real bindings cannot be made: {' '.join(command[:4])}: {' '.join(problem)}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
