"""All that a model consists of is read once, in its folder, and damage to any of it is found."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from certify import certify
from onnx import TensorProto, external_data_helper, helper

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.export.exporter import export
from pmm_edge.runtime.certificate import CertificateError, certificate_path, check_certificate
from pmm_edge.runtime.model_file import DIGEST_KEY, read_model

CROPS = [np.full((96, 64, 3), 90, np.uint8)]
Edit = Callable[[onnx.ModelProto], None]


def edited(path: Path, edit: Edit) -> None:
    """Change an ONNX file as a tool would, which keeps the digest."""
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())


def without_digest(model: onnx.ModelProto) -> None:
    (entry,) = (entry for entry in model.metadata_props if entry.key == DIGEST_KEY)
    model.metadata_props.remove(entry)


@pytest.fixture
def external(tiny_onnx: Path, tmp_path: Path) -> Path:
    """The tiny network with its weights in another file."""
    path = tmp_path / "models" / "model.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(tiny_onnx), path, save_as_external_data=True, location="weights.bin")
    return path


def exchange(model: Path) -> None:
    weights = model.with_name("weights.bin")
    weights.write_bytes((np.fromfile(weights, np.float32)[::-1] / 2).tobytes())


def test_external_data_is_part_of_the_model(
    external: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"of another model")  # in the working directory
    found, inline = read_model(external), read_model(tiny_onnx)
    stored = external.read_bytes() + external.with_name("weights.bin").read_bytes()
    assert (found.sha256, found.size) == (hashlib.sha256(stored).hexdigest(), len(stored))
    assert found.digest == inline.digest == inline.metadata[DIGEST_KEY]
    for path in (external, Path("models/model.onnx")):
        embedded = pmm_edge.load(path, "cpu").embed(CROPS)
        np.testing.assert_array_equal(embedded, pmm_edge.load(tiny_onnx, "cpu").embed(CROPS))
    certify(external, sha256=found.sha256)
    check_certificate(external)
    exchange(external)
    for load in (check_certificate, pmm_edge.load, lambda path: pmm_edge.load(path, "cpu", require_certificate=True)):
        with pytest.raises(CertificateError):
            load(external)
    certificate_path(external).unlink()
    with pytest.raises(ModelError, match="digest"):
        pmm_edge.load(external, "cpu")
    edited(external, without_digest)  # what a tool changed on purpose is loaded
    assert not np.array_equal(pmm_edge.load(external, "cpu").embed(CROPS), embedded)


def put(location: str, key: str = "location") -> Edit:
    """Change where each tensor is."""

    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == key else entry.value

    return edit


def in_an_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="inner", data_type=TensorProto.FLOAT, dims=[1], raw_data=b"1234")
    external_data_helper.set_external_data(tensor, "../weights.bin")
    tensor.ClearField("raw_data")
    inner = helper.make_graph([helper.make_node("Constant", [], ["a"], value=tensor)], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["b"], ["c"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (put("../weights.bin"), "../weights.bin"),
        (put("a/../../weights.bin"), "weights.bin"),
        (put("/etc/hostname"), "/etc/hostname"),
        (put("missing.bin"), "missing.bin"),
        (put("pipe"), "pipe"),
        (put("."), "not a file"),
        (put("999999999999", "offset"), "weights.bin"),
        (put("-1", "length"), "weights.bin"),
        (put("x", "offset"), "model.onnx"),
        (in_an_attribute, "../weights.bin"),
    ],
)
def test_external_data_elsewhere_is_refused(edit: Edit, named: str, external: Path) -> None:
    shutil.copy(external.with_name("weights.bin"), external.parents[1])
    os.mkfifo(external.with_name("pipe"))
    edited(external, edit)
    for load in (pmm_edge.load, lambda path: export(path, deepstream=path.with_name("tracker"))):
        with pytest.raises(ModelError) as caught:
            load(external)
        assert str(external) in caught.value.problem and named in caught.value.problem
        assert caught.value.remedy


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".pt"])
def test_damage_never_changes_embeddings(suffix: str, tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    path, random = tmp_path / f"model{suffix}", np.random.default_rng(0)
    if suffix == ".safetensors":
        export(tiny_checkpoint, out=path.with_suffix(".onnx"), safetensors=True)
    else:
        shutil.copy(tiny_onnx if suffix == ".onnx" else tiny_checkpoint, path)
    content, expected = path.read_bytes(), pmm_edge.load(path, "cpu").embed(CROPS)
    ends = [*random.integers(0, 3000, 6), *(len(content) - random.integers(1, 3000, 6))]  # headers and metadata
    for place in (*random.integers(0, len(content), 12), *ends):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            embedded = pmm_edge.load(path, "cpu").embed(CROPS)
        except ModelError as error:
            assert str(path) in error.problem and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(embedded, expected)  # in what nobody reads, such as padding


@pytest.mark.parametrize("place", [b"pmm_edge.spec", b"embeddings"])
def test_text_that_is_not_utf8(place: bytes, tiny_onnx: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_onnx, tmp_path / "model.onnx"))
    edited(path, without_digest)
    path.write_bytes(path.read_bytes().replace(place, b"\xff" + place[1:]))
    with pytest.raises(ModelError) as caught:
        pmm_edge.load(path, "cpu")
    assert str(path) in caught.value.problem
