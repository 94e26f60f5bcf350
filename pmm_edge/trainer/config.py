"""Everything that decides a training run, its presets, and its TOML form."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import tomli_w

from pmm_edge.errors import PmmError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def _require(holds: bool, problem: str, remedy: str) -> None:
    if not holds:
        raise PmmError(problem, remedy)


def _suggest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"Did you mean '{near[0]}'? " if near else ""


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the paper's configuration for Market-1501 (paper section 3.1)."""

    preset: str = "market1501"
    backbone: str = "resnet50"
    backbone_weights: str = "imagenet"
    """`imagenet`, `none`, or the path of a file in torchvision's layout."""
    height: int = 384
    width: int = 128
    mix_blocks: int = 3
    """K, the number of blocks that mixing replaces (paper section 2.2)."""
    block_height: int = 3
    block_width: int = 2
    epochs: int = 400
    batch: int = 64
    images_per_identity: int = 4
    erase_size: int = 64
    """Side in pixels of the square that is set to 0 in half of the images; 0 erases nothing."""
    weight_decay: float = 5e-4
    seed: int = 0
    evaluate_every: int = 20
    """Epochs between two evaluations; the last epoch is always evaluated."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: Precision = "auto"
    """`auto` takes bfloat16 autocast where the hardware computes in it, else float32."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "mix_blocks", "block_height", "block_width", "epochs", "batch"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "It must be 1 or more")
        _require(self.images_per_identity >= 2, f"images_per_identity is {self.images_per_identity}", "Take 2 or more")
        _require(
            self.batch % self.images_per_identity == 0 and self.batch // self.images_per_identity >= 2,
            f"a batch of {self.batch} does not hold two or more identities with {self.images_per_identity} images each",
            f"Choose a multiple of {self.images_per_identity}, {2 * self.images_per_identity} or more",
        )
        _require(
            0 <= self.erase_size <= min(self.height, self.width),
            f"erase_size is {self.erase_size}",
            f"The square must fit into {self.height}x{self.width}",
        )
        _require(self.evaluate_every >= 1, f"evaluate_every is {self.evaluate_every}", "It must be 1 or more")
        _require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}", "It must be 0 or more")
        choices = get_args(Precision)
        _require(self.precision in choices, f"precision is '{self.precision}'", f"Choose {', '.join(choices)}")

    @property
    def identities_per_batch(self) -> int:
        """P of the P × K batch."""
        return self.batch // self.images_per_identity

    def to_toml(self) -> str:
        return tomli_w.dumps(asdict(self))


PRESETS = {
    "market1501": TrainConfig(),
    "quick": TrainConfig(
        preset="quick",
        backbone="resnet18",
        backbone_weights="none",
        height=144,
        width=64,
        mix_blocks=1,
        epochs=24,
        batch=32,
        erase_size=16,
        evaluate_every=8,
    ),
}


def preset(name: str) -> TrainConfig:
    """A preset by its name.

    Raises:
        PmmError: there is none of this name.
    """
    if name not in PRESETS:
        raise PmmError(f"preset '{name}' is unknown", f"{_suggest(name, list(PRESETS))}Choose {', '.join(PRESETS)}")
    return PRESETS[name]


def overridden(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """`config` with some values replaced, each checked for its name and type.

    Raises:
        PmmError: a key is unknown (the nearest is suggested), or a value has the wrong type or range.
    """
    kinds = get_type_hints(TrainConfig)
    names = [field.name for field in fields(TrainConfig)]
    for name, value in values.items():
        if name not in names:
            remedy = f"{_suggest(name, names)}The keys: {', '.join(names)}"
            raise PmmError(f"'{name}' is no key of a training run", remedy)
        kind = kinds[name] if isinstance(kinds[name], type) else str
        # TOML and flags give 1 where 1.0 is meant; nothing else is converted.
        if kind is float and type(value) is int:
            values = values | {name: float(value)}
        elif type(value) is not kind:
            raise PmmError(f"{name} is {value!r}", f"It must be of type {kind.__name__}")
    return replace(config, **values)


def read_config(path: Path) -> TrainConfig:
    """Read a TOML file; what it does not name comes from the preset that it names, by default `market1501`.

    Raises:
        PmmError: no such file, no TOML, an unknown key, a wrong type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PmmError(f"{path} does not exist", "Name a TOML file, such as the config.toml of a run") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PmmError(f"{path} cannot be read as TOML: {error}", "Mend that line") from error
    return overridden(preset(str(values.get("preset", "market1501"))), values)
