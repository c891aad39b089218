"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a file system says that has no such locks, as some network disks do not.
_WITHOUT_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a lock file while inside. Raises ValueError when another process does, naming that one.

    The system lets go when a process ends, however it ends: a killed run leaves a file, but no lock. The file stays, as
    another may have opened it just before it is removed. Where the file system knows no locks, there is none, and it is
    for the user not to start two runs.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise ValueError(
                f"out: {path.parent} is being written by {who}; wait until it ends, or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
