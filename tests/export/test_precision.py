"""FP16 and INT8 are what their names say, close to FP32, and placed where their engine fuses them."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from people import write_people

import pmm_edge
from pmm_edge.data.dataset import read
from pmm_edge.errors import CheckFailedError, DataError, OutputError, PmmError
from pmm_edge.export import Exported, Fp16, Graph, Int8, export_forms, export_onnx
from pmm_edge.export.calibration import Ranges, read_calibration, value_ranges
from pmm_edge.export.graph import layers_of, parts_of, row_preprocessing
from pmm_edge.export.quantize import calibrated_operators, hold_map, mean_average_precision, quantize
from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.retrieval.distances import cosines
from pmm_edge.spec import InputSpec, Quantization


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_fp16_is_fp16_between_the_first_convolution_and_the_output(fp16: Exported) -> None:
    model = onnx.load(fp16.path)
    types = types_of(model)
    assert (types["images"], types["embeddings"]) == (TensorProto.UINT8, TensorProto.FLOAT)
    for node in model.graph.node:
        kinds = {types[name] for name in (*node.input, *node.output)} - {TensorProto.INT64}
        if node.op_type in ("Cast", "Transpose", "Mul"):
            continue  # the preprocessing, and the casts at both ends
        before_network = "0.shift" in node.input
        assert kinds == {TensorProto.FLOAT if before_network else TensorProto.FLOAT16}, node.name
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 3


def test_fp16_is_close_and_says_how_it_was_checked(fp16: Exported, tiny_export: Exported) -> None:
    assert fp16.cosine_min >= 0.9999
    assert fp16.size < 0.51 * tiny_export.size
    assert fp16.spec.precision == "fp16"
    assert fp16.spec.precision == "fp16"
    assert pmm_edge.load(fp16.path, "cpu").spec == fp16.spec


def test_fp16_that_would_overflow_is_not_written(tiny_checkpoint: Path, people: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    weights = {**checkpoint.weights}
    weights["backbone.layer2.0.bn1.bias"] = weights["backbone.layer2.0.bn1.bias"].clone()
    weights["backbone.layer2.0.bn1.bias"][3] = 60000.0
    weights["backbone.layer2.0.bn1.weight"] = torch.full_like(weights["backbone.layer2.0.bn1.weight"], 9000.0)
    save_checkpoint(tmp_path / "large.pt", Checkpoint(checkpoint.spec, weights))
    with pytest.raises(CheckFailedError, match=r"node_conv2d_5 \(Conv\) has a value of .* float16 holds 65504"):
        export_onnx(tmp_path / "large.pt", tmp_path / "out" / "model.onnx", precision=Fp16(people))
    assert not (tmp_path / "out").exists()


def test_int8_is_close_on_crops_that_it_was_not_calibrated_on(int8: dict[str, Exported], tiny_export: Exported) -> None:
    for target, exported in int8.items():
        assert exported.cosine_mean >= 0.99, target
        assert exported.size < 0.27 * tiny_export.size
        assert exported.spec.precision == "int8"
        assert exported.spec.quantization == Quantization(target, "minmax", 48, "people")
        assert pmm_edge.load(exported.path, "cpu").spec == exported.spec


def test_weights_are_symmetric_with_a_scale_for_each_channel(int8: dict[str, Exported]) -> None:
    for target, exported in int8.items():
        graph = onnx.load(exported.path).graph
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        maker = {node.output[0]: node for node in graph.node}
        layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
        assert len(layers) == 25
        for layer in layers:
            weights, scales, zeros = (constants[name] for name in maker[layer.input[1]].input)
            assert weights.dtype == np.int8, target
            assert scales.shape == (weights.shape[0],)
            assert not zeros.any()
            assert maker[layer.input[0]].op_type == "DequantizeLinear", layer.name


def test_tensorrt_gets_signed_activations_around_zero_where_it_fuses_them(int8: dict[str, Exported]) -> None:
    graph = onnx.load(int8["tensorrt"].path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            zero = constants[node.input[2]]
            assert (zero.dtype, zero.item()) == (np.int8, 0)
    residual = [node for node in graph.node if node.op_type == "Add" and "0.shift" not in node.input]
    assert len(residual) == 9
    for node in residual:
        assert [maker[name].op_type for name in node.input] == ["Conv", "DequantizeLinear"], node.name
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert constants[node.input[2]].dtype == np.float32  # a bias that TensorRT adds in float
        if node.op_type == "DequantizeLinear":
            assert constants.get(node.input[0], np.int8(0)).dtype == np.int8
    (heads,) = (maker[name] for name in maker["embeddings"].input)
    assert [maker[name].op_type for name in heads.input] == ["Gemm", "Gemm"]


def test_cpu_gets_unsigned_activations(int8: dict[str, Exported]) -> None:
    graph = onnx.load(int8["cpu"].path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {zero.dtype for zero in zeros} == {np.dtype(np.uint8)}
    assert sum(node.op_type == "Relu" for node in graph.node) == 1  # the others are the rounding at zero


def test_onnx_runtime_computes_every_layer_of_the_cpu_graph_in_int8(int8: dict[str, Exported], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3  # it warns that what it writes is for this processor
    onnxruntime.InferenceSession(int8["cpu"].path, options, providers=["CPUExecutionProvider"])
    run = Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)
    assert (run["QLinearConv"], run["QGemm"], run["QLinearAdd"]) == (23, 2, 9)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm"} & run.keys()
    assert run["QuantizeLinear"] + run["DequantizeLinear"] == 3  # the image, and around the mean of the last map


def test_the_cpu_graph_prepares_whole_rows_to_the_same_numbers(int8: dict[str, Exported], tiny_onnx: Path) -> None:
    crops = np.random.default_rng(5).integers(0, 256, (3, 96, 64, 3), dtype=np.uint8)
    before = parts_of(onnx.load(tiny_onnx)).before
    assert before
    by_pixel, by_row = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for model in (before, row_preprocessing(before, InputSpec(96, 64)))
    )
    np.testing.assert_array_equal(by_row.run(None, {"images": crops})[0], by_pixel.run(None, {"images": crops})[0])
    assert "rows" in {node.name for node in onnx.load(int8["cpu"].path).graph.node}


def test_a_lower_precision_with_every_graph_option(tiny_checkpoint: Path, people: Path, tmp_path: Path) -> None:
    crops = np.random.default_rng(3).integers(0, 256, (3, 96, 64, 3), dtype=np.uint8)
    for opset, precision in ((17, Fp16()), (20, Int8(people, "cpu", "minmax"))):
        graph = Graph(opset=opset, normalize_output=True, static_batch=2)
        exported = export_onnx(tiny_checkpoint, tmp_path / f"{opset}.onnx", "raw", graph, precision)
        embeddings = pmm_edge.load(exported.path, "cpu").embed(crops)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
        model = onnx.load(exported.path)
        assert model.opset_import[0].version == opset
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_fp16_that_was_not_checked_on_images_is_warned_of(tiny_checkpoint: Path, tmp_path: Path) -> None:
    exported = export_onnx(tiny_checkpoint, tmp_path / "unchecked.onnx", precision=Fp16())
    (warning,) = exported.warnings
    assert "nothing was checked on images" in warning


def test_every_precision_names_its_opset_once(tiny_onnx: Path, fp16: Exported, int8: dict[str, Exported]) -> None:
    for path in (tiny_onnx, fp16.path, *(exported.path for exported in int8.values())):
        imported = [(entry.domain, entry.version) for entry in onnx.load(path).opset_import]
        assert imported == [("", 18)], path


def test_forms_share_one_network_that_was_calibrated_once(
    tiny_checkpoint: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = []

    def counted(*arguments: object, **options: object) -> Ranges:
        calibrated.append(arguments)
        return value_ranges(*arguments, **options)

    monkeypatch.setattr("pmm_edge.export.quantize.value_ranges", counted)
    crops = np.random.default_rng(3).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)
    for number, forms in enumerate((("uint8", "raw", "normalized"), ("normalized", "uint8"))):
        outs = {form: tmp_path / f"{number}-{form}.onnx" for form in forms}
        graph = Graph(normalize_output=bool(number))
        exports = export_forms(tiny_checkpoint, outs, graph, Int8(people, "cpu", "minmax"))
        assert len(calibrated) == number + 1
        assert [item.spec.input.form for item in exports] == list(forms)
        assert exports[0].spec.quantization.target == "cpu"
        for item in exports:
            assert pmm_edge.load(item.path, "cpu").spec == replace(exports[0].spec, input=item.spec.input)
        first, *others = (int8_weights(item.path) for item in exports)
        assert len(first) == 25
        assert all(other == first for other in others)
        base, *rest = (pmm_edge.load(item.path, "cpu").embed(crops) for item in exports)
        for embeddings in rest:
            assert cosines(base, embeddings).min() > 0.9999  # what rounds to the next of 256 steps
    kinds = [node.op_type for node in onnx.load(outs["uint8"]).graph.node]
    assert kinds[:3] == ["Reshape", "Cast", "Mul"]  # whole rows, as when it is exported alone


def int8_weights(path: Path) -> dict[str, bytes]:
    tensors = onnx.load(path).graph.initializer
    return {tensor.name: tensor.raw_data for tensor in tensors if tensor.name.endswith(".weight_quantized")}


def test_the_method_that_loses_least_is_taken(
    int8: dict[str, Exported], tiny_checkpoint: Path, people: Path, tmp_path: Path
) -> None:
    asked = int8["cpu"]
    assert asked.spec.quantization.method == "minmax"
    best = export_onnx(tiny_checkpoint, tmp_path / "best.onnx", precision=Int8(people, "cpu"))
    assert best.cosine_mean is not None and asked.cosine_mean is not None
    assert best.cosine_mean >= asked.cosine_mean - 1e-4


def test_ranges_are_those_of_the_values(tiny_onnx: Path, people: Path) -> None:
    network = parts_of(onnx.load(tiny_onnx)).network
    calibration = read_calibration(people, InputSpec(96, 64))
    ranges = value_ranges(network, calibration.crops, InputSpec(96, 64))
    embeddings = pmm_edge.load(tiny_onnx, "cpu").embed(calibration.crops)
    assert ranges["embeddings"] == pytest.approx((embeddings.min(), embeddings.max()), rel=1e-4)
    assert min(ranges["relu"]) == 0


def test_a_sensitivity_search_keeps_the_layers_that_lose_most_in_float(
    tiny_checkpoint: Path,
    tiny_onnx: Path,
    int8: dict[str, Exported],
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mAP of so few images does not see INT8: the mean cosine to float32 stands for it."""
    crops = read_calibration(people, InputSpec(96, 64)).judging
    float32 = pmm_edge.load(tiny_onnx, "cpu").embed(crops)

    def closeness(embedder: pmm_edge.runtime.Embedder, *_: object) -> float:
        return float(cosines(float32, embedder.embed(crops)).mean())

    monkeypatch.setattr("pmm_edge.export.quantize.mean_average_precision", closeness)
    plain = 100 * (1 - closeness(pmm_edge.load(int8["tensorrt"].path, "cpu")))
    asked = Int8(people, "tensorrt", "minmax", max_map_drop=plain / 2)
    exported = export_onnx(tiny_checkpoint, tmp_path / "model.onnx", precision=asked)
    assert 100 * (1 - closeness(pmm_edge.load(exported.path, "cpu"))) <= plain / 2
    losses = [layer.loss for layer in exported.layers]
    assert len(losses) == 25
    assert losses == sorted(losses, reverse=True)
    assert sum(layer.cost for layer in exported.layers) == pytest.approx(1)
    kept = [layer.layer for layer in exported.layers if layer.in_float]
    assert kept == [layer.layer for layer in exported.layers[: len(kept)]]
    assert 1 <= len(kept) < 25
    assert exported.spec.quantization.float_layers == tuple(kept)
    floats = {tensor.name for tensor in onnx.load(exported.path).graph.initializer if len(tensor.dims) > 1}
    in_float = {name.removesuffix(".weight") for name in floats if name.endswith(".weight")}
    assert {name.partition(".")[2] for name in in_float} == set(kept)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_layers_are_quantised_as_asked(target: str, tiny_onnx: Path, people: Path) -> None:
    network = parts_of(onnx.load(tiny_onnx)).network
    crops = read_calibration(people, InputSpec(96, 64)).crops[:8]
    ranges = value_ranges(
        network, crops, InputSpec(96, 64), "minmax", target == "tensorrt", calibrated_operators(target)
    )
    nodes = list(layers_of(network))

    def in_int8(model: onnx.ModelProto) -> list[str]:
        maker = {name: node for node in model.graph.node for name in node.output}
        layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
        return [node.name for node in layers if node.input[1] in maker]

    assert in_int8(quantize(network, ranges, target)) == nodes
    assert in_int8(quantize(network, ranges, target, in_float=nodes[3:5])) == nodes[:3] + nodes[5:]
    assert in_int8(quantize(network, ranges, target, only=nodes[3:4])) == nodes[3:4]
    in_float = quantize(network, ranges, target, in_float=nodes)
    assert [node.op_type for node in in_float.graph.node] == [node.op_type for node in network.graph.node]


