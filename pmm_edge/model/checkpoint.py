"""Build networks; read and write checkpoints: ours, those of the paper's authors, and torchvision weights."""

import errno
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, get_args

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from pmm_edge.errors import ModelError, PmmError, did_you_mean
from pmm_edge.files import written_whole
from pmm_edge.model.cama import CAMA
from pmm_edge.model.mixing import check_block_grid, scaled_mix_blocks
from pmm_edge.model.network import BDB, PMM, STAGE_SIZE, ReidNetwork
from pmm_edge.model.pcb import PCB, RefinedPCB
from pmm_edge.spec import Method, Mix, ModelSpec

PAPER_K = 3  # for Market-1501, on a map of 32 blocks (paper section 3.1)
MAX_STAGE_SIZE = 8192  # of an embedding: the spec of an untrusted file may name any
_FORMAT = "pmm-edge checkpoint 1"


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
    rpp: bool = False,
    embedding_size: int = STAGE_SIZE,
    pretrained: str | Path | None = None,
) -> ReidNetwork:
    """Build a network with weights drawn from torch's global generator.

    Args:
        method: `pmm`, `bdb`, `pcb`, `aos`, `cama` or `baseline`.
        num_classes: number of training identities.
        backbone: `resnet10`, `resnet18`, `resnet34`, `resnet50`, `resnet101`, `mobilenet_v3_small`,
            `mobilenet_v3_large` or `efficientnet_b0`; CAMA needs a ResNet.
        height, width: input size in pixels.
        mix: what stages II and III of PMM are trained on; ignored by the other methods.
        mix_blocks: K; None scales the 3 of 32 blocks that the paper uses for Market-1501 to the map.
        block_size: (height, width) of a block on the map, which the blocks must divide.
        rpp: whether PCB has refined part pooling; ignored by the other methods.
        embedding_size: values of the embedding of each head, twice as many in the part branch of BDB; ignored by PCB
            and CAMA, which have sizes of their own.
        pretrained: weights of the backbone: `imagenet`, a file in torchvision's layout, or None.

    Raises PmmError if an argument is wrong, ModelError if the weights do not fit.
    """
    for what, name, known in (("method", method, get_args(Method)), ("mix", mix, get_args(Mix))):
        if name not in known:
            raise PmmError(f"unknown {what} '{name}'", f"{did_you_mean(name, known)}Choose {', '.join(known)}")
    if not 1 <= embedding_size <= MAX_STAGE_SIZE:
        raise PmmError(f"embedding_size is {embedding_size}", f"Choose 1 to {MAX_STAGE_SIZE}")
    network: ReidNetwork
    if method == "cama":
        network = CAMA(num_classes, backbone)
    elif method == "pcb":
        network = (RefinedPCB if rpp else PCB)(num_classes, backbone)
    elif method != "pmm":
        network = (BDB if method == "bdb" else ReidNetwork)(num_classes, backbone, embedding_size)
    elif mix not in ("a-hard-mix", "a-cutmix", "dropblock"):  # those that select blocks of the map
        network = PMM(num_classes, backbone, mix=mix, embedding_size=embedding_size)
    else:
        blocks = check_block_grid(height, width, block_size)
        k = scaled_mix_blocks(PAPER_K, blocks) if mix_blocks is None else mix_blocks
        if not 1 <= k < blocks:
            remedy = f"Choose mix_blocks from 1 to {blocks - 1}" if blocks > 1 else "Choose smaller blocks"
            raise PmmError(f"mix_blocks is {k} of {blocks} blocks", remedy)
        network = PMM(num_classes, backbone, k, block_size, mix, embedding_size)
    if pretrained is not None:
        load_pretrained(network, backbone, pretrained)
    return network


def network_of(spec: ModelSpec) -> ReidNetwork:
    """Build the network that a spec describes, without its weights."""
    same = {name: getattr(spec, name) for name in ("num_classes", "backbone", "mix", "mix_blocks", "block_size", "rpp")}
    stages = spec.reduction.stages if spec.reduction else spec.stages
    start, stop = stages.get("I", (0, STAGE_SIZE))
    size = spec.input
    network = build_model(spec.architecture, height=size.height, width=size.width, embedding_size=stop - start, **same)
    if spec.reduction:
        network.projection = nn.Linear(spec.reduction.from_size, spec.embedding_size)
    return network


def load_pretrained(network: ReidNetwork, backbone: str, pretrained: str | Path) -> None:
    """Load the weights of the backbone in place; arguments and errors as in `build_model`."""
    content = imagenet_weights(backbone) if pretrained == "imagenet" else _read_torch_file(Path(pretrained))
    remedy = "Use weights of the torchvision network of the same name"
    if not isinstance(content, Mapping):
        raise ModelError("the file of backbone weights does not contain a state dict", remedy)
    weights = {name: tensor for name, tensor in content.items() if not str(name).startswith(("fc.", "classifier."))}
    try:
        network.backbone.load_torchvision(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).splitlines()[:2])
        raise ModelError(f"the weights do not fit the backbone: {reason}", remedy) from error


def imagenet_weights(backbone: str) -> Mapping[str, Any]:
    """ImageNet weights of torchvision (version 1, that of the paper's time), downloaded once into torch's hub cache.

    Raises PmmError if there are none for this backbone, or they cannot be downloaded.
    """
    if backbone not in torchvision.models.list_models():
        raise PmmError(f"{backbone} has no ImageNet weights", "Choose --backbone-weights none or a file of weights")
    weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a truncated file, a wrong hash: these have no common type
        raise PmmError(
            f"the ImageNet weights of {backbone} cannot be downloaded ({error})",
            f"Put {weights.url} into {torch.hub.get_dir()}/checkpoints/, or choose --backbone-weights none or FILE",
        ) from error


