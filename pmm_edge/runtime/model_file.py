"""A model file with everything that it refers to, read once, and the digest that `pmm export` writes into it.

ONNX files are split here without the onnx package, which an edge box does not have. Field numbers are those of
onnx.proto in https://github.com/onnx/onnx.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pmm_edge.errors import ModelError
from pmm_edge.files import encode_json
from pmm_edge.spec import METADATA_KEY

if TYPE_CHECKING:
    from pmm_edge.runtime.certificate import Certificate

DIGEST_KEY = "pmm_edge.digest"
Bytes = bytes | memoryview
_MESSAGES = {  # the fields through which a model refers to tensors
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_DESCRIPTION, _METADATA = range(2, 7), 14  # fields of a model: producer, domain, version and documentation; metadata
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # fields of a tensor


@dataclass(frozen=True, eq=False)
class ModelFile:
    """The content of a model file, unchanged by what happens to the file later."""

    path: Path
    stored: list[bytes]  # the file, and the external data of an ONNX file in the order of their names
    content: bytes  # the complete model: external data is part of it
    metadata: dict[str, str] = field(default_factory=dict)
    weights: list[Bytes] = field(default_factory=list)  # what determines embeddings, wherever it is stored
    damaged: bool = False  # the file violates its format
    certificate: Certificate | None = None  # that it was compared with

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file followed by its external data, as `cat model.onnx weights.bin | sha256sum` prints it."""
        return _sha256(self.stored)

    @property
    def size(self) -> int:
        return sum(map(len, self.stored))

    @property
    def digest(self) -> str:
        """SHA-256 of the spec and weights of an ONNX or safetensors file."""
        return _sha256([self.metadata.get(METADATA_KEY, "").encode(), *self.weights])

    def check(self) -> None:
        """Raise ModelError if the file is damaged, or not what `pmm export` wrote."""
        remedy = "Copy the file again, or export it again"
        if self.damaged:
            raise ModelError(f"{self.path} is damaged, truncated or of another format", remedy)
        if self.metadata.get(DIGEST_KEY, digest := self.digest) != digest:
            raise ModelError(
                f"{self.path} was damaged or changed after pmm export wrote it: its digest does not match",
                f"{remedy}. If a tool changed it on purpose, remove {DIGEST_KEY} from its metadata",
            )


def read_model(path: Path) -> ModelFile:
    """Read a model and the external data that it refers to, which must be in its folder; ModelError if it is not."""
    return parse_model(path, _read(path))


def parse_model(path: Path, content: bytes) -> ModelFile:
    """Return what `read_model` does for the content that a file has or will have."""
    external: dict[str, bytes] = {}
    metadata: dict[str, str] = {}
    weights: list[Bytes] = []
    complete = content
    try:
        if path.suffix == ".onnx":
            if (changed := _complete(memoryview(content), "model", path, external)) is not None:
                complete = changed
            for number, value, message in _fields(memoryview(complete)):
                if number == _METADATA:
                    entry = {part: str(text, "utf-8") for part, text, _ in _fields(value)}
                    metadata[entry.get(1, "")] = entry.get(2, "")
                elif number not in _DESCRIPTION:
                    weights.append(message)
        elif path.suffix == ".safetensors":
            start = 8 + int.from_bytes(content[:8], "little")
            header = msgspec.json.decode(content[8:start], type=dict[str, Any])
            metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
            weights = [encode_json(header, indent=0).encode(), memoryview(content)[start:]]
    except (ValueError, LookupError, RecursionError, msgspec.MsgspecError):
        return ModelFile(path, [content], b"", damaged=True)
    return ModelFile(path, [content, *(external[name] for name in sorted(external))], complete, metadata, weights)


def _sha256(parts: Iterable[Bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    how = {".safetensors": " --safetensors", ".engine": f" {path.with_suffix('.onnx')} --trt"}.get(path.suffix, "")
    try:
        return path.read_bytes()
    except OSError as error:
        problem = f"{path} does not exist" if isinstance(error, FileNotFoundError) else f"cannot read {path}: {error}"
        raise ModelError(problem, f"Create it with pmm export{how}") from error


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a position and the position after it; raise LookupError or ValueError if damaged."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield number and value of each field, and the field as a whole; raise LookupError or ValueError if damaged."""
    start = 0
    while start < len(message):
        tag, value = _varint(message, start)
        if tag & 7 == 2:
            size, value = _varint(message, value)
        else:  # numbers have a variable size, 8 or 4 bytes
            size = {0: 0, 1: 8, 5: 4}[tag & 7] or _varint(message, value)[1] - value
        if (end := value + size) > len(message):
            raise ValueError("a field ends after its message")
        yield tag >> 3, message[value:end], message[start:end]
        start = end


def _field(number: int, value: Bytes) -> bytes:
    """Serialize a field of bytes, text or a message."""
    head = bytearray()
    for rest in (number << 3 | 2, len(value)):
        while rest > 127:
            head.append(rest & 127 | 128)
            rest >>= 7
        head.append(rest)
    return bytes(head) + value


def _complete(message: memoryview, kind: str, path: Path, external: dict[str, bytes]) -> bytes | None:
    """Return a message of an ONNX file with external data moved into its tensors, or None if nothing changes.

    `external` collects the files by their names.
    """
    fields: list[tuple[int, Bytes]] = []
    reference: dict[bytes, bytes] = {}
    is_changed = is_external = False
    for number, value, whole in _fields(message):
        inner, new = _MESSAGES[kind].get(number), None
        if kind == "tensor" and number == _DATA_LOCATION:
            is_changed, is_external = True, bytes(value) == b"\x01"
        elif kind == "tensor" and number == _EXTERNAL_DATA:
            entry = {part: bytes(text) for part, text, _ in _fields(value)}
            reference[entry[1]] = entry[2]
        elif inner and (new := _complete(value, inner, path, external)) is not None:
            is_changed = True
            fields.append((number, _field(number, new)))
        else:
            fields.append((number, whole))
    if is_external:  # in the order of a serialized message, so that the digest is the same wherever the data is
        fields.append((_RAW_DATA, _field(_RAW_DATA, _external_data(path, reference, external))))
        fields.sort(key=itemgetter(0))
    return b"".join(whole for _, whole in fields) if is_changed else None


def _external_data(path: Path, reference: dict[bytes, bytes], external: dict[str, bytes]) -> memoryview:
    """Return the bytes that a tensor refers to; ModelError if they are not in the folder of the model."""
    name = os.fsdecode(reference[b"location"])
    file = path.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        problem = f"{path} refers to weights outside of its folder: {name}"
        raise ModelError(problem, "Save the model with its weights next to it")
    if name not in external:
        if not file.is_file():  # nor a pipe or device, which may never end
            raise ModelError(f"{path} refers to weights in {file}, which is not a file", "Copy them next to the model")
        external[name] = _read(file)
    data = memoryview(external[name])
    start = int(reference.get(b"offset", b"0"))
    stop = start + int(reference.get(b"length", len(data) - start))
    if not 0 <= start <= stop <= len(data):
        raise ModelError(f"{file} ends before the weights that {path} refers to", "Copy it again")
    return data[start:stop]
