"""One training step: the shards of its batch, the learning rate, augmentation, forward, losses, backward, update."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pmm_edge.data.augment import ERASE_PROBABILITY, augment
from pmm_edge.data.dataset import Split
from pmm_edge.data.loader import Crops, identity_batches
from pmm_edge.errors import PmmError
from pmm_edge.machine import threads
from pmm_edge.model import PMM, ReidNetwork, StageOutput
from pmm_edge.model.aos import Occlusion, window_side
from pmm_edge.model.cama import CAMA, cama_loss
from pmm_edge.model.mixing import MixedLabels, attentive_cutmix, cutmix
from pmm_edge.model.pcb import PCB, RefinedPCB, pcb_loss, refinement_epochs
from pmm_edge.retrieval.metrics import DISTRACTOR_PID
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import World
from pmm_edge.trainer.logging import Meter
from pmm_edge.trainer.teacher import Student, distillation_loss

Indices = NDArray[np.int64]
PAPER_EPOCHS = 400
LABEL_SMOOTHING = 0.1
WARM_UP = 0.15  # fraction of a training over which the cosine schedule warms up


def learning_rate(config: TrainConfig, epoch: int, done: float = 0.0) -> float:
    """Return the learning rate at a point of the training.

    `paper` follows section 3.1 of the paper: a stepwise warm-up, the peak rate until the middle of the training, then a
    tenth and a hundredth of it. A training of another length than 400 epochs follows the same curve in proportion.
    `cosine` rises linearly from 0 to the peak rate and decays to 0 along a half cosine (Loshchilov and Hutter, 2017).
    Refined part pooling has a tenth of the peak rate, after the whole curve of PCB (see `model/pcb.py`).
    `epoch` is 1-based; `done` is the fraction of it that is over, in which only `cosine` changes.
    """
    if config.rpp:
        last, _ = refinement_epochs(config.epochs)
        if epoch > last:
            return config.lr / 10
        config = replace(config, epochs=last, rpp=False)
    if config.schedule == "cosine":
        progress = (epoch - 1 + done) / config.epochs
        if progress < WARM_UP:
            return config.lr * progress / WARM_UP
        return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    scale = config.lr / 1e-3
    paper_epoch = int(1 + (epoch - 1) * PAPER_EPOCHS / config.epochs)
    if paper_epoch < 50:
        return scale * 1e-4 * (paper_epoch // 5 + 1)
    return scale * (1e-3 if paper_epoch < 200 else 1e-4 if paper_epoch < 300 else 1e-5)


class Shard(NamedTuple):
    """The part of a batch that passes through the network at once, on the training device."""

    crops: Tensor  # (N, H, W, 3) uint8 RGB
    pids: Tensor  # (N,) int64 class indices
    seed: int  # of augmentation and mixing
    corners: Tensor | None = None  # (N, 2) int64, of the windows of adversarial occlusion
    targets: Tensor | None = None  # (N, D) float32 embeddings of the teacher

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are set, by name."""
        return {name: part for name, part in self._asdict().items() if isinstance(part, Tensor)}


def class_indices(train: Split) -> tuple[Indices, Indices]:
    """Indices of the training images that show a person, and their identities numbered from 0."""
    used = np.flatnonzero(train.pids > DISTRACTOR_PID)
    return used, np.unique(train.pids[used], return_inverse=True)[1].astype(np.int64)


