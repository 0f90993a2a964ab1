"""Uploads that may break off and go on: until one is whole, it lies in a file of its own.

That file's size is how much has arrived, whatever happened to whoever wrote it, and all else is in
the link. So there is nothing to keep beside it, and nothing that could contradict it.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from jobs.errors import FileExists, OffsetConflict, UploadGone, UploadLocked
from jobs.storage.links import ResumableGrant

HOUR = 3600
TIDY_BATCH = 100  # files deleted at a time


@dataclass(frozen=True, slots=True)
class PartialUpload:
    """One file on its way to ``target``; those of all lie in ``folder``, by hour of expiry."""

    folder: Path
    target: Path
    grant: ResumableGrant

    @property
    def part(self) -> Path:
        """Where the bytes are that have arrived."""
        grant = self.grant
        key = f"{grant.file_path}\n{grant.size}\n{grant.expires_at}"
        hour = str(grant.expires_at // HOUR)
        return self.folder / hour / hashlib.sha256(key.encode()).hexdigest()

    def begin(self) -> None:
        """Make the file. One that is there stays as it is: an answer may have got lost."""
        tidy(self.folder, time.time())
        if os.path.lexists(self.target):
            raise FileExists
        self.part.parent.mkdir(parents=True, exist_ok=True)
        self.part.touch(mode=0o600)

    def offset(self) -> int:
        """Return how many bytes have arrived. What is whole gets its name first."""
        try:
            arrived = self.part.stat().st_size
            if arrived < self.grant.size:
                return arrived
            with self._lock() as file:
                self.keep(file)
        except FileNotFoundError:
            self._check_done()
        return self.grant.size

    def open(self, offset: int) -> BinaryIO:
        """Return the file, to write at its end. It is locked for others until it is closed."""
        try:
            file = self._lock()
        except FileNotFoundError:
            self._check_done()
            raise OffsetConflict from None
        if file.seek(0, os.SEEK_END) != offset:
            file.close()
            raise OffsetConflict
        return file

    def _lock(self) -> BinaryIO:
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(self.part.open("r+b"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise UploadLocked from exc
            if not os.path.samestat(os.fstat(file.fileno()), self.part.stat()):
                raise FileNotFoundError  # this one was kept, or deleted, meanwhile
            closing.pop_all()
        return file

    def keep(self, file: BinaryIO) -> None:
        """Let what has arrived survive the machine; what is whole gets its name."""
        os.fsync(file.fileno())
        if file.seek(0, os.SEEK_END) < self.grant.size:
            return
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self.part, self.target)  # it does not take the place of what is there
        except FileExistsError as exc:
            if not self.part.samefile(self.target):  # else this broke off after the link
                self.part.unlink()
                raise FileExists from exc
        except FileNotFoundError as exc:  # deleted, as it expired more than an hour ago
            raise UploadGone from exc
        self.part.unlink()

    def give_up(self) -> None:
        """Delete what has arrived.

        Not while it is written to: whoever does so would give its name to what came after it.
        """
        try:
            with self._lock():
                self.part.unlink()
        except FileNotFoundError as exc:
            raise UploadGone from exc

    def _check_done(self) -> None:
        """Raise what it means that the part is gone, unless it has become the file."""
        if not self.target.is_file():
            raise UploadGone
        if self.target.stat().st_size != self.grant.size:
            raise FileExists


def tidy(folder: Path, now: float) -> None:
    """Delete parts, a batch of them, whose links have expired for at least an hour."""
    left = TIDY_BATCH
    with contextlib.suppress(FileNotFoundError):  # others tidy, too
        for hour in list(folder.iterdir()):  # a day's, and those that are to go
            if not hour.name.isdecimal() or int(hour.name) + 1 >= now // HOUR:
                continue
            with os.scandir(hour) as found:
                expired = list(islice(found, left))
            for part in expired:
                Path(part).unlink(missing_ok=True)
            left -= len(expired)
            with contextlib.suppress(OSError):  # there are more of them
                hour.rmdir()