def test_what_follows_a_layer_in_float_is_in_float_up_to_the_next_layer(tiny_onnx: Path, people: Path) -> None:
    network = parts_of(onnx.load(tiny_onnx)).network
    crops = read_calibration(people, InputSpec(96, 64)).crops[:8]
    ranges = value_ranges(network, crops, InputSpec(96, 64), "minmax", False, calibrated_operators("cpu"))

    def additions_in_float(in_float: list[str]) -> list[bool]:
        graph = quantize(network, ranges, "cpu", in_float).graph
        maker = {name: node.op_type for node in graph.node for name in node.output}
        adds = [node for node in graph.node if node.op_type == "Add"]
        return [not all(maker[name] == "DequantizeLinear" for name in add.input) for add in adds]

    convolutions = [node.name for node in network.graph.node if node.op_type == "Conv"]
    assert not any(additions_in_float([]))
    second_of_its_block = convolutions[2]
    # Its own addition; the next one, whose skipping branch comes from it, has a convolution in INT8.
    assert additions_in_float([second_of_its_block])[:2] == [True, False]


def test_a_search_that_is_not_needed_says_what_int8_loses(tiny_checkpoint: Path, people: Path, tmp_path: Path) -> None:
    precision = Int8(people, "cpu", "minmax", max_map_drop=100)
    exported = export_onnx(tiny_checkpoint, tmp_path / "model.onnx", precision=precision)
    assert exported.layers == []  # all of INT8 holds: nothing had to be searched
    assert exported.spec.quantization.float_layers == ()


