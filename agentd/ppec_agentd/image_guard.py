# SPDX-License-Identifier: Apache-2.0
"""The last look before an image's file is removed: does anybody have it open? The kernel says, by two means.

- Locks. QEMU holds open-file-description locks on bytes of each image it has open, of a whole backing chain (its
  docs: "image locking"). A lock is seen whoever holds it, also from another namespace.
- A write lease, which the kernel grants only if nobody else has the file open: QEMU with its locking off, a loop
  device, a copy under way. Who opens the file while we have the lease waits until we let go of it.

/proc is of no use here: without CAP_SYS_PTRACE it shows the files of no other user's process. The lease isn't to be had
on every file system, nor, without CAP_LEASE, for a file that libvirt gave to QEMU's user: the locks alone tell then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

# struct flock on 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi0q")
_HELD = (errno.EAGAIN, errno.EBUSY)
_NO_LEASE_HERE = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def unopened(path: Path) -> Iterator[bool]:
    """Whether nobody else has the file open. Raises OSError if that can't be told, or the file isn't there.

    Where leases are to be had, that holds until the block ends.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield not is_locked(file) and lease(file) is not False
    finally:
        # The lease ends with it.
        os.close(file)


def is_locked(file: int) -> bool:
    """Whether anybody else holds any lock on any byte of the open file. Raises OSError."""
    ours = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    in_the_way, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, ours))
    return bool(in_the_way != fcntl.F_UNLCK)


def lease(file: int) -> bool | None:
    """Takes the lease: False if somebody else has the file open, None if there is no lease to be had. Raises OSError.

    `file` must be open for reading only; the lease ends when it is closed.
    """
    # Who opens the file meanwhile has a signal sent to us. The default, SIGIO, would end the agent; this is ignored.
    fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LEASE_HERE:
            return None
        raise
    return True
