"""Knowledge distillation: a small network, the student, also learns from the embeddings of a trained one, the teacher.

The teacher embeds every training image once, before the first step; after that it costs nothing. Three losses compare
the student's embeddings with these targets: distances and angles between the images of a batch (relational knowledge
distillation, Park et al., CVPR 2019), and the embeddings themselves after a projection (FitNets, Romero et al., 2015).

Where this differs from the sources:
- A target is the mean over an image and its mirror image, at the teacher's input size. It does not depend on how the
  student's copy of the image is augmented. Beyer et al. ("A good teacher is patient and consistent", CVPR 2022) show
  the same augmented crop to both, which needs a forward pass of the teacher in every step and one input size for both.
- The mean over all training images is subtracted from the targets. Distances and angles do not depend on it; without
  it, a projection to the mean alone would have a small loss, because embeddings after ReLU are not negative.
- FitNets regress a hidden layer by squared distance. Here it is the embedding, by cosine, which has no scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from pmm_edge.errors import ModelError
from pmm_edge.model import ReidNetwork, StageOutput
from pmm_edge.runs import resolve_checkpoint
from pmm_edge.runtime.model_file import parse_model, read_model
from pmm_edge.runtime.torch_backend import load_torch
from pmm_edge.spec import ModelSpec
from pmm_edge.trainer.device import World

PARTS = {"relation_distance": 75.0, "relation_angle": 150.0, "embedding": 30.0}
"""The losses of distillation and their weights (docs/student.md)."""
SUFFIXES = (".pt", ".pth", ".safetensors")
ROUNDING = 1e-6  # a squared distance below this share of the mean squared length is 0


@dataclass(frozen=True)
class Teacher:
    """A trained network in evaluation mode: normalized images (N, 3, height, width) -> embeddings (N, D) float32."""

    network: nn.Module
    spec: ModelSpec
    sha256: str  # of its checkpoint as it was trained
    path: Path  # as in the settings

    def embed(self, images: Tensor) -> Tensor:
        """Mean embedding of normalized images (N, 3, height, width) and their mirror images: (N, D) float32."""
        return (self.network(images) + self.network(images.flip(3))) / 2

    def targets(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Subtract the mean of all training images (N, D). Raises ModelError if they are not finite or all equal."""
        if not np.isfinite(embeddings).all() or (embeddings == embeddings[0]).all():
            problem = f"the embeddings of the teacher {self.path} are not finite, or the same for all training images"
            raise ModelError(problem, "Choose another teacher; pmm eval shows how good it is")
        return embeddings - embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)


def read_teacher(given: Path, world: World, device: torch.device, resume: Path | None = None) -> Teacher:
    """Load a teacher from a checkpoint, a run folder or a safetensors file; raise ModelError if it cannot be one.

    The first process reads the file and sends it to the others. `resume` is the folder of a run that learns from it.
    """

    def read() -> tuple[Path, bytes]:
        try:
            path = resolve_checkpoint(given)
        except ModelError as error:
            moved = f"If it has moved, change the setting teacher in {resume}/config.toml"
            raise ModelError(f"the teacher {error.problem}", moved if resume else error.remedy) from error
        if path.suffix not in SUFFIXES:
            remedy = "Name the checkpoint from which it was exported, or its run folder"
            raise ModelError(f"the teacher {path} is not a checkpoint", remedy)
        return path, read_model(path).content

    file = parse_model(*world.first(read))
    file.check()
    embedder = load_torch(file, str(device))
    return Teacher(embedder.network, embedder.spec, embedder.spec.checkpoint_sha256 or file.sha256, given)


class Student(nn.Module):
    """A network, and the projection of its embedding to the teacher's size, which only training needs."""

    def __init__(self, network: ReidNetwork, teacher_size: int) -> None:
        super().__init__()
        size = max(stop for _, stop in network.stages.values())
        self.network, self.projection = network, nn.Linear(size, teacher_size)

    def forward(self, *images: Any, **named: Any) -> tuple[tuple[StageOutput, ...], Tensor]:
        """Compute the outputs of the network, and the projected embeddings (N, D)."""
        outputs = self.network(*images, **named)
        return outputs, self.projection(_embedding(outputs))


def _embedding(outputs: Sequence[StageOutput]) -> Tensor:
    return torch.cat([stage.embedding for stage in outputs], dim=1)


def distillation_loss(
    outputs: Sequence[StageOutput], projected: Tensor, targets: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the three losses, and each of them by its name in `PARTS`, without weight and detached.

    `projected` and `targets`, the teacher's embeddings, are (N, D).
    """
    with torch.autocast(targets.device.type, enabled=False):
        distance, angle = relation_losses(_embedding(outputs).float(), targets)
        losses = distance, angle, embedding_loss(projected.float(), targets)
    parts = dict(zip(PARTS, losses, strict=True))
    total = torch.stack([weight * parts[name] for name, weight in PARTS.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def embedding_loss(projected: Tensor, targets: Tensor) -> Tensor:
    """Mean of 1 - cosine of projected embeddings and targets, (N, D) each (after Romero et al. 2015, section 2.2)."""
    return 1 - F.cosine_similarity(projected, targets).mean()


def relation_losses(embeddings: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Distance-wise and angle-wise loss of Park et al. 2019, sections 3.2.1 and 3.2.2.

    With h the Huber loss with threshold 1, s the student's embeddings (N, D) and t the teacher's (N, T):
    distance: mean over pairs of h(|s_i - s_j| / mean |s_i - s_j| - |t_i - t_j| / mean |t_i - t_j|)
    angle: mean over triplets of h(cos(s_i - s_j, s_k - s_j) - cos(t_i - t_j, t_k - t_j))

    Two copies of one image, in the batch because its identity has few, have equal targets and form no angle.
    """
    (ours, our_cosines, _), (theirs, their_cosines, apart) = map(_relations, (embeddings, targets))
    distance = F.smooth_l1_loss(ours, theirs, reduction="sum") / (ours.numel() - len(ours))
    triplets = apart[:, :, None] & apart[:, None, :] & ~torch.eye(len(ours), dtype=torch.bool, device=ours.device)
    angle = F.smooth_l1_loss(our_cosines, their_cosines, reduction="none").masked_fill(~triplets, 0.0).sum()
    return distance, angle / triplets.sum().clamp_min(1)


def _relations(embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relations between embeddings (N, D).

    Returns distances (N, N) divided by their mean; cosines (N, N, N) of the angle at the first between the second and
    the third; and which pairs are apart (N, N). All follow from inner products: N^3 differences are never formed.
    """
    centered = embeddings - embeddings.mean(dim=0)
    products = centered @ centered.T
    squares = products.diagonal()
    squared = squares[:, None] + squares[None, :] - 2 * products
    least = (ROUNDING * squares.mean().detach()).clamp_min(1e-12)  # keeps gradients finite
    apart = squared > least
    distances = squared.clamp_min(least).sqrt()
    # (e_i - e_j)(e_k - e_j) = e_i e_k - e_j e_i - e_j e_k + e_j e_j
    sides = products[None] - products[:, :, None] - products[:, None, :] + squares[:, None, None]
    cosines = sides / (distances[:, :, None] * distances[:, None, :])
    distances = distances.masked_fill(~apart, 0.0)
    count = len(embeddings) * (len(embeddings) - 1)
    return distances * (count / distances.sum().clamp_min(1e-12)), cosines, apart
