# ruff: noqa: RUF009  `_setting` returns a dataclass field
"""Training settings: declared once with their help texts, read from TOML and flags, and the presets.

The command line builds its flags from `TrainConfig`, so importing this module does not import torch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin

import msgspec

from pmm_edge.errors import ModelError, PmmError, did_you_mean
from pmm_edge.runs import CONFIG, about_run, never_began
from pmm_edge.spec import MAX_SIDE, Method, Mix

AutocastType = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["paper", "cosine"]
METHOD, TRAINING, MACHINE = "Method", "Training", "Machine"


def _setting(default: Any, panel: str, text: str, least: float | None = None) -> Any:
    """Declare a setting: default, the panel of `pmm train --help` that shows it, its help text, smallest value."""
    return field(default=default, metadata={"panel": panel, "help": text, "least": least})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run, by default the paper's for Market-1501. Raises PmmError if a value is wrong."""

    preset: str = "market1501"
    method: Method = _setting("pmm", METHOD, "Network: pmm, or one the paper compares it with.")
    rpp: bool = _setting(False, METHOD, "Refined part pooling, for PCB; it takes the last quarter of the epochs.")
    mix: Mix = _setting("a-hard-mix", METHOD, "What stages II and III of PMM are trained on.")
    mix_blocks: int = _setting(3, METHOD, "Number of blocks of the feature map that mixing replaces (K).", 1)
    mix_block_size: str = _setting("3x2", METHOD, "Height and width of a block on the feature map, such as 3x2.")
    backbone: str = _setting(
        "resnet50",
        METHOD,
        "resnet10, resnet18, resnet34, resnet50, resnet101, mobilenet_v3_small, mobilenet_v3_large or efficientnet_b0.",
    )
    backbone_weights: str = _setting("imagenet", METHOD, "imagenet, none, or a file in torchvision's layout.")
    init_from: str = _setting(
        "", METHOD, "Checkpoint to start from (ours or the authors'); tensors that fit are loaded."
    )
    embedding_size: int = _setting(512, METHOD, "Values of the embedding of each head; not for PCB and CAMA.", 1)
    teacher: str = _setting("", METHOD, "Checkpoint or run folder of the teacher; implies --method baseline.")
    distill_weight: float = _setting(1.0, TRAINING, "Weight of the losses that compare a network with its teacher.", 0)
    height: int = _setting(384, METHOD, "Input height in pixels.", 1)
    width: int = _setting(128, METHOD, "Input width in pixels.", 1)
    epochs: int = _setting(400, TRAINING, "Number of epochs; the learning rate schedule is scaled to it.", 1)
    lr: float = _setting(1e-3, TRAINING, "Peak learning rate.", 0)
    schedule: Schedule = _setting("paper", TRAINING, "Learning rate: paper (steps), or cosine (warm-up, decay to 0).")
    batch: int = _setting(64, TRAINING, "Images per optimizer step, over all processes.", 1)
    images_per_identity: int = _setting(4, TRAINING, "Images of each identity in a batch.", 2)
    accumulate: int = _setting(1, TRAINING, "Gradient accumulation steps; losses see one micro-batch at a time.", 1)
    erase_size: int = _setting(64, TRAINING, "Side in pixels of the randomly erased square; 0 disables erasing.", 0)
    weight_decay: float = _setting(5e-4, TRAINING, "Adam weight decay (coupled).", 0)
    clip_norm: float = _setting(0.0, TRAINING, "Maximum gradient norm; 0 disables clipping.", 0)
    ema: float = _setting(0.0, TRAINING, "Decay of an average of the weights, which best.pt holds; 0 disables it.", 0)
    patience: int = _setting(0, TRAINING, "Stop after this many evaluations without a better mAP; 0 never stops.", 0)
    seed: int = _setting(0, TRAINING, "Random seed of weights, batches, augmentation and mixing.", 0)
    deterministic: bool = _setting(False, MACHINE, "Use deterministic algorithms only, also on a GPU (slower).")
    evaluate_every: int = _setting(20, TRAINING, "Epochs between evaluations; the last epoch is always evaluated.", 1)
    max_bad_images: int = _setting(10, MACHINE, "Maximum number of unreadable training images to skip.", 0)
    cache_gib: float = _setting(8.0, MACHINE, "GiB of decoded images to cache, over all processes of a machine.", 0)
    device: str = _setting("auto", MACHINE, "auto, cpu, cuda, or the number of a GPU.")
    precision: AutocastType = _setting(
        "auto", MACHINE, "Autocast type; auto is bf16 if the hardware supports it, else fp32."
    )
    compile: bool = _setting(False, MACHINE, "Compile the backbone with torch.compile: slow start, faster on a GPU.")
    sync_batch_norm: bool = _setting(False, MACHINE, "Synchronize batch norm over all GPUs of torchrun.")

    def __post_init__(self) -> None:
        for setting in fields(self):
            name, value, least = setting.name, getattr(self, setting.name), setting.metadata.get("least")
            if least is not None and not least <= value < 2**63:
                raise PmmError(f"{name} is {value}", f"The smallest value is {least}")
            if (choices := get_args(setting.type)) and value not in choices:
                raise PmmError(f"{name} is '{value}'", f"{did_you_mean(value, choices)}Choose {', '.join(choices)}")
        batch, unit = self.batch, self.images_per_identity * self.accumulate
        for name, wrong, remedy in (
            ("height", self.height > MAX_SIDE, f"The largest value is {MAX_SIDE}"),
            ("width", self.width > MAX_SIDE, f"The largest value is {MAX_SIDE}"),
            ("mix_block_size", not re.fullmatch(r"[1-9]\d{,2}x[1-9]\d{,2}", self.mix_block_size), "Write it like 3x2"),
            ("batch", batch % unit or batch < 2 * unit, f"Choose a multiple of {unit}, {2 * unit} or more"),
            ("teacher", self.teacher and self.method != "baseline", "Leave --method out, or choose --method baseline"),
            ("mix", self.teacher and self.mix != "a-hard-mix", "Leave out --mix, or --teacher"),
            ("rpp", self.teacher and self.rpp, "Leave out --rpp, or --teacher"),
            ("erase_size", self.erase_size > min(self.height, self.width), f"Fit it into {self.height}x{self.width}"),
            ("erase_size", self.mix == "cutout" and not self.erase_size, "Set --erase-size, or choose --mix none"),
            ("lr", self.lr == 0, "Choose a positive learning rate, such as 1e-3"),
            ("ema", self.ema >= 1, "Choose a decay below 1, such as 0.999"),
            ("mix", self.mix != "a-hard-mix" and self.method != "pmm", "Leave --mix out, or choose --method pmm"),
            ("rpp", self.rpp and self.method != "pcb", "Leave --rpp out, or choose --method pcb"),
            (
                "embedding_size",
                self.embedding_size != 512 and self.method in ("pcb", "cama"),
                f"Leave --embedding-size out: {self.method} has a size of its own",
            ),
            ("epochs", self.rpp and self.epochs < 3, "Refined part pooling needs 3 or more"),
        ):
            if wrong:
                raise PmmError(f"{name} is {getattr(self, name)!r}", remedy)

    @property
    def block_size(self) -> tuple[int, int]:
        """`mix_block_size` as (height, width)."""
        height, width = self.mix_block_size.split("x")
        return int(height), int(width)

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(asdict(self))


