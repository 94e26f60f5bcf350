"""Everything that decides a training run, and its TOML form. The presets are in `presets.py`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from pmm_edge.errors import PmmError, did_you_mean
from pmm_edge.spec import Method, Mix

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
from pmm_edge.errors import ModelError
from pmm_edge.model.backbone import map_size
from pmm_edge.model.mixing import scaled_mix_blocks
from pmm_edge.runs import CONFIG, about_run

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["paper", "cosine"]


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the paper's configuration for Market-1501 (paper section 3.1)."""

    preset: str = "market1501"
    method: Method = "pmm"
    mix: Mix = "a-hard-mix"
    """What PMM's stages II and III are trained on (paper section 2.2 and table 3)."""
    mix_blocks: int = 3
    """K, the number of blocks that mixing replaces."""
    mix_block_size: str = "3x2"
    """Height and width of a block on the map."""
    backbone: str = "resnet50"
    backbone_weights: str = "imagenet"
    """`imagenet`, `none`, or the path of a file in torchvision's layout."""
    init_from: str = ""
    """A checkpoint of ours or of the paper's authors to start from; its tensors that fit are taken."""
    height: int = 384
    width: int = 128
    epochs: int = 400
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "paper"
    """Learning rate schedule: `paper` (steps, section 3.1) or `cosine` (linear warm-up, then cosine decay to 0)."""
    batch: int = 64
    """Images that one update sees, over all processes."""
    images_per_identity: int = 4
    accumulate: int = 1
    """Parts that a process takes its share of the batch in; the triplet loss and batch norm see one part."""
    erase_size: int = 64
    """Side in pixels of the square that is set to 0 in half of the images; 0 erases nothing."""
    weight_decay: float = 5e-4
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then what is judged and kept as best; 0 keeps none."""
    patience: int = 0
    """Evaluations without a better mAP after which the run stops; 0 never stops early."""
    seed: int = 0
    deterministic: bool = False
    """Take only algorithms that give the same bits every time, on a GPU too, where they are slower."""
    evaluate_every: int = 20
    """Epochs between two evaluations; the last epoch is always evaluated."""
    keep: int = 1
    """Checkpoints of the last epochs that are kept; last.pt is the newest."""
    max_bad_images: int = 10
    """Unreadable training images that are passed over, each with a warning; one more stops the run."""
    cache_gib: float = 8.0
    """Memory for a run's decoded images, of a machine's processes together: those of training come first, then query
    and gallery. What does not fit is decoded each time."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: Precision = "auto"
    """`auto` takes bfloat16 autocast where the hardware computes in it, else float32."""
    compile: bool = False
    """Compile the backbone with torch.compile: minutes at the start, faster steps on a GPU."""
    sync_batch_norm: bool = False
    """Batch norm over all processes' images."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            PmmError: a value is out of its range.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            _require(least <= value < 2**63, f"{name} is {value}", f"It must be {least} or more")
        for name, choices in (("method", Method), ("mix", Mix), ("precision", Precision), ("schedule", Schedule)):
            value, known = getattr(self, name), get_args(choices)
            _require(value in known, f"{name} is '{value}'", f"{did_you_mean(value, known)}Choose {', '.join(known)}")
        size = re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.mix_block_size)
        _require(size is not None, f"mix_block_size is '{self.mix_block_size}'", "Write HEIGHTxWIDTH, such as 3x2")
        identities = 2 * self.accumulate
        _require(
            self.batch % (self.images_per_identity * self.accumulate) == 0
            and self.batch >= self.images_per_identity * identities,
            f"a batch of {self.batch} does not give each of {self.accumulate} parts two or more identities with"
            f" {self.images_per_identity} images each",
            f"Choose a multiple of {self.images_per_identity * self.accumulate},"
            f" {self.images_per_identity * identities} or more",
        )
        _require(
            self.erase_size <= min(self.height, self.width),
            f"erase_size is {self.erase_size}",
            f"The square must fit into {self.height}x{self.width}",
        )
        _require(
            self.mix != "cutout" or self.erase_size > 0,
            "mix 'cutout' with an erase_size of 0",
            "CutOut is the erasing: give --erase-size, or choose --mix none",
        )
        _require(self.lr > 0, f"lr is {self.lr}", "Choose a positive learning rate, such as 1e-3")
        _require(self.ema < 1, f"ema is {self.ema}", "Choose a decay below 1, such as 0.999")
        _require(
            self.mix == "a-hard-mix" or self.method == "pmm",
            f"mix '{self.mix}' with method '{self.method}'",
            "Only PMM has stages that a mix is made for: leave --mix out, or choose --method pmm",
        )

    @property
    def block_size(self) -> tuple[int, int]:
        """`mix_block_size` as numbers."""
        height, width = self.mix_block_size.split("x")
        return int(height), int(width)

    def to_toml(self) -> str:
        return tomli_w.dumps(asdict(self))


_LEAST: dict[str, float] = {
    **dict.fromkeys(("height", "width", "mix_blocks", "epochs", "batch", "accumulate", "evaluate_every", "keep"), 1),
    "images_per_identity": 2,
    **dict.fromkeys(
        ("seed", "lr", "erase_size", "weight_decay", "clip_norm", "ema", "patience", "max_bad_images", "cache_gib"), 0
    ),
}


def overridden(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """`config` with some values replaced, each checked for its name and type.

    Raises:
        PmmError: a key is unknown (the nearest is suggested), or a value has the wrong type or range.
    """
    kinds = {name: str if get_origin(kind) is Literal else kind for name, kind in get_type_hints(TrainConfig).items()}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in kinds:
            remedy = f"{did_you_mean(name, kinds)}The keys: {', '.join(kinds)}"
            raise PmmError(f"'{name}' is no key of a training run", remedy)
        # TOML and flags give 1 where 1.0 is meant; nothing else is converted.
        checked[name] = float(value) if kinds[name] is float and type(value) is int else value
        if type(checked[name]) is not kinds[name]:
            raise PmmError(f"{name} is {value!r}", f"It must be of type {kinds[name].__name__}")
    return replace(config, **checked)


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file.

    Raises:
        PmmError: no such file, one that cannot be read, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PmmError(f"{path} does not exist", "Name a TOML file, such as the config.toml of a run") from error
    except IsADirectoryError as error:
        raise PmmError(f"{path} is a folder", f"Name a TOML file, such as {path / 'config.toml'}") from error
    except OSError as error:
        raise PmmError(f"cannot read {path}: {error.strerror}", "Name a TOML file that can be read") from error
    except UnicodeDecodeError as error:
        raise PmmError(f"{path} is no text in UTF-8, as TOML must be", "Save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise PmmError(f"{path} cannot be read as TOML: {error}", "Mend that line") from error


def read_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`["epochs=3", "backbone=resnet34"]` as the values of a TOML file; what is no TOML value is a string.

    Raises:
        PmmError: a text is no assignment.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise PmmError(f"'{text}' sets nothing", "Write KEY=VALUE, such as epochs=3")
        try:
            values[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[name.strip()] = value.strip()
    return values


def differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """`key: value of one, value of other`, for each field that differs."""
    pairs = ((field.name, getattr(one, field.name), getattr(other, field.name)) for field in fields(TrainConfig))
    return [f"{name}: {mine!r}, {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


def _require(holds: bool, problem: str, remedy: str) -> None:
    if not holds:
        raise PmmError(problem, remedy)


_PAPER = TrainConfig()

DEFAULT = "quick"
"""The preset where none is named, by a flag or in a file."""
PRESETS = {
    # Paper section 3.1: batch 64, 400 epochs, 384×128, K by data set. It has one K for CUHK03, "detected".
    "market1501": _PAPER,
    "dukemtmc-reid": replace(_PAPER, preset="dukemtmc-reid", mix_blocks=6),
    "cuhk03-detected": replace(_PAPER, preset="cuhk03-detected", mix_blocks=8),
    "cuhk03-labeled": replace(_PAPER, preset="cuhk03-labeled", mix_blocks=8),
    # The built-in set in minutes, on a CPU.
    "quick": TrainConfig(
        preset="quick",
        backbone="resnet18",
        backbone_weights="none",
        height=144,
        width=64,
        mix_blocks=1,
        mix_block_size="3x1",  # one of 12 blocks is near the paper's share, 3 of 32; of 3x2 there are only 6
        epochs=24,
        batch=32,
        erase_size=16,
        evaluate_every=8,
    ),
    # A Jetson Nano class device: an eighth of the paper's operations.
    "edge": replace(
        _PAPER, preset="edge", backbone="resnet18", height=192, width=96, mix_blocks=1, erase_size=32, epochs=120
    ),
}


def preset(name: str) -> TrainConfig:
    """A preset by its name.

    Raises:
        PmmError: there is none of this name.
    """
    if name not in PRESETS:
        raise PmmError(f"preset '{name}' is unknown", f"{did_you_mean(name, PRESETS)}Choose {', '.join(PRESETS)}")
    return PRESETS[name]


def resolved(base: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """`base` with some values replaced; K follows the number of blocks on the map unless it is among them.

    Raises:
        PmmError: a key is unknown, or a value has the wrong type or range.
    """
    config = overridden(base, values)
    if "mix_blocks" in values or _blocks(config) == _blocks(base):
        return config
    return replace(config, mix_blocks=scaled_mix_blocks(base.mix_blocks, _blocks(config), _blocks(base)))


def read_config(path: Path) -> TrainConfig:
    """Read a TOML file; what it does not name comes from the preset that it names, by default `quick`.

    Raises:
        PmmError: no such file, no TOML, an unknown key, a wrong type.
    """
    values = read_toml(path)
    return resolved(preset(str(values.get("preset", DEFAULT))), values)


def read_run_config(folder: Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
        ModelError: the folder is no run.
        PmmError: its settings are none any more.
    """
    if about_run(folder) is None or not (folder / CONFIG).exists():
        raise ModelError(f"{folder} is no run folder", "Name one that pmm train made, such as runs/<time>-quick")
    return read_config(folder / CONFIG)


def _blocks(config: TrainConfig) -> float:
    (rows, columns), (height, width) = map_size(config.height, config.width), config.block_size
    return rows * columns / (height * width)
