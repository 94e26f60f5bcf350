"""ModelSpec: all that a consumer of a network must know, carried by every artefact of it.

It is written once, at training, and travels inside the checkpoint, in the ONNX file's metadata and beside
every engine. The runtimes and the bench derive preprocessing from it, so nothing is ever typed twice.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any, Literal, get_args

from pmm_edge.errors import ModelError

SCHEMA = 1
METADATA_KEY = "pmm_edge.spec"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FLOAT16_MAX = 65504.0
"""What a network of precision fp16 can hold between its nodes."""

InputForm = Literal["uint8", "raw", "normalized"]
Method = Literal["pmm", "bdb", "baseline"]
Mix = Literal["a-hard-mix", "dropblock", "cutout", "cutmix", "a-cutmix", "none"]


@dataclass(frozen=True)
class InputSpec:
    """What the network is fed.

    `form` is one of
    - `uint8`: (N, height, width, 3) uint8; normalisation is inside the graph.
    - `raw`: (N, 3, height, width) float32 in 0..255; normalisation is inside the graph.
    - `normalized`: (N, 3, height, width) float32, already scaled to 0..1, less `mean`, over `std`.
    """

    height: int
    width: int
    form: InputForm = "normalized"
    color: str = "RGB"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: str = "bilinear"

    @property
    def layout(self) -> str:
        return "NHWC" if self.form == "uint8" else "NCHW"

    @property
    def dtype(self) -> str:
        return "uint8" if self.form == "uint8" else "float32"

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """The shape of a batch in this input's layout."""
        if self.layout == "NHWC":
            return (batch, self.height, self.width, 3)
        return (batch, 3, self.height, self.width)


@dataclass(frozen=True)
class RetrievalFigures:
    """Retrieval on a data set's query and gallery, in 0..1 (paper section 3.1; mAP over the whole ranking)."""

    rank1: float
    mAP: float  # noqa: N815  the field's own spelling
    mINP: float  # noqa: N815
    mAP_at_50: float  # noqa: N815


@dataclass(frozen=True)
class ModelSpec:
    """The contract that travels with every artefact of a trained network."""

    architecture: Method
    backbone: str
    num_classes: int
    input: InputSpec
    embedding_size: int
    stages: dict[str, tuple[int, int]]
    """The slice [start, stop) of the embedding that each stage fills."""
    mix_blocks: int | None = None
    """K, the blocks that mixing replaces in training (paper section 2.2)."""
    block_size: tuple[int, int] = (3, 2)
    """Height and width of a block on the map."""
    mix: Mix = "a-hard-mix"
    """What stages II and III were trained on."""
    distance: str = "euclidean"
    dataset: str | None = None
    retrieval: RetrievalFigures | None = None
    checkpoint_sha256: str | None = None
    """Of the checkpoint an export was made from; None in the checkpoint itself."""
    normalized_output: bool = False
    """Embeddings have length 1."""
    precision: str = "fp32"
    precision_method: str = "as trained"
    target: Literal["tensorrt", "cpu"] | None = None
    """What the graph was quantised for; None where it was not, or by a version that did not say."""
    tools: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str, source: str = "the model") -> ModelSpec:
        """Read what `to_json` wrote.

        Args:
            text: of the spec.
            source: names the file that it comes from, for errors.

        Raises:
            ModelError: the text is no spec, or one of another schema.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            if raw["schema"] != SCHEMA:
                raise other_version(
                    f"the spec of {source}", raw["schema"], SCHEMA, raw.get("tools", {}).get("pmm-edge")
                )
            raw["input"] = _build(InputSpec, raw["input"], mean=tuple, std=tuple)
            raw["stages"] = {name: (int(start), int(stop)) for name, (start, stop) in raw["stages"].items()}
            if raw.get("retrieval"):
                raw["retrieval"] = _build(RetrievalFigures, raw["retrieval"])
            spec: ModelSpec = _build(ModelSpec, raw, block_size=tuple)
            _check_choices(spec)
            _check_sizes(spec)
            return spec
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ModelError(
                f"the spec of {source} cannot be read ({type(error).__name__}: {error})",
                "Export the model again with this version",
            ) from error


def other_version(what: str, found: int, read: int, writer: str | None = None) -> ModelError:
    """What to say of a file that another version of pmm-edge wrote.

    Args:
        what: names the part of the file that has this number.
        found, read: the number in it, and the one that this version reads.
        writer: the version that wrote it, where the file says so.
    """
    ours = import_module("pmm_edge").__version__  # by name: the package's public names are above this layer
    newer = int(found) > read
    by = f"pmm-edge {writer}" if writer else f"{'a newer' if newer else 'an older'} pmm-edge"
    remedy = f"Install pmm-edge {writer} or later" if writer else "Install a later pmm-edge"
    if not newer:
        remedy = f"Train or export it again with this version, or install {by}"
    return ModelError(
        f"{what} has format {found}, written by {by}; pmm-edge {ours} reads {read} and nothing"
        f" {'newer' if newer else 'older'}",
        remedy,
    )


def _check_choices(spec: ModelSpec) -> None:
    """Refuse what no version of this schema writes: another form of input would be fed as if it were normalised."""
    for name, value, kind in (
        ("input form", spec.input.form, InputForm),
        ("architecture", spec.architecture, Method),
        ("mix", spec.mix, Mix),
    ):
        if value not in get_args(kind):
            raise ValueError(f"{name} {value!r} is none of {', '.join(get_args(kind))}")
    for name, values in (("mean", spec.input.mean), ("std", spec.input.std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} {values} is not three numbers")
    if min(spec.input.std) <= 0:
        raise ValueError(f"std {spec.input.std} is not above 0")


def _check_sizes(spec: ModelSpec) -> None:
    """Refuse numbers that no network has, before memory is asked for."""
    size = spec.input
    for number, largest in (
        (spec.num_classes, 10_000_000),
        (spec.embedding_size, 1_000_000),
        *((side, 10_000) for side in (size.height, size.width, *spec.block_size)),
    ):
        if not 1 <= number <= largest:
            raise ValueError(f"{number} is out of range")


def _build(kind: type, raw: dict[str, Any], **convert: Any) -> Any:
    unknown = raw.keys() - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(f"unknown entries {sorted(unknown)}")
    return kind(**{name: convert[name](value) if name in convert else value for name, value in raw.items()})
