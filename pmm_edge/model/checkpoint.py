"""Files of `torch.save` from anybody, read as data."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.files import written_whole
from pmm_edge.model.backbone import imagenet_weights, load_backbone_weights
from pmm_edge.model.baselines import BDB, Baseline
from pmm_edge.model.mixing import check_block_grid, scaled_mix_blocks
from pmm_edge.model.network import PMM, ReidNetwork
from pmm_edge.spec import Method, Mix, ModelSpec

# Research code often saves its best figure as a numpy scalar: plain data, but not on torch's own list.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # as numpy 1 wrote it
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64")),
]


def read_torch_file(path: Path) -> Any:
    """Read a file of `torch.save` as data: tensors and plain values, no code is run.

    Raises:
        ModelError: the file is missing, truncated, or holds anything else.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "Name a checkpoint; pmm train writes them to runs/*/best.pt")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    # What torch's reader raises on bytes that are no checkpoint has nothing in common but this.
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as a checkpoint: it is truncated, no file of torch, or holds more than data",
            "Train again, or fetch the file again",
        ) from error


BLOCKWISE = ("a-hard-mix", "a-cutmix", "dropblock")
"""Mixes that choose blocks of the map."""
PAPER_K = 3
"""K of the paper for Market-1501, on a map of 32 blocks."""


def build_model(
    method: Method = "pmm",
    *,
    num_classes: int,
    backbone: str = "resnet50",
    height: int = 384,
    width: int = 128,
    mix: Mix = "a-hard-mix",
    mix_blocks: int | None = None,
    block_size: tuple[int, int] = (3, 2),
    pretrained: str | Path | None = None,
) -> ReidNetwork:
    """Build a network, its weights drawn from torch's global generator.

    Args:
        method: `pmm`, `bdb` or `baseline`.
        num_classes: identities of the training set.
        height, width: of the input in pixels; for PMM the blocks must divide its map.
        mix: what stages II and III of PMM are trained on; the others have none.
        mix_blocks: K; None scales the paper's 3 of 32 blocks (Market-1501) to the map.
        pretrained: of the backbone: `imagenet`, a file in torchvision's layout, or None.

    Raises:
        PmmError: an unknown name, an input whose map the blocks do not divide, a K that leaves no block, or weights
            that cannot be had.
    """
    network = _drawn(method, num_classes, backbone, height, width, mix, mix_blocks, block_size)
    if pretrained is not None:
        load_pretrained(network, backbone, pretrained)
    return network


def load_pretrained(network: ReidNetwork, backbone: str, pretrained: str | Path) -> None:
    """Load the weights of a network's backbone in place: `imagenet`, or a file in torchvision's layout.

    Raises:
        PmmError: they cannot be had, or are of another backbone.
    """
    weights = imagenet_weights(backbone) if pretrained == "imagenet" else read_torch_file(Path(pretrained))
    load_backbone_weights(network.backbone, weights)


def _drawn(
    method: Method,
    num_classes: int,
    backbone: str,
    height: int,
    width: int,
    mix: Mix,
    mix_blocks: int | None,
    block_size: tuple[int, int],
) -> ReidNetwork:
    if method not in get_args(Method):
        raise PmmError(f"method '{method}' is unknown", f"Choose {', '.join(get_args(Method))}")
    if mix not in get_args(Mix):
        raise PmmError(f"mix '{mix}' is unknown", f"Choose {', '.join(get_args(Mix))}")
    if method == "baseline":
        return Baseline(num_classes, backbone)
    if method == "bdb":
        return BDB(num_classes, backbone)
    if mix not in BLOCKWISE:
        return PMM(num_classes, backbone, mix=mix)
    blocks = check_block_grid(height, width, block_size)
    if mix_blocks is None:
        mix_blocks = scaled_mix_blocks(PAPER_K, blocks)
    if not 1 <= mix_blocks < blocks:
        raise PmmError(
            f"{mix_blocks} of {blocks} blocks cannot be replaced", f"Choose mix blocks from 1 to {blocks - 1}"
        )
    return PMM(num_classes, backbone, mix_blocks, block_size, mix)


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