_PAPER = TrainConfig()
# A student, with one head, for boards such as the Jetson Orin Nano: plain convolutions, which run on INT8 tensor cores.
# Half the paper's height and width, a ninth of its operations.
_EDGE = replace(
    _PAPER,
    preset="edge",
    method="baseline",
    backbone="resnet18",
    embedding_size=256,
    height=192,
    width=64,
    mix_blocks=1,
    erase_size=32,
    epochs=120,
)
DEFAULT_PRESET = "quick"
PRESETS = {
    # Paper section 3.1: batch 64, 400 epochs, 384x128, K by data set. The paper has a single CUHK03, "detected".
    "market1501": _PAPER,
    "dukemtmc-reid": replace(_PAPER, preset="dukemtmc-reid", mix_blocks=6),
    "cuhk03-detected": replace(_PAPER, preset="cuhk03-detected", mix_blocks=8),
    "cuhk03-labeled": replace(_PAPER, preset="cuhk03-labeled", mix_blocks=8),
    # The synthetic data set in minutes on a CPU.
    "quick": TrainConfig(
        preset="quick",
        backbone="resnet10",
        backbone_weights="none",
        height=80,
        width=32,
        mix_blocks=1,
        mix_block_size="1x1",  # one of 10 blocks is close to the paper's share, 3 of 32; of 3x2 there would be only 1
        batch=16,
        images_per_identity=2,
        epochs=36,
        lr=3e-3,
        schedule="cosine",
        erase_size=0,
        evaluate_every=36,
    ),
    "edge": _EDGE,
    # For CPUs and the smallest boards: less than a hundredth of the paper's operations, a thirtieth of its parameters.
    "edge-tiny": replace(
        _EDGE,
        preset="edge-tiny",
        backbone="mobilenet_v3_small",
        embedding_size=128,
        height=288,
        width=96,
        mix_blocks=2,
        erase_size=48,
    ),
}


