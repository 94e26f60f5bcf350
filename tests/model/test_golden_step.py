"""One training step and one evaluation forward against golden figures of the authors' released code."""

import json
import zlib
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

import pmm_edge as pmm
from pmm_edge.model.checkpoint import our_name

GOLDEN = Path(__file__).parent.parent / "golden"

# The tolerances of golden/README.md hold if float32 sums are added in the order of the golden figures: with the AVX-512
# kernels of oneDNN on two threads. With other kernels these eight noise images give rounding errors of 2e-3.
SAME_KERNELS = torch.backends.cpu.get_cpu_capability() == "AVX512"
ACTIVATIONS, CAM, LOSS, GRADIENT = (3e-5, 2e-6, 5e-6, 1e-6) if SAME_KERNELS else (2e-2, 1e-3, 1e-3, 1e-2)


def released_state_dict() -> dict[str, torch.Tensor]:
    """The weights that golden/README.md defines by a rule, with their released names."""
    shapes = json.loads((GOLDEN / "released_state_dict_shapes.json").read_text())
    return {name: torch.from_numpy(_tensor(name, shape)) for name, shape in shapes.items()}


def _tensor(name: str, shape: list[int]) -> np.ndarray:
    seed = zlib.crc32(f"public:{name}".encode())
    z = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(z)
    if len(shape) == 1:
        return (1 + 0.1 * z) if name.endswith("weight") else 0.1 * z
    # The Python float keeps the product in float32, rounded once. One unit in the last place of the weights moves the
    # embeddings by 5e-4, because batch norm divides by the small variance of eight noise images.
    return z * sqrt(2 / prod(shape[1:]))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "pmm_step.npz")


@pytest.fixture(scope="module")
def images():
    noise = np.random.Generator(np.random.PCG64(7)).standard_normal((8, 3, 384, 128))
    return torch.from_numpy(noise.astype(np.float32))


@pytest.fixture(scope="module")
def step(golden, images):
    """Embeddings of the loaded network, then one training step with the golden negatives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    model = pmm.build_model("pmm", num_classes=32, backbone="resnet50", mix_blocks=3)
    pmm.load_released_checkpoint(model, released_state_dict())
    with torch.inference_mode():
        embeddings = model.eval()(images)
    pids = torch.from_numpy(golden["labels"])
    negatives = tuple(torch.from_numpy(golden[f"stage{stage}_negatives"]) for stage in (1, 2))
    outputs = model.train()(images, pids, negatives=negatives)
    loss, parts = pmm.pmm_loss(outputs, pids)
    loss.backward()
    torch.set_num_threads(threads)
    return embeddings, outputs, loss, parts, model


def largest_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual.detach().numpy() - expected).max())


def test_evaluation_embeddings(step, golden):
    embeddings, expected = step[0], golden["eval_embeddings"]
    assert embeddings.shape == (8, 1536) and embeddings.dtype == torch.float32
    assert largest_error(embeddings, expected) / np.abs(expected).max() < ACTIVATIONS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_outputs(step, golden, stage):
    output = step[1][stage - 1]
    assert largest_error(output.embedding, golden[f"stage{stage}_embedding"]) < ACTIVATIONS
    assert largest_error(output.logits, golden[f"stage{stage}_logits"]) < ACTIVATIONS


@pytest.mark.parametrize("stage", [1, 2])
def test_grad_cam(step, golden, stage):
    assert largest_error(step[1][stage - 1].cam, golden[f"stage{stage}_gradcam"]) < CAM


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses(step, golden, stage):
    _, _, loss, parts, _ = step
    assert parts[f"triplet_{stage}"].item() == pytest.approx(float(golden[f"stage{stage}_triplet"]), abs=LOSS)
    assert parts[f"identity_{stage}"].item() == pytest.approx(float(golden[f"stage{stage}_id_loss"]), abs=LOSS)
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=LOSS)


def test_gradient_of_every_parameter(step, golden):
    parameters = dict(step[-1].named_parameters())
    names = [name.removeprefix("gradnorm/") for name in golden.files if name.startswith("gradnorm/")]
    assert {our_name(name) for name in names} <= parameters.keys()
    assert len(names) == 8
    largest = max(float(golden[f"gradnorm/{name}"]) for name in names)
    for name in names:
        expected = float(golden[f"gradnorm/{name}"])
        # The gradient of a bias before a batch norm is rounding only, so the tolerance is relative to the largest norm.
        assert parameters[our_name(name)].grad.norm().item() == pytest.approx(
            expected, rel=GRADIENT, abs=GRADIENT * largest
        )