_FORMAT = 1
_FORMAT_PREFIX = "pmm-edge checkpoint "


@dataclass
class Checkpoint:
    """A network as trained, and in `training` what it takes to go on."""

    spec: ModelSpec
    weights: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)

    def network(self) -> ReidNetwork:
        """Build the network and load the weights; evaluation mode.

        Raises:
            ModelError: the weights are not those of the network that the spec describes.
        """
        try:
            model = network_of(self.spec)
            model.load_state_dict(self.weights)
        except (RuntimeError, PmmError) as error:
            raise ModelError(
                f"the checkpoint's weights are not those of its spec ({str(error).splitlines()[0]})",
                "It was changed; train again, or fetch the file again",
            ) from error
        return model.eval()


def network_of(spec: ModelSpec) -> ReidNetwork:
    """The network that a spec describes, its weights not yet loaded."""
    return build_model(
        spec.architecture,
        num_classes=spec.num_classes,
        backbone=spec.backbone,
        height=spec.input.height,
        width=spec.input.width,
        mix=spec.mix,
        mix_blocks=spec.mix_blocks,
        block_size=spec.block_size,
    )


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint whole, or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {
        "format": f"{_FORMAT_PREFIX}{_FORMAT}",
        "spec": checkpoint.spec.to_json(),
        "weights": checkpoint.weights,
        "training": checkpoint.training,
    }
    with written_whole(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch's writer says that the disk is full
            raise OSError(errno.ENOSPC, "no space left on the disk") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        ModelError: the file is missing, truncated, no checkpoint of ours, or of another version of pmm-edge.
    """
    content = read_torch_file(path)
    if (found := _format_of(content)) not in (None, _FORMAT):
        raise ModelError(
            f"{path} has checkpoint format {found}; this version of pmm-edge reads format {_FORMAT}",
            "Load it with the version that wrote it, or train again",
        )
    if not _is_ours(content):
        raise ModelError(
            f"{path} is not a pmm-edge checkpoint",
            "Give best.pt or last.pt of a run folder; a file of the paper's authors loads with"
            " pmm_edge.load_released_checkpoint",
        )
    return Checkpoint(ModelSpec.from_json(content["spec"], str(path)), content["weights"], content["training"])


def _is_ours(content: Any) -> bool:
    if _format_of(content) != _FORMAT:
        return False
    spec, weights, training = (content.get(part) for part in ("spec", "weights", "training"))
    return isinstance(spec, str) and _is_state_dict(weights) and isinstance(training, dict)


def _format_of(content: Any) -> int | None:
    """The number of a checkpoint's format; None where it is none of ours."""
    named = content.get("format") if isinstance(content, dict) else None
    number = named.removeprefix(_FORMAT_PREFIX) if isinstance(named, str) and named.startswith(_FORMAT_PREFIX) else ""
    return int(number) if number.isascii() and number.isdecimal() else None


def _is_state_dict(weights: Any) -> bool:
    return isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    )


def load_released_checkpoint(model: PMM, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> PMM:
    """Load the authors' `.pth.tar` layout into a ResNet-50 PMM with as many classes.

    Args:
        model: changed in place, and returned.
        path_or_state_dict: a file, or its `state_dict`; names may carry DataParallel's `module.`.

    Raises:
        ModelError: the file cannot be read, or its tensors are not those of this network.
    """
    if isinstance(path_or_state_dict, Mapping):
        return load_released(model, path_or_state_dict)
    path = Path(path_or_state_dict)
    return load_released(model, released_tensors(read_torch_file(path), path))


def any_weights(path: Path) -> dict[str, Tensor]:
    """The weights, under our names, of a checkpoint of ours or of the paper's authors.

    Raises:
        ModelError: the file is neither.
    """
    content = read_torch_file(path)
    if _is_ours(content):
        weights: dict[str, Tensor] = content["weights"]
        return weights
    return translated(released_tensors(content, path))
