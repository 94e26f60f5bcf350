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


def weights(name, shape):
    """A released tensor, as golden/README.md defines it by a rule."""
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
def step(golden):
    """Embeddings of the loaded network, then one training step with the golden negatives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    noise = np.random.Generator(np.random.PCG64(7)).standard_normal((8, 3, 384, 128))
    images, pids = torch.from_numpy(noise.astype(np.float32)), torch.from_numpy(golden["labels"])
    shapes = json.loads((GOLDEN / "released_state_dict_shapes.json").read_text())
    model = pmm.build_model("pmm", num_classes=32, backbone="resnet50", mix_blocks=3)
    pmm.load_released_checkpoint(
        model, {name: torch.from_numpy(weights(name, shape)) for name, shape in shapes.items()}
    )
    with torch.inference_mode():
        embeddings = model.eval()(images)
    negatives = tuple(torch.from_numpy(golden[f"stage{stage}_negatives"]) for stage in (1, 2))
    outputs = model.train()(images, pids, negatives=negatives)
    loss, parts = pmm.pmm_loss(outputs, pids)
    loss.backward()
    torch.set_num_threads(threads)
    return embeddings, outputs, loss, parts, model


def largest_error(actual, expected):
    return float(np.abs(actual.detach().numpy() - expected).max())


def test_evaluation_embeddings(step, golden):
    embeddings, expected = step[0], golden["eval_embeddings"]
    assert embeddings.shape == (8, 1536) and embeddings.dtype == torch.float32
    assert largest_error(embeddings, expected) / np.abs(expected).max() < ACTIVATIONS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage(step, golden, stage):
    _, outputs, loss, parts, _ = step
    output = outputs[stage - 1]
    assert largest_error(output.embedding, golden[f"stage{stage}_embedding"]) < ACTIVATIONS
    assert largest_error(output.logits, golden[f"stage{stage}_logits"]) < ACTIVATIONS
    assert stage == 3 or largest_error(output.cam, golden[f"stage{stage}_gradcam"]) < CAM
    assert parts[f"triplet_{stage}"].item() == pytest.approx(float(golden[f"stage{stage}_triplet"]), abs=LOSS)
    assert parts[f"identity_{stage}"].item() == pytest.approx(float(golden[f"stage{stage}_id_loss"]), abs=LOSS)
    assert loss.item() == pytest.approx(float(golden["loss"]), abs=LOSS)


def test_gradient_of_every_parameter(step, golden):
    parameters = dict(step[-1].named_parameters())
    norms = {name[len("gradnorm/") :]: float(golden[name]) for name in golden.files if name.startswith("gradnorm/")}
    assert len(norms) == 8
    # The gradient of a bias before a batch norm is rounding only, so the tolerance is relative to the largest norm.
    tolerance = {"rel": GRADIENT, "abs": GRADIENT * max(norms.values())}
    for name, expected in norms.items():
        assert parameters[our_name(name)].grad.norm().item() == pytest.approx(expected, **tolerance)
