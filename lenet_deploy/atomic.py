"""Publishing a folder in one step: readers, crashes and full disks see the old folder or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lenet_deploy.errors import CannotWrite
from lenet_deploy.store import cannot_write, make_folder, umask

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, removed at the end whatever happens, and locked while its owner lives.

    What a killed process left beside `target` is removed first: the lock tells it from one that is at work.

    Raises:
        CannotWrite: the system refused.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    make_folder(target.parent)
    prefix = f".{target.name}.staging-"  # compared as text: a name may hold what a glob would interpret
    try:
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)  # nobody else cleans up between the making of the folder and its lock
            for stale in target.parent.iterdir():
                if stale.name.startswith(prefix):
                    _remove_if_abandoned(stale)
            staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
            handle = os.open(staging, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        finally:
            os.close(parent)
        staging.chmod(0o777 & ~umask())  # mkdtemp makes private folders; a bundle is shared as usual
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing was published, the parents made for it go too


def publish(staging: Path, target: Path, replace: bool) -> None:
    """Put `staging` at `target` in one system call; with `replace`, what stood there is at `staging` afterwards.

    Raises:
        CannotWrite: the system refused, or something stands there and `replace` is false; both are as they were.
    """
    try:
        _sync(staging)  # its files are synced as they are written; the new name must not reach the disk before theirs
        if replace and target.is_dir() and not any(target.iterdir()):
            target.rmdir()  # refuses where something was put into it meanwhile
        _rename(staging, target, _RENAME_EXCHANGE if replace and target.exists() else _RENAME_NOREPLACE)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            raise CannotWrite(
                f"{target}: this file system cannot swap folders in one step; choose --out on another, or remove the old one first"
            ) from error
        raise cannot_write(target, error) from error


def _rename(source: Path, target: Path, flags: int) -> None:
    """renameat2(2), which Python does not offer; without it (not Linux), a plain rename where nothing is in the way."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        if flags == _RENAME_EXCHANGE:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        source.rename(target)  # refuses a non-empty target
        return
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _remove_if_abandoned(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # gone already, or another user's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its owner is at work
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