def choose_config(
    preset: str | None = None, config: TrainConfig | Path | None = None, settings: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Combine a preset (`quick` by default) or a configuration with single settings, which take precedence.

    Settings that a TOML file leaves out come from the preset that it names. K follows the number of blocks on the
    feature map unless `mix_blocks` is set. A teacher without a method chooses the method `baseline`. Raises PmmError if
    a file cannot be read, a name is unknown (the nearest one is suggested), or a value is wrong.
    """
    if preset is not None and config is not None:
        raise PmmError("a preset and a configuration are both given", "The configuration can name its preset; give one")
    values: Mapping[str, Any] = {}
    if isinstance(config, Path):
        values = _read_toml(config)
        preset, config = str(values.get("preset", DEFAULT_PRESET)), None
    if config is None and (preset := preset or DEFAULT_PRESET) not in PRESETS:
        raise PmmError(f"unknown preset '{preset}'", f"{did_you_mean(preset, PRESETS)}Choose {', '.join(PRESETS)}")
    return _override(_override(config or PRESETS[str(preset)], values), settings or {})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return msgspec.toml.decode(path.read_text("utf-8", "surrogateescape"))
    except OSError as error:
        raise PmmError(f"cannot read {path}: {error.strerror}", "Name a TOML file, as config.toml of a run") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits
        raise PmmError(f"{path} is not valid: {error}", "Correct that entry") from error


def _override(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    kinds = {setting.name: setting.type for setting in fields(base)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            raise PmmError(f"unknown setting '{name}'", f"{did_you_mean(name, kinds)}Settings: {', '.join(kinds)}")
        kind = str if get_origin(kinds[name]) is Literal else kinds[name]
        if (name == "device" and type(value) is int) or (kind is str and isinstance(value, PurePath)):
            value = str(value)
        try:
            checked[name] = msgspec.convert(value, kind)  # strict, except that an integer is accepted for a float
        except msgspec.ValidationError as error:
            raise PmmError(f"{name} is {value!r}", str(error)) from error
    if checked.get("teacher"):
        checked.setdefault("method", "baseline")
    if checked.get("method", base.method) in ("pcb", "cama"):
        checked.setdefault("embedding_size", 512)  # a preset may have another one, which they do not use
    config = replace(base, **checked)
    geometry = ("height", "width", "block_size")
    if "mix_blocks" in values or all(getattr(config, name) == getattr(base, name) for name in geometry):
        return config
    from pmm_edge.model.backbone import map_size
    from pmm_edge.model.mixing import scaled_mix_blocks

    blocks, base_blocks = (
        math.prod(map_size(each.height, each.width)) / math.prod(each.block_size) for each in (config, base)
    )
    return replace(config, mix_blocks=scaled_mix_blocks(base.mix_blocks, blocks, base_blocks))


def read_run_config(folder: Path) -> TrainConfig:
    """Read the settings of a run folder. Raises ModelError if it is not one, or has no settings yet."""
    if never_began(folder):
        raise ModelError(f"the run {folder} never started", f"Train into it: pmm train --out {folder}")
    if about_run(folder) is None or not (folder / CONFIG).exists():
        raise ModelError(f"{folder} is not a run folder", "Name a folder of pmm train, such as runs/<time>-quick")
    # The file has every setting that existed when the run started. Later ones had the effect of their defaults, while
    # the preset may have changed.
    return _override(TrainConfig(), _read_toml(folder / CONFIG))
