"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vlmfix.errors import BadInput

__all__ = ["LOCK_FILE", "locked"]

LOCK_FILE = ".vlmfix.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there.

    The lock is the operating system's: it ends with the process, however that ends, so a file that
    a killed run has left behind keeps nobody out.

    Raises:
        BadInput: another run holds the lock; nothing has been written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    file = _hold(path)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file; one that stays does no harm
            path.unlink()
        file.close()
        if made:
            with suppress(OSError):  # only an empty one goes: nothing was written into it
                folder.rmdir()


def _hold(path: Path) -> IO[str]:
    """The lock file, open, locked and with the name of this process in it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except OSError as error:
            file.seek(0)
            owner = file.read(200).strip()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise BadInput(
                    f"output: another run{f' ({owner})' if owner else ''} writes into "
                    f"{path.parent}: wait for its end, or name another folder"
                ) from None
            warnings.warn(
                f"output: {path.parent} is on a file system without locks ({error.strerror}): let "
                "no second run write into it",
                stacklevel=4,
            )
            return path.open("a+", encoding="utf-8")
        # The run before removes its file as it ends: a lock on that one would keep nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    def _lock(file: IO[str]) -> None:
        # A byte far behind the text, which stays readable.
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)

else:

    def _lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
