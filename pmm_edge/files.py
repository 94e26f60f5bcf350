"""Files: typed JSON, atomic writes, hashes and cache folders."""

import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from pmm_edge.errors import DataError, OutputError, PmmError

T = TypeVar("T")
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # Python's characters for the bytes of a path that is not UTF-8
_AGAIN = "Create the file again with this version of pmm-edge"


def decode_json(
    kind: type[T], text: str | bytes, source: str, error: type[PmmError] = DataError, remedy: str = _AGAIN
) -> T:
    """Decode untrusted JSON into `kind`, a dataclass or any other type that msgspec supports.

    Types are strict, entries without a default are required, and unknown entries are ignored. `source` names the file.
    Raises a PmmError of the type `error`, with the path of the wrong entry and `remedy`.
    """
    try:
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.DecodeError as reason:
            if isinstance(reason, msgspec.ValidationError):
                raise
            # msgspec refuses what `encode_json` writes for paths that are not UTF-8. A NaN becomes a wrong type.
            return msgspec.convert(json.loads(text, parse_constant=str), type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as reason:
        raise error(f"{source} is not valid: {reason}", remedy) from reason


def encode_json(value: object, indent: int = 2) -> str:
    r"""Encode dataclasses, paths and built-in types as JSON; with `indent` 0, one line with sorted keys. NaN is null.

    In paths that are not UTF-8, the byte 0xE9 becomes `\udce9`, which Python's `json` decodes to the same path.
    """
    order: Literal["sorted"] | None = None if indent else "sorted"
    try:
        text = msgspec.json.encode(value, enc_hook=os.fspath, order=order)
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(value, enc_hook=os.fspath, order=order, str_keys=True)
        without_nan = json.loads(json.dumps(plain), parse_constant=lambda _: None)
        return json.dumps(without_nan, indent=2) + "\n" if indent else json.dumps(without_nan, separators=(",", ":"))
    return msgspec.json.format(text, indent=indent).decode() + "\n" if indent else text.decode()


def encode_sealed(value: object) -> str:
    """Encode a dataclass as JSON with a `digest`, the SHA-256 of its other entries, which reveals damage and edits."""
    content = msgspec.to_builtins(value)
    return encode_json(content | {"digest": json_digest(content)})


def decode_sealed(kind: type[T], text: bytes, source: str, error: type[PmmError], remedy: str) -> T:
    """Decode what `encode_sealed` wrote, as `decode_json` does; also raise `error` if the digest does not match."""
    value = decode_json(kind, text, source, error, remedy)
    content = decode_json(dict[str, Any], text, source, error, remedy)
    if content.pop("digest", None) != json_digest(content):
        raise error(f"{source} was changed after it was written: its digest does not match", remedy)
    return value


def json_digest(content: dict[str, Any]) -> str:
    """SHA-256 of JSON with sorted keys and no spaces."""
    return hashlib.sha256(encode_json(content, indent=0).encode()).hexdigest()


def cache_folder() -> Path:
    """`PMM_HOME`, or `pmm-edge` in the user's cache folder; raise OutputError if there is no home folder either."""
    chosen = os.environ.get("PMM_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/pmm-edge"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        problem = f"the cache folder {chosen} cannot be found: this user has no home folder"
        raise OutputError(problem, "Set PMM_HOME to the absolute path of a folder") from error


def with_tilde(text: str) -> str:
    """Replace the home folder at the start of paths with `~`, so that shared output does not name the user."""
    home = os.path.expanduser("~")  # noqa: PTH111  Path.home() raises if there is none
    return re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w-]|\.\w)", "~", text) if len(home) > 1 else text


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Raise OutputError, which names `path`, in place of an OSError."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write {path}: {error.strerror or error}"
        raise OutputError(problem, "Choose a folder that is writable and has space left") from error


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Check that a file of one of these suffixes can be written; raise OutputError otherwise."""
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"cannot write {path}: its name must end in {' or '.join(suffixes)}", "Name such a file")
    check_place(path)


def check_place(path: Path) -> None:
    """Check that a file can be written, before minutes of work; raise OutputError otherwise."""
    with _reported(path):
        _check_parents(path)
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder", "Choose another name")
        tempfile.TemporaryFile(dir=next(parent for parent in path.absolute().parents if parent.exists())).close()


def check_new_folder(path: Path, remedy: str = "Name a folder that does not exist yet") -> None:
    """Check that a folder can be created and is not there yet, or empty; raise OutputError otherwise."""
    with _reported(path):
        _check_parents(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path} exists and is not an empty folder", remedy)


def _check_parents(path: Path) -> None:
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise OutputError(f"cannot write {path}: {parent} is a file", "Choose another name")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path in the same folder, and rename it to `path` at the end.

    A process killed at any moment leaves the old file or the new one, never a part. Every OSError in the block is
    reported as an OutputError of `path`, so the block should only write and check the file. Behind a symbolic link, the
    file that it points to is written.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    with _reported(path), _temporary(path) as temporary:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder next to it, and rename that to `path` at the end.

    Raises OutputError if `path` exists and is not empty, or cannot be written.
    """
    check_new_folder(path)
    with _reported(path), _temporary(path, 0o777) as temporary:
        yield temporary
        temporary.replace(path)  # also an empty folder


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Yield a path for libraries that accept only UTF-8: `path` itself, or one through a temporary link."""
    if not NOT_UTF8.search(str(path)):
        yield path
        return
    with _scratch() as folder:
        whole = NOT_UTF8.search(path.name)
        link = Path(folder, f"file{path.suffix}" if whole else "folder")
        link.symlink_to((path if whole else path.parent).absolute())
        yield link if whole else link / path.name


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a temporary folder that is removed at the end; an OSError in the block is reported as OutputError."""
    try:
        with _scratch() as folder:
            yield folder
    except OSError as error:
        raise OutputError(f"cannot write temporary files: {error}", "Set TMPDIR to a folder with space left") from error


def _scratch() -> AbstractContextManager[Path]:
    """Create a temporary folder of this user in TMPDIR, and remove it at the end."""
    return _temporary(Path(tempfile.gettempdir(), f"pmm-edge-{os.getuid()}"), 0o700)


@contextmanager
def _temporary(path: Path, folder_mode: int = 0) -> Iterator[Path]:
    """Create a locked temporary file, or a folder of this mode, next to `path`, and remove it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path)
    with ExitStack() as stack:
        while True:
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            temporary.mkdir(folder_mode) if folder_mode else temporary.touch(exist_ok=False)
            stack.enter_context(_locked(temporary))
            if temporary.exists():  # or another process has just removed it, because it was not locked yet
                break
        stack.callback(_remove, temporary)
        yield temporary


def remove_unfinished(path: Path) -> None:
    """Remove the temporary files and folders of `path` that killed processes left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with _locked(left, fcntl.LOCK_NB) as unused:
            if unused:
                _remove(left)


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[bool]:
    """Try to lock a file or folder; the system releases the locks of a killed process. Some file systems have none."""
    with ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
            locked = True
        except OSError:
            locked = False
        yield locked


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # already renamed or removed
        path.unlink()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
