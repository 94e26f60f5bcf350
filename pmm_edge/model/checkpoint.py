"""Checkpoint files: ours, a network's weights and its spec in one; and the authors'. Read as data, never as code."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.files import written_whole
from pmm_edge.model.build import build_model
from pmm_edge.model.network import PMM, ReidNetwork
from pmm_edge.model.released import load_released, released_tensors, translated
from pmm_edge.model.torch_file import read_torch_file
from pmm_edge.spec import ModelSpec, other_version

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
        raise other_version(str(path), found, _FORMAT)
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
