"""Files that are either the old one or the whole new one, never half of each."""

import contextlib
import difflib
import errno
import fcntl
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mixlab.errors import DiskError

_UMASK = os.umask(0o077)  # can only be read by setting it
os.umask(_UMASK)
# What `written_whole` calls a file or folder that has not got its name yet.
TEMPORARY = re.compile(r"\..+\.\d+(-[0-9a-f]+)?\.tmp")


def near_paths(path: Path, number: int = 3) -> list[str]:
    """What lies beside `path`, which is not there, under a name like its own: what a person may have meant."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, 10_000)]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=number)]


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, file or folder, that takes its place if the block ends well.

    What was written is on the disk (fsync) before it gets its name. DiskError says what failed; the old
    file then remains and the temporary one is gone.
    """
    path = Path(path)
    # In the same folder, because os.replace is atomic only within one file system. Each call's own, and not to be
    # guessed: a link of that name, put there before, would be written through.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(8).hex()}.tmp")
    try:
        _make_folder(path.parent)
        try:
            yield temporary
            for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
                if file.is_file():
                    file.chmod(0o666 & ~_UMASK)  # safetensors' files can be read by their owner alone
                _fsync(file)
            if temporary.is_dir():
                _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            remove(temporary)
    except OSError as error:
        raise DiskError(
            f"could not write: {error.strerror or error}",
            where=str(path),
            hint="is the disk full, or the folder read-only?",
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, making its folder if needed. DiskError if it fails; the old file then remains."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def take_lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file against other processes until it is closed; False where the file system has no locks.

    BlockingIOError if another process has it; with `wait` it is waited for instead.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # Only these say that somebody has it. Lustre, NFS and FUSE answer ENOSYS, ENOLCK, EOPNOTSUPP and others.
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from error
        return False
    return True


def can_be_written(folder: Path) -> bool:
    """Whether this process may write into `folder`, or make it where it is not there yet."""
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)


def sha256(path: Path) -> str:
    """The digest of a file's content, in hexadecimal; the file is never in memory whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    """Make `path` and what is missing above it, and fsync what holds them: a power cut must not take their names."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