def test_the_search_ends_at_the_fewest_layers(tiny_onnx: Path) -> None:
    network = parts_of(onnx.load(tiny_onnx)).network
    names = dict(list(layers_of(network).items())[:6])
    damage = dict(zip(names, (0.1, 0.5, 0.0, 0.3, 0.2, 0.05), strict=True))
    evaluations = []

    def stand_in(damaged: float) -> onnx.ModelProto:
        return onnx.ModelProto(producer_version=str(damaged))

    def mean_ap(model: onnx.ModelProto) -> float:
        evaluations.append(model)
        return 0.9 - 0.01 * float(model.producer_version)

    def search(max_drop: float) -> tuple[list[str], str]:
        held = hold_map(
            names,
            dict.fromkeys(names, 10),
            lambda in_float, only: stand_in(sum(damage[node] for node in only or set(names) - set(in_float))),
            lambda model: float(model.producer_version),
            mean_ap,
            stand_in(0),
            max_drop,
        )
        return [layer.layer for layer in held.layers if layer.in_float], held.outcome

    ordered = [names[node] for node in sorted(damage, key=lambda node: -damage[node])]
    assert search(0.2)[0] == ordered[:3]  # 0.1 + 0.05 are left
    assert search(0.4)[0] == ordered[:2]
    kept, outcome = search(2)
    assert kept == []
    assert outcome.startswith("mAP 90.00 to 88.85, a drop of 2 allowed, which INT8 throughout holds")
    assert outcome.endswith("in float32: none")
    with pytest.raises(CheckFailedError, match="even with 5 layers in float32"):
        search(-1)