class Feed:
    """The training images as the shards of one process.

    The batches of an epoch are the same in all processes. A batch is split into `world.size * accumulate` shards of
    whole identities, and each process takes `accumulate` of them. Each shard has a seed of its own, derived from the
    seed of the run, the epoch, the step and its number, so that a resumed run draws what the uninterrupted one draws.
    Raises PmmError if the batch cannot be split equally, or there are too few identities.
    """

    def __init__(self, train: Split, config: TrainConfig, world: World, device: torch.device) -> None:
        used, self.classes = class_indices(train)
        self.num_classes, self.paths = train.identities, [train.paths[index] for index in used]
        self.count = world.size * config.accumulate
        unit = self.count * config.images_per_identity
        if config.batch % unit or config.batch < 2 * unit or self.num_classes < 2 * self.count:
            raise PmmError(
                f"a batch of {config.batch} images of {self.num_classes} identities cannot be split into {self.count}"
                " micro-batches of two or more identities",
                f"Choose a --batch that is a multiple of {unit}, {2 * unit} or more, or split it less",
            )
        self._config, self._device = config, device
        self.occlusion = Occlusion(len(used), config.height, config.width) if config.method == "aos" else None
        self.targets: NDArray[np.float32] | None = None  # (images, D) embeddings of the teacher
        self._own = range(world.rank * config.accumulate, (world.rank + 1) * config.accumulate)
        cache, workers = int(config.cache_gib * 2**30) // world.local_size, threads(world.local_size)
        self.crops = Crops(self.paths, config.height, config.width, cache, workers, train.pids[used])

    def batches(self, epoch: int) -> list[Indices]:
        """The batches of an epoch: indices into `paths`. The last one is cut to equal shards of whole identities."""
        config = self._config
        each, random = config.images_per_identity, np.random.default_rng([config.seed, epoch])
        batches = identity_batches(self.classes, config.batch // each, each, random)
        unit = self.count * each
        return [batch[: len(batch) // unit * unit] for batch in batches if len(batch) >= 2 * unit]

    def shards(self, batches: list[Indices], epoch: int, first_step: int, meter: Meter) -> Iterator[list[Shard]]:
        """Yield the shards of this process for each step from `first_step`, decoded ahead; `meter` gets the waits."""
        parts = [np.split(batch, self.count)[number] for batch in batches[first_step:] for number in self._own]
        with closing(self.crops.prefetched(parts, 2 * len(self._own))) as ahead:
            for step in range(first_step, len(batches)):
                start = time.perf_counter()
                crops = [next(ahead) for _ in self._own]
                meter.waited += time.perf_counter() - start
                indices = parts[(step - first_step) * len(self._own) :]
                shards = []
                for number, images, own in zip(self._own, crops, indices, strict=False):
                    source = np.random.SeedSequence([self._config.seed, epoch, step, number])
                    seed, corners = source.generate_state(1, np.uint64), None
                    if self.occlusion:
                        drawn = self.occlusion.draw(own, np.random.default_rng(source.spawn(1)[0]))
                        corners = self._to_device(drawn)
                    targets = None if self.targets is None else self._to_device(self.targets[own])
                    pixels, pids = self._to_device(images), self._to_device(self.classes[own])
                    shards.append(Shard(pixels, pids, int(seed[0] >> 1), corners, targets))
                yield shards

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # lets the copy overlap with the work of the GPU
        return tensor.to(self._device, non_blocking=True)


def batch_hard_triplet_loss(embeddings: Tensor, pids: Tensor) -> Tensor:
    """Mean over anchors of softplus(d_ap - d_an), with the farthest positive and the nearest negative.

    Hermans et al., "In Defense of the Triplet Loss", 2017, equation 5 with the soft margin. d is the Euclidean distance
    of the embeddings (N, D), in float32; `pids` are (N,).
    """
    embeddings = embeddings.float()
    squares = embeddings.square().sum(dim=1)
    with torch.autocast(embeddings.device.type, enabled=False):
        squared = squares[:, None] + squares[None, :] - 2 * embeddings @ embeddings.T
    distances = squared.clamp_min(1e-12).sqrt()  # the lower bound keeps the gradient finite at 0
    same = pids[:, None] == pids[None, :]
    hardest_positive = distances.masked_fill(~same, 0.0).amax(dim=1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(dim=1)
    return F.softplus(hardest_positive - hardest_negative).mean()


def identity_loss(logits: Tensor, pids: Tensor, mixed: MixedLabels | None = None) -> Tensor:
    """Cross-entropy of (N, classes) with label smoothing 0.1; `pids` are (N,) int64 class indices.

    With mixed labels, the loss of a sample is (1 - share) CE(own identity) + share CE(other identity) (CutMix, 2019).
    """
    entropy = partial(F.cross_entropy, logits.float(), label_smoothing=LABEL_SMOOTHING)
    if mixed is None:
        return entropy(pids)
    return torch.lerp(entropy(pids, reduction="none"), entropy(mixed.other, reduction="none"), mixed.share).mean()


def pmm_loss(
    outputs: Sequence[StageOutput], pids: Tensor, mixed: MixedLabels | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the triplet loss and the identity loss over all stages (paper section 2.1).

    `pids` are (N,) int64 class indices; `mixed` are the labels that CutMix or A-CutMix mixed in. The triplet loss has
    no fractional labels: there an image counts as the identity that fills most of it.
    Returns the loss, and its parts by name (`triplet_1`, `identity_1`, `triplet_2`, ...), detached.
    """
    parts: dict[str, Tensor] = {}
    largest = pids if mixed is None else torch.where(mixed.share > 0.5, mixed.other, pids)
    for number, stage in enumerate(outputs, start=1):
        parts[f"triplet_{number}"] = batch_hard_triplet_loss(stage.embedding, largest)
        parts[f"identity_{number}"] = identity_loss(stage.logits, pids, mixed)
    return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}


@dataclass
class Trainee:
    """A network in training, with everything that changes with it."""

    network: ReidNetwork
    forward: Callable[..., Any]  # the network, or the Student, wrapped in DistributedDataParallel in several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None  # moving average of the weights
    device: torch.device
    dtype: torch.dtype  # autocast type
    step_graph: "StepGraph | None" = None  # on one GPU
    phase: int = 0  # of refined part pooling
    occlusion: Occlusion | None = None  # of adversarially occluded samples
    projection: nn.Module | None = None  # of the embedding to the size of the teacher's

    @property
    def stateful(self) -> dict[str, Any]:
        """What changes besides the weights, by its name in checkpoints."""
        some = {"average": self.average, "occlusion": self.occlusion, "projection": self.projection}
        optional = {name: part for name, part in some.items() if part}
        return {"optimizer": self.optimizer, "scaler": self.scaler, **optional}

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved as `best.pt`: the average if there is one."""
        return self.average.module if self.average else self.network


def prepare(
    network: ReidNetwork,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    world: World = World(),
    teacher_size: int | None = None,
) -> Trainee:
    """Move a network to its device, in channels-last memory, and create its optimizer (Adam, coupled weight decay).

    `teacher_size` is the embedding size of its teacher, if it has one.
    """
    if config.sync_batch_norm and world.size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    if config.compile:
        # No compiler can follow Grad-CAM, which asks autograd for a gradient in the middle.
        for part in (network.backbone, network.bottleneck) if network.max_heads else (network.backbone,):
            part.compile()
    student = None
    if teacher_size is not None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            student = Student(network, teacher_size).to(device)
    forward: nn.Module = student or network
    trained = forward.parameters()
    if world.size > 1:  # the phases of refined part pooling leave parameters out
        device_ids = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids, find_unused_parameters=config.rpp)
    update = get_ema_multi_avg_fn(config.ema)
    average = AveragedModel(network, multi_avg_fn=update, use_buffers=True) if config.ema else None
    # In float16 the scaler decides in each step whether to update, and several processes exchange gradients.
    step_graph = StepGraph() if device.type == "cuda" and world.size == 1 and dtype != torch.float16 else None
    optimizer = torch.optim.Adam(
        trained, lr=config.lr, weight_decay=config.weight_decay, fused=True, capturable=bool(step_graph)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    projection = student.projection if student else None
    return Trainee(network, forward, optimizer, scaler, average, device, dtype, step_graph, projection=projection)


def start_phase(trainee: Trainee, config: TrainConfig, epoch: int) -> None:
    """Start the phase of refined part pooling to which an epoch belongs: what is trained, and what is pooled."""
    if config.rpp:
        phase = sum(epoch > last for last in refinement_epochs(config.epochs))
        for network in (trainee.network, trainee.evaluated):
            assert isinstance(network, RefinedPCB)
            network.start_phase(phase)
        if phase != trainee.phase and trainee.step_graph:
            trainee.step_graph = StepGraph()
        trainee.phase = phase


class StepGraph:
    """The step as a CUDA graph: the GPU replays its kernels without waiting for Python to launch each of them.

    The first steps run one kernel after the other, because cuDNN, cuBLAS and torch.compile set themselves up in them.
    The graph is captured from shards of the size of the first step; smaller ones, at the end of an epoch, are never
    replayed. The same seeds give the same random numbers in both ways.
    """

    def __init__(self) -> None:
        self._eager_steps = 3
        self._shapes: list[torch.Size] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, trainee: Trainee, shards: list[Shard], config: TrainConfig) -> dict[str, Tensor]:
        """Take a step, replayed if it can be."""
        device, shapes = trainee.device, [shard.crops.shape for shard in shards]
        self._shapes = self._shapes or shapes
        if self._eager_steps or shapes != self._shapes:
            self._eager_steps = max(0, self._eager_steps - 1)
            return _update(trainee, shards, config)
        if self._graph is None:
            own = ({name: part.clone() for name, part in shard.tensors().items()} for shard in shards)
            self._shards = [Shard(**shard._asdict() | copies) for shard, copies in zip(shards, own, strict=True)]
            self._generators = [torch.Generator(device) for _ in shards]
            for group in trainee.optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], device=device)
            graph = torch.cuda.CUDAGraph()
            for generator in self._generators:
                graph.register_generator_state(generator)
            # Other threads may use CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = _update(trainee, self._shards, config, self._generators)
            self._graph = graph
        for mine, given, generator in zip(self._shards, shards, self._generators, strict=True):
            for name, part in mine.tensors().items():
                part.copy_(given.tensors()[name])
            generator.manual_seed(given.seed)
        self._graph.replay()
        return {name: value.clone() for name, value in self._results.items()}


def set_learning_rate(trainee: Trainee, rate: float) -> None:
    """Set the learning rate of the next step without waiting for the device."""
    for group in trainee.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # where a CUDA graph reads it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def train_step(trainee: Trainee, shards: list[Shard], config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradients of all shards and update the weights once.

    Returns the mean loss of the shards and its parts, on the device: reading them waits for it.
    """
    step = trainee.step_graph.step if trainee.step_graph else _update
    means = step(trainee, shards, config)
    if trainee.average:
        trainee.average.update_parameters(trainee.network)
    return means.pop("loss"), means


def _update(
    trainee: Trainee, shards: list[Shard], config: TrainConfig, generators: list[torch.Generator] | None = None
) -> dict[str, Tensor]:
    """Take a step with these random generators, by default new ones with the seeds of the shards."""
    generators = generators or [torch.Generator(trainee.device).manual_seed(shard.seed) for shard in shards]
    trainee.optimizer.zero_grad(set_to_none=True)
    results = []
    for number, (shard, generator) in enumerate(zip(shards, generators, strict=True), start=1):
        # Processes exchange gradients once per step, with the last shard.
        forward, last = trainee.forward, number == len(shards)
        with forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext():
            loss, parts = _shard_loss(trainee, shard, config, generator)
            trainee.scaler.scale(loss / len(shards)).backward()
        results.append({"loss": loss.detach(), **parts})
    if config.clip_norm:
        trainee.scaler.unscale_(trainee.optimizer)
        trained = [parameter for group in trainee.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, config.clip_norm)
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()
    return {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}


def _shard_loss(
    trainee: Trainee, shard: Shard, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    erase_probability = 1.0 if config.mix == "cutout" else ERASE_PROBABILITY
    erase_size = config.erase_size if shard.corners is None else window_side(config.height, config.width)
    images = augment(shard.crops, erase_size, generator, erase_probability, shard.corners)
    network, pids, mixed = trainee.network, shard.pids, None
    with torch.autocast(trainee.device.type, trainee.dtype, enabled=trainee.dtype != torch.float32):
        if isinstance(network, PMM) and network.mix == "cutmix":
            images, mixed = cutmix(images, pids, generator)
        elif isinstance(network, PMM) and network.mix == "a-cutmix":
            cam = network.attention(images, pids)
            images, mixed = attentive_cutmix(images, pids, cam, network.block_size, network.mix_blocks, generator)
        outputs = trainee.forward(images, pids, generator=generator)
    if shard.targets is not None:
        outputs, projected = outputs
        loss, parts = pmm_loss(outputs, pids)
        distillation, more = distillation_loss(outputs, projected, shard.targets)
        return loss + config.distill_weight * distillation, parts | more
    if isinstance(network, PCB | CAMA):
        return (pcb_loss if isinstance(network, PCB) else cama_loss)(outputs, pids)
    return pmm_loss(outputs, pids, mixed)
