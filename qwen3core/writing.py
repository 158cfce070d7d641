"""Files, written in one way by all that write any: whole or not at all, and readable as the umask says."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import InputError


@contextmanager
def writing(target: str | Path) -> Iterator[Path]:
    """A path for a new file, which takes the place of ``target`` once it is on disk; after an exception it is gone.

    A link at ``target`` stays one. Raises OSError.
    """
    target = Path(os.path.realpath(target))
    with writing_into(target.parent, f".{target.name}.part") as part:
        yield part / target.name


@contextmanager
def writing_into(directory: Path, name: str = ".part") -> Iterator[Path]:
    """A folder for new files, which move to the same places in ``directory`` once all are on disk, or are gone.

    name: of that folder, inside ``directory``; one that a killed process left is removed. Raises OSError, which names
    the directory where the error of a full disk does not say a file.
    """
    part = directory / name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        files = sorted(path for path in part.rglob("*") if path.is_file())
        mode = part.stat().st_mode & 0o666
        for path in files:
            path.chmod(mode)  # safetensors' own are for the owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path in files:
            place = directory / path.relative_to(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None):
            raise
        raise OSError(f"{directory}: expected to write files there, found {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it for one run at a time, as long as the process lives. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(f"{folder}: expected no other run there, found one that is running") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)
