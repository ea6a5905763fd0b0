"""The user's cache folder: where it is, how files come into it, and what happens where it cannot be used.

Everything in it can be made again, so that nothing depends on it: a folder that cannot be made, read or
written, a full disk, a file that was written by half. Whoever keeps something asks :func:`place` for a folder
and writes with :func:`write`, and goes on without where these say no. They say why in one warning a process,
of the logger of this module. Files appear whole or not at all, whoever else writes the same one; a process
that is killed leaves at most a scratch file, which :func:`leftovers` finds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

_log = logging.getLogger(__name__)
_told: set[Path] = set()  # folders whose trouble has been told
_NOWHERE = Path(os.devnull) / "no-home" / "llm42"
_SEAL = hashlib.sha256().digest_size
SCRATCH = ".scratch-"  # begins the name of what is not whole yet
_OLD = 3600.0  # seconds after which a scratch file has no writer any more


def folder() -> Path:
    """``$XDG_CACHE_HOME/llm42`` (``~/.cache/llm42``), which need not exist; without a home it cannot."""
    try:
        path = Path(platformdirs.user_cache_dir("llm42"))
    except RuntimeError:  # no home folder
        return _NOWHERE
    return path if path.is_absolute() else _NOWHERE


def place(part: str) -> Path | None:
    """The folder ``part`` of the cache, made if need be; None where nothing can be written there."""
    path = folder() / part
    try:
        _try(path)
    except OSError as error:
        trouble(error)
        return None
    return path


def obstacle() -> str | None:
    """Why nothing can be written into the cache; None if it can."""
    try:
        _try(folder())
    except OSError as error:
        return _reason(error)
    return None


def trouble(error: Exception) -> None:
    """Tell, once a process and folder, that work goes on without the cache."""
    where = folder()
    if where not in _told:
        _told.add(where)
        _log.warning(
            "the cache folder %s cannot be used (%s): going on without it, so the next start is as slow as "
            "this one; set XDG_CACHE_HOME to a folder that can be written",
            where,
            _reason(error),
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _try(path: Path) -> None:
    _make(path)
    with _scratch(path) as file:
        file.write_bytes(b"?")


def write(path: Path, data: bytes | str, *, seal: bool = False) -> bool:
    """Put a file into the cache, all of it or nothing; False where that cannot be done.

    ``seal`` appends a SHA-256 for :func:`sealed`: for files whose readers would not notice that a crash of
    the machine has left holes in them.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        _make(path.parent)
        with _scratch(path.parent) as file:
            with file.open("wb") as stream:
                stream.write(content)
                stream.write(hashlib.sha256(content).digest() if seal else b"")
                stream.flush()
                os.fsync(stream.fileno())
            file.chmod(0o644)  # mkstemp makes it private
            file.replace(path)
    except OSError as error:
        trouble(error)
        return False
    return True


def _make(path: Path) -> None:
    if path.is_relative_to(_NOWHERE):
        raise OSError("this user has no home folder")
    path.mkdir(parents=True, exist_ok=True)


def sealed(path: Path) -> bytes | None:
    """What ``write(..., seal=True)`` put there; None if the file is not there, or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data = content[:-_SEAL]
    return data if data and hashlib.sha256(data).digest() == content[-_SEAL:] else None


def used(path: Path) -> None:
    """Count a file as used at this moment, for :func:`keep_newest`."""
    with contextlib.suppress(OSError):
        os.utime(path)


def keep_newest(part: str, suffix: str, count: int) -> None:
    """Delete all but the ``count`` files of that suffix in ``part`` that were written or used last."""
    dated = []
    with contextlib.suppress(OSError):
        for path in (folder() / part).glob(f"*{suffix}"):
            with contextlib.suppress(OSError):  # another process deletes too
                dated.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(dated, reverse=True)[count:]:
        with contextlib.suppress(OSError):
            path.unlink()


@functools.cache
def temporary() -> Path:
    """A folder for this process alone, gone when it ends. Raises OSError."""
    made = tempfile.TemporaryDirectory(prefix="llm42-", ignore_cleanup_errors=True)
    _kept.append(made)
    return Path(made.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed with the interpreter


@contextlib.contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A name for a file or folder that is not whole yet; what still has it at the end is removed."""
    handle, name = tempfile.mkstemp(dir=directory, prefix=SCRATCH)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def leftovers() -> list[Path]:
    """What killed processes have left half-written, an hour old or older."""
    limit = time.time() - _OLD
    found = folder().rglob(f"{SCRATCH}*") if folder().is_dir() else iter(())
    return [path for path in found if path.lstat().st_mtime < limit]
