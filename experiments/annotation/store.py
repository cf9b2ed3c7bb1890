"""The file of labels: lines are appended, one at a time, under a lock that all servers and tabs share.

A line is on the disk before the next pair is shown. What a killed process left half written was never acknowledged; it
is cut off before the next line.
"""

import contextlib
import fcntl
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhfjax.data import LabelBook
from rlhfjax.data.datasets import whole_length

STARTS = (b'{"label": ', b'{"undo": ', b'{"seed": ')  # how the lines begin that are written here


@dataclass
class Store:
    """A file of labels and what it amounts to so far. `open_store` makes one."""

    path: Path
    book: LabelBook = field(default_factory=LabelBook)
    read: int = 0  # bytes of the file that are in the book
    lines: int = 0
    threads: threading.RLock = field(default_factory=threading.RLock)

    def refresh(self) -> LabelBook:
        """Enters what others have appended since; returns the book."""
        with self.threads, open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.read:
                raise ValueError(
                    f"{self.path} has become shorter: another program has written to it. Start again"
                )
            file.seek(self.read)
            content = file.read()
            content = content[: content.rfind(b"\n") + 1]
            self._enter(content)
            return self.book

    def append(self, make: Callable[[LabelBook], Mapping[str, Any] | None]) -> bool:
        """Appends what `make` makes of the labels that are there, nothing for None; returns whether it did.

        The line is on the disk when this returns. Raises OSError, and leaves the file as it was, where it cannot be.
        """
        with self.threads, _locked(self.path) as descriptor:
            _cut_torn_line(descriptor, self.path)
            row = make(self.refresh())
            if row is None:
                return False
            _write(descriptor, self.path, json.dumps(row).encode() + b"\n")
            self.refresh()
            return True

    def _enter(self, content: bytes) -> None:
        for line in content.splitlines():
            self.lines += 1
            where = f"{self.path}:{self.lines}"
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not JSON ({error}); mend or delete that line") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: a JSON object is needed; mend or delete that line")
                self.book.take(row, where)
        self.read += len(content)


def open_store(path: Path) -> Store:
    """Opens the file of labels, or makes it with a seed of its own. Raises ValueError for a file of something else."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --labels is a file")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to keep the labels in; make it first")
    new = not path.exists()
    with _locked(path) as descriptor:
        store = Store(path)
        store.refresh()  # a file of something else is refused before it is touched
        _cut_torn_line(descriptor, path)
        if store.refresh().seed is None:
            _write(descriptor, path, json.dumps({"seed": secrets.token_hex(16)}).encode() + b"\n")
            store.refresh()
        if new:
            _sync_folder(path.parent)
    return store


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open to append, while no other process or thread has it so. The kernel frees the lock of the dead."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path} cannot be locked ({error.strerror}): keep the labels on a disk of this machine (--labels)",
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _cut_torn_line(descriptor: int, path: Path) -> None:
    """Ends the last line where only its end is missing, and cuts it off where it is half of one of ours."""
    size = os.fstat(descriptor).st_size
    start = size
    tail = b""
    while start > 0 and b"\n" not in tail:
        start = max(0, start - 65536)
        tail = os.pread(descriptor, size - start, start)
    last = tail[tail.rfind(b"\n") + 1 :]
    if not last:
        return
    if whole_length(last):  # all but its end came through
        _write_all(descriptor, b"\n")
    elif any(last[: len(start)] == start[: len(last)] for start in STARTS):
        os.ftruncate(descriptor, size - len(last))
    else:
        raise ValueError(f"{path} ends in what is no label: {last[:80]!r}; mend or delete that line")


def _write(descriptor: int, path: Path, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        _write_all(descriptor, line)
        os.fsync(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise OSError(
            error.errno, f"cannot write {path} ({error.strerror}). All labels before are safe: make room"
        ) from error


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
