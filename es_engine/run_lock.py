"""Who is at work in the folder of a run or of a comparison: a lock that the kernel lets go of when its process ends,
however it ends.

The name of the process is in the lock's file for people; whether it is still there, only the lock says. It holds
between hosts where the file system passes flock on, as NFS does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
PATIENCE_S = 1.0
"""Whoever asks for the holder has the lock himself for an instant."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder. Raises ValueError if one of them does, or if its file system
    has no locks."""
    with (folder / LOCK).open("a+") as file:
        deadline = time.monotonic() + PATIENCE_S
        while not _taken(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise ValueError(f"{folder}: {_named(file)} is at work in this folder; wait for its end, or stop it")
            time.sleep(PATIENCE_S / 20)
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        file.flush()
        yield


def holder(folder: Path) -> str | None:
    """The process that is at work in a folder, in words; None if there is none."""
    try:
        file = (folder / LOCK).open()
    except FileNotFoundError:
        return None
    with file:
        return None if _taken(file, fcntl.LOCK_SH) else _named(file)


def _taken(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise ValueError(
            f"{file.name}: the file system has no locks ({error.strerror}); mount it with them, as Lustre with "
            "`-o flock`, or give a run folder elsewhere"
        ) from error
    return True


def _named(file: TextIO) -> str:
    file.seek(0)
    return file.read() or "another process"