def test_the_map_of_a_search_does_not_wait_for_junk(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    embedder = pmm_edge.load(tiny_onnx, "cpu")
    with_junk = shutil.copytree(tiny_dataset, tmp_path / "junk")
    (with_junk / "bounding_box_test" / "-1_c1s1_000000_00.jpg").write_text("whoever opens it fails")
    assert mean_average_precision(embedder, read(with_junk)) == mean_average_precision(embedder, read(tiny_dataset))


def test_bad_calibration_data(tiny_checkpoint: Path, people: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    few = write_people(tmp_path / "few", train=60)
    for data, problem in (
        (few, "has 60 training images"),
        (tmp_path / "none", "cannot be used"),
        (people / "query", "query.*layout"),
    ):
        with pytest.raises(DataError, match=problem) as raised:
            export_onnx(tiny_checkpoint, out, precision=Int8(data))
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="has 60 training images"):
        export_onnx(tiny_checkpoint, out, precision=Fp16(few))
    assert not out.parent.exists()


def test_temporary_files_that_cannot_be_written_are_no_fault_of_the_model_file(
    tiny_checkpoint: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/full")
    with pytest.raises(OutputError) as caught:
        export_onnx(tiny_checkpoint, tmp_path / "model.onnx", precision=Fp16(people))
    assert str(caught.value) == (
        "cannot write temporary files in /proc/full: No such file or directory."
        " Set TMPDIR to a folder that is writable and has space left"
    )


def test_a_broken_link_among_the_judges_is_no_calibration_image(people: Path, tmp_path: Path) -> None:
    judges, other = (shutil.copytree(people, tmp_path / name) for name in ("judges", "other"))
    image = next((judges / "bounding_box_test").iterdir())
    image.unlink()
    image.symlink_to(tmp_path / "gone.png")
    assert read_calibration(other, InputSpec(96, 64), judged_on=read(judges)).warnings == []


def test_people_of_the_test_split_are_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    same = write_people(tmp_path / "same", train=64, train_pid=101)
    exported = export_onnx(tiny_checkpoint, tmp_path / "model.onnx", precision=Fp16(same))
    assert "4 identities" in exported.warnings[0]


def test_images_that_judge_elsewhere_are_told(people: Path, tmp_path: Path) -> None:
    other = shutil.copytree(people, tmp_path / "other")
    spec, judges = InputSpec(96, 64), read(people)
    assert read_calibration(people, spec, judged_on=judges).warnings == []
    assert read_calibration(other, spec, judged_on=judges).warnings == []  # the same numbers may be other people
    for number, image in enumerate(sorted((people / "bounding_box_test").iterdir())):
        shutil.copyfile(image, other / "bounding_box_train" / f"0009_c1s1_{number:06d}_00.png")
    (warning,) = read_calibration(other, spec, judged_on=judges).warnings
    assert f"8 of the 80 calibration images are also in the query or gallery of {people}" in warning


def test_a_layout_that_must_be_named(pmm: Callable, tiny_checkpoint: Path, people: Path, tmp_path: Path) -> None:
    both = tmp_path / "CUHK03-NP"
    for crops in ("detected", "labeled"):
        shutil.copytree(people, both / crops)
    wanted = ("export", tiny_checkpoint, "--precision", "fp16", "--calibration", both, "--out", tmp_path / "model.onnx")
    ended = pmm(*wanted)
    assert ended.exit_code == 2
    assert "labeled" in ended.stderr.splitlines()[-1]
    ended = pmm(*wanted, "--layout", "cuhk03-np-labeled")
    assert ended.exit_code == 0, ended.stderr
    assert "on 72 crops of cuhk03-np-labeled" in ended.stderr


def test_the_parts_of_calibration_share_no_image(people: Path) -> None:
    calibration = read_calibration(people, InputSpec(96, 64))
    parts = (calibration.crops, calibration.choosing, calibration.judging)
    assert [len(part) for part in parts] == [48, 12, 12]
    assert len({crop.tobytes() for part in parts for crop in part}) == 72


def test_a_map_drop_that_makes_no_sense() -> None:
    with pytest.raises(PmmError, match=r"Choose such as 0\.5"):
        Int8(Path("data"), max_map_drop=-1)


def test_options_that_do_not_go_together(pmm: Callable, tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    for arguments, said in (
        (("--target", "cpu"), "--target says nothing of --precision fp32"),
        (("--layout", "msmt17"), "--layout says nothing of --precision fp32"),
        (("--precision", "fp16", "--max-map-drop", 1), "--max-map-drop says nothing of --precision fp16"),
        (("--precision", "int8"), "Add --calibration"),
        (("--opset", 16), "Choose 17 to 20"),
    ):
        ended = pmm("export", tiny_checkpoint, *arguments)
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert said in ended.stderr.strip().splitlines()[-1]


def test_the_command_names_files_by_precision(pmm: Callable, tiny_checkpoint: Path, people: Path) -> None:
    folder = tiny_checkpoint.parent / "export"
    ended = pmm("export", tiny_checkpoint, "--precision", "fp16", "--calibration", people)
    assert ended.exit_code == 0, ended.stderr
    assert "largest value" in ended.stderr
    assert (folder / "model-fp16.onnx").is_file()
    chosen = ("--precision", "int8", "--target", "cpu", "--calibration-method", "minmax", "--calibration", people)
    assert pmm("export", tiny_checkpoint, *chosen, "--input", "raw").exit_code == 0
    assert (folder / "model-raw-int8-cpu.onnx").is_file()
