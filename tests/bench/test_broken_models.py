"""Deliberately broken models are caught, each with the sentence that says what is wrong; good ones pass."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import broken
import numpy as np
import pytest
import torch
from torch import nn

from pmm_edge.bench import BenchReport, ModelReport, Options, bench
from pmm_edge.export import export_onnx
from pmm_edge.images import read_crop
from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.runtime.torch_backend import Preprocess

Judged = dict[str, ModelReport]

OPTIONS = Options(batches=(1, 4), device="cpu", speed=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells the images apart, for its batch normalisations have seen them.

    Embeddings of an untrained one all point one way, whatever is done to it.
    """
    tiny = load_checkpoint(tiny_checkpoint)
    network = tiny.network().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.train()
            module.momentum = 0.5
    images = torch.tensor(crops_of(tiny_dataset / "bounding_box_train"))
    with torch.no_grad():
        network(Preprocess(replace(tiny.spec.input, form="uint8"))(images))
    path = tmp_path_factory.mktemp("sharp") / "best.pt"
    save_checkpoint(path, Checkpoint(tiny.spec, network.state_dict()))
    return path


@pytest.fixture(scope="module")
def good(checkpoint: Path) -> Path:
    """Its export in FP32."""
    return export_onnx(checkpoint, checkpoint.with_name("model.onnx")).path


def crops_of(folder: Path) -> np.ndarray:
    return np.stack([read_crop(path, 96, 64) for path in sorted(folder.iterdir())])


def grey_noise() -> np.ndarray:
    return np.random.default_rng(0).normal(128, 4, (8, 96, 64, 3)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def judged(checkpoint: Path, good: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """All models in one bench, by name."""
    folder = tmp_path_factory.mktemp("models")
    test_crops = np.concatenate([crops_of(tiny_dataset / split) for split in ("query", "bounding_box_test")])
    darkest, next_to_it = np.sort(test_crops.mean(axis=(1, 2, 3)))[:2]
    crops = crops_of(tiny_dataset / "bounding_box_train")
    surgery = {
        "sees_bgr": broken.sees_bgr,
        "normalizes_twice": broken.normalizes_twice,
        "does_not_normalize": broken.does_not_normalize,
        "swaps_stages": broken.swaps_stages,
        "sees_its_batch": broken.sees_its_batch,
        "gives_nan": broken.gives_nan_for((darkest + next_to_it) / 2),
        "gives_one_embedding": broken.gives_one_embedding,
        "is_stretched": broken.is_stretched,
    }
    models = [broken.altered(good, folder / f"{name}.onnx", alter) for name, alter in surgery.items()]
    models += [
        good,
        broken.fp16(good, folder / "fp16.onnx"),
        broken.int8(good, folder / "int8_cpu.onnx", "cpu", crops),
        broken.int8(good, folder / "int8_tensorrt.onnx", "tensorrt", crops),
        broken.int8(good, folder / "int8_of_noise.onnx", "tensorrt", grey_noise()),
    ]
    report = bench(models, checkpoint, tiny_dataset, OPTIONS)
    assert report.complete
    return {Path(model.path).stem: model for model in report.models}


@pytest.mark.parametrize("name", ["model", "fp16", "int8_cpu", "int8_tensorrt"])
def test_a_good_model_passes(name: str, judged: Judged) -> None:
    model = judged[name]
    assert model.failures == []
    assert model.likely_cause is None
    assert {invariant.name for invariant in model.invariants} == {
        "finite",
        "distinct",
        "repeatable",
        "equal rows",
        "batch size",
        "neighbours",
    }
    assert all(invariant.held for invariant in model.invariants)
    assert model.precision == name.split("_")[0].replace("model", "fp32")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("sees_bgr", "red and blue are swapped: it sees BGR"),
        ("normalizes_twice", "normalisation is done twice"),
        ("does_not_normalize", "normalisation is missing: it sees values of 0..1"),
        ("swaps_stages", "stages of the embedding are swapped: III where II belongs, II where III belongs"),
    ],
)
def test_the_mistake_is_named(name: str, cause: str, judged: Judged) -> None:
    model = judged[name]
    assert model.parity is not None
    worst = model.parity.whole
    assert model.failures[0].startswith(f"cosine {worst.cosine_min:.6f} is ")
    assert f"below the least allowed 0.9999, on {worst.worst_image}" in model.failures[0]
    assert model.likely_cause == cause


