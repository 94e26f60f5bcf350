#!/usr/bin/env bash
# What an edge box does, and the tests that need no torch, with the lowest allowed version of every base dependency and
# of the extra gallery:
#     tests/lowest_versions.sh [PYTHON]
# FULL (.venv/bin/python, as `make install` creates it) exports the networks. Takes some minutes and the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD CUDA_VISIBLE_DEVICES=
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${FULL:-.venv/bin/python}" - "$work" <<'PY'
import sys
from pathlib import Path

sys.path.insert(0, "tests")
import msgspec
from conftest import write_tiny_checkpoint

from pmm_edge.export import export

work = Path(sys.argv[1])
project = msgspec.toml.decode(Path("pyproject.toml").read_text())["project"]
lowest = [line.replace(">=", "==", 1) for line in (*project["dependencies"], *project["optional-dependencies"]["train"])]
tools = [line for line in lowest if line.partition("==")[0] in ("matplotlib", "onnx", "tomli-w")]  # of the tests
(work / "base.txt").write_text("\n".join(lowest[: len(project["dependencies"])]))
(work / "tests.txt").write_text("\n".join([*tools, "pytest"]))
extras = [line for name in ("gallery", "parquet") for line in project["optional-dependencies"][name]]
(work / "gallery.txt").write_text("\n".join(line.replace(">=", "==", 1) for line in extras))
checkpoint = write_tiny_checkpoint(work / "best.pt")
for form in ("uint8", "raw"):
    export(checkpoint, out=work / f"{form}.onnx", input_form=form)
PY

"${1:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet -r "$work/base.txt"
pip list

pmm() { echo "\$ pmm $*" && "$work/venv/bin/python" -m pmm_edge "$@"; }
pmm doctor embed eval bench export verify data synth
pmm synth "$work/data" --train-identities 2 --test-identities 4 --cameras 3 --images 2 --workers 1
pmm data "$work/data" --decode
pmm embed "$work/uint8.onnx" "$work/data" -o "$work/embeddings.npz"
pmm eval "$work/uint8.onnx" "$work/data" --rerank --flip
pmm bench "$work/raw.onnx" --reference "$work/uint8.onnx" --data "$work/data" --out "$work/bench.json"
pmm verify "$work/raw.onnx" --data "$work/data"
pmm export "$work/raw.onnx" --deepstream "$work/tracker"
pmm export "$work/uint8.onnx" --triton "$work/models"
if pmm export "$work/best.pt" 2> "$work/error"; then exit 1; fi
grep "error: .* torch, torchvision" "$work/error"

pip install --quiet -r "$work/tests.txt" -c "$work/base.txt"
others='^(import|from) (torch|safetensors|pyarrow|openvino|qdrant_client|gallery|grpc|tritonclient|broken|pmm_edge\.(model|pictures\.attention))\b'
mapfile -t files < <(grep -LE "$others" $(find tests -name 'test_*.py' -not -path 'tests/trainer/*' | sort))
export PMM_TINY_ONNX=$work/uint8.onnx
"$work/venv/bin/python" -m pytest -m "not torch and not gpu" "${files[@]}"

pip install --quiet -r "$work/gallery.txt" -c "$work/base.txt"
"$work/venv/bin/python" -m pytest -m "not torch and not gpu" tests/gallery
