"""Checkpoints of the paper's authors: their names for the parts of the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pmm_edge.errors import ModelError
from pmm_edge.model.network import PMM

_OURS = {
    "backbone.0.": "backbone.conv1.",
    "backbone.1.": "backbone.bn1.",
    "backbone.4.": "backbone.layer1.",
    "backbone.5.": "backbone.layer2.",
    "backbone.6.": "backbone.layer3.",
    "res_part.": "backbone.layer4.",
    "res_part2.": "bottleneck.",
    "global_reduction.0.": "stage1.linear.",
    "global_reduction.1.": "stage1.bn.",
    "global_softmax.": "stage1.classifier.",
    "reduction1.0.": "stage2.linear.",
    "reduction1.1.": "stage2.bn.",
    "softmax1.": "stage2.classifier.",
    "reduction2.0.": "stage3.linear.",
    "reduction2.1.": "stage3.bn.",
    "softmax2.": "stage3.classifier.",
}


def our_name(released_name: str) -> str:
    """The name here of a tensor of a released checkpoint.

    Raises:
        ModelError: no released checkpoint has this name.
    """
    name = released_name.removeprefix("module.")
    for theirs, ours in _OURS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise ModelError(
        f"'{released_name}' is no tensor of a released PMM checkpoint", "Give one of the authors' .pth.tar"
    )


def released_tensors(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The state dict in a released file's content.

    Raises:
        ModelError: there is none.
    """
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise ModelError(f"{path} holds no state dict", "Give a pmm-edge checkpoint or one of the authors' .pth.tar")
    return tensors


def translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released tensors under our names; stage I's 1×1 convolution as the linear layer that it is.

    Raises:
        ModelError: a name is none of a released checkpoint.
    """
    weights = {our_name(name): tensor for name, tensor in tensors.items()}
    if (convolution := weights.get("stage1.linear.weight")) is not None:
        weights["stage1.linear.weight"] = convolution.flatten(1)
    return weights


def load_released(model: PMM, tensors: Mapping[str, Tensor]) -> PMM:
    """Load a released state dict into a ResNet-50 PMM with as many classes, in place.

    Raises:
        ModelError: its tensors are not those of this network.
    """
    weights = translated(tensors)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ModelError(
            f"the released checkpoint does not fit this network: {first}",
            f"Build it with backbone resnet50 and num_classes={_classes(weights)}",
        ) from error
    return model


def _classes(weights: Mapping[str, Tensor]) -> int | str:
    classifier = weights.get("stage1.classifier.weight")
    return "its own" if classifier is None else classifier.shape[0]