def test_only_the_swapped_stages_are_far(judged: Judged) -> None:
    parity = judged["swaps_stages"].parity
    assert parity is not None
    assert parity.stages["I"].cosine_min > 0.9999
    assert max(parity.stages[name].cosine_mean for name in ("II", "III")) < 0.9


def test_nan_for_one_image_names_it(judged: Judged, tiny_dataset: Path) -> None:
    model = judged["gives_nan"]
    (fault,) = [one for one in model.invariants if not one.held]
    assert fault.name == "finite"
    assert fault.detail.startswith(f"NaN or infinity for 1 of 24 images, first for {tiny_dataset}")
    assert model.failures[0] == f"breaks the invariant 'finite': {fault.detail}"
    assert model.retrieval is None


def test_an_image_must_not_see_its_neighbours(judged: Judged) -> None:
    model = judged["sees_its_batch"]
    assert model.parity is not None
    assert {one.name for one in model.invariants if not one.held} == {"neighbours", "batch size"}
    assert all("0.0001 is allowed" in failure for failure in model.failures if "invariant" in failure)
    assert model.likely_cause is None


def test_one_embedding_for_all_images(judged: Judged) -> None:
    model = judged["gives_one_embedding"]
    assert model.failures[0] == "breaks the invariant 'distinct': one and the same embedding for all 24 images"
    assert model.likely_cause is None


def test_a_length_that_cosine_does_not_see(judged: Judged) -> None:
    (failure,) = judged["is_stretched"].failures
    assert "is 0.1 times as long as the reference's (all of them 0.1 to 0.1), 0.999 to 1.001 are allowed" in failure


def test_int8_that_was_calibrated_on_noise(judged: Judged) -> None:
    failures = judged["int8_of_noise"].failures
    assert any("below the least allowed 0.9" in failure for failure in failures)


def test_an_overflow_of_fp16(good: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    large = broken.with_large_values(good, tmp_path / "large.onnx")
    half = broken.overflowing_fp16(good, large, tmp_path / "half.onnx")
    report = explained(half, large, tiny_dataset)
    (model,) = report.models
    assert "NaN or infinity for 4 of 4 images" in model.failures[0]
    assert model.likely_cause == "values are larger than float16 holds (65504)"
    assert model.departure is not None
    assert "backbone.layer3.0.conv1" in model.departure.words
    assert "and float16 holds 65504" in model.departure.words


def test_the_layer_that_departs_is_found(good: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    wrong = broken.altered(good, tmp_path / "wrong.onnx", broken.changes_a_layer)
    renamed = broken.renamed(wrong, tmp_path / "renamed.onnx")
    for model in (wrong, renamed):
        departure = explained(model, good, tiny_dataset).models[0].departure
        assert departure is not None
        assert departure.operator == "Conv"
        assert departure.cosine < 0.99
        assert departure.before > 0.9999
        assert departure.words.startswith("departs at Conv 'backbone.layer2.1.conv1' (output cosine ")
        assert "its weights are others" in departure.words


def test_the_range_that_was_calibrated_wrong_is_found(good: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    model = broken.int8(good, tmp_path / "int8.onnx", "tensorrt", grey_noise())
    departure = explained(model, good, tiny_dataset).models[0].departure
    assert departure is not None
    assert departure.operator == "DequantizeLinear"
    assert "calibrate with real crops" in departure.words


def explained(model: Path, reference: Path, data: Path) -> BenchReport:
    return bench([model], reference, data, Options(batches=(1,), device="cpu", speed=False, limit=4, explain=True))