@dataclass
class Checkpoint:
    """A trained network."""

    spec: ModelSpec
    weights: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    """What `pmm train --resume` needs."""

    def network(self) -> ReidNetwork:
        """Build the network in evaluation mode. Raises ModelError if the weights do not fit the spec."""
        try:
            model = network_of(self.spec)
            model.load_state_dict(self.weights)
        except (RuntimeError, PmmError) as error:
            problem = f"the weights of the checkpoint do not fit its spec ({str(error).splitlines()[0]})"
            raise ModelError(problem, "The file was changed: copy it again, or train again") from error
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. Raises OutputError if the file cannot be written."""
    content = {"format": _FORMAT, **vars(checkpoint), "spec": checkpoint.spec.to_json()}
    with written_whole(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's writer reports a full disk like this
            raise OSError(errno.ENOSPC, "no space left on the disk") from error


def load_checkpoint(path: Path, file: bytes | None = None) -> Checkpoint:
    """Read a checkpoint, or the content of its file, onto the CPU; ModelError if it is missing, damaged or another."""
    content = _read_torch_file(path, file)
    if not _is_ours(content):
        remedy = "Use best.pt or last.pt of a run; pmm_edge.load_released_checkpoint reads files of the paper's authors"
        raise ModelError(f"{path} is not a '{_FORMAT}'", remedy)
    return Checkpoint(ModelSpec.from_json(content["spec"], str(path)), content["weights"], content["training"])


def load_any_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of a pmm-edge checkpoint or of the paper's authors, under our names, or raise ModelError."""
    content = _read_torch_file(path)
    return dict(content["weights"]) if _is_ours(content) else _our_weights(content, str(path))


def _is_ours(content: Any) -> bool:
    """Whether the content of a file has the form that `save_checkpoint` writes."""
    kinds = {"format": str, "spec": str, "weights": dict, "training": dict}
    whole = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    return whole and content["format"] == _FORMAT and _is_state_dict(content["weights"])


def _is_state_dict(content: Any) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


_OUR_NAMES = {
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


def load_released_checkpoint(model: PMM, path_or_state_dict: str | Path | Mapping[str, Any]) -> PMM:
    """Load weights in the layout of the authors' `.pth.tar` files into a PMM network, in place, and return it.

    They are given as a file, its content (`{"state_dict": ...}`) or the state dict itself. Names may have the prefix
    `module.` of DataParallel. Raises ModelError if the file cannot be read, or its tensors are not those of `model`.
    """
    given = path_or_state_dict
    content = given if isinstance(given, Mapping) else _read_torch_file(Path(given))
    try:
        model.load_state_dict(_our_weights(content, "the argument" if content is given else str(given)))
    except RuntimeError as error:
        raise ModelError(
            f"the released checkpoint does not fit this network: {str(error).splitlines()[1].strip()}",
            "Build it with backbone resnet50 and the checkpoint's num_classes",
        ) from error
    return model


def our_name(released_name: str) -> str:
    """The name in this package of a tensor of a released checkpoint. Raises ModelError if there is none."""
    name = released_name.removeprefix("module.")
    for theirs, ours in _OUR_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise ModelError(f"{released_name} is not a tensor of a released checkpoint", "Use a .pth.tar file of the authors")


def _our_weights(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors of a released checkpoint or its state dict under our names."""
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not _is_state_dict(tensors):
        raise ModelError(f"{source} does not contain a state dict", "Use a checkpoint of pmm train or of the authors")
    weights = {our_name(name): tensor for name, tensor in tensors.items()}
    if (convolution := weights.get("stage1.linear.weight")) is not None:
        weights["stage1.linear.weight"] = convolution.flatten(1)  # a 1x1 convolution is a linear layer
    return weights


def _read_torch_file(path: Path, content: bytes | None = None) -> Any:
    """Read a file of `torch.save`, or its content, as data (tensors and plain values); no code is executed."""
    if content is None and not path.is_file():
        raise ModelError(f"{path} does not exist", "Name a checkpoint; pmm train writes them to runs/*/best.pt")
    # Numpy scalars, in which research code often saves figures, are plain data but not on torch's list of safe types.
    scalar, kinds = np.float64(0).__reduce__()[0], (np.float32, np.float64, np.int32, np.int64)
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")]  # as numpy 2 and 1 write it
    try:
        with path.open("rb") if content is None else io.BytesIO(content) as file:
            # torch stores a CRC-32 of each tensor, and of all else, but does not compare them.
            if zipfile.is_zipfile(file):
                archive = zipfile.ZipFile(file)
                # Nor does it read an entry that an attribute, which no checksum covers, declares a folder.
                if damaged := archive.testzip() or any(entry.external_attr & 16 for entry in archive.infolist()):
                    raise zipfile.BadZipFile(damaged)
            file.seek(0)
            with torch.serialization.safe_globals([*names, np.dtype, *(type(np.dtype(kind)) for kind in kinds)]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # those of the readers have no common type
        raise ModelError(
            f"{path} cannot be read as a checkpoint: it is damaged, not a file of torch, or contains more than data",
            "Train again, or copy the file again",
        ) from error
