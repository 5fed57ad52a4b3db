"""State on disk, such as a profile's: every batch is appended to a journal, which now and then becomes a snapshot.

A process that is killed at any moment loses at most the batch under way: a batch counts once its record is whole in
the journal (length and checksum), and a snapshot takes the journal's place by a rename. What follows the last whole
record, torn, zeros or anything else, is cut away and counted.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..files import written_aside

_OWN = re.compile(r"(journal|snapshot)\.\d+|origin\.json|lock|\..*\.part")
SNAPSHOT_BYTES = 16 * 2**20  # length of journal after which a snapshot is taken


class Journal:
    """Records and snapshots in `folder`; both are bytes, which mean nothing here."""

    def __init__(self, folder: Path, origin: dict[str, Any], what: str = "profile") -> None:
        """origin: what the records come from, as JSON; a folder that was begun with another is refused.

        what: the word for what is made, in errors.
        """
        self.folder, self.origin, self.what = folder, origin, what
        self.number = 0  # of the snapshot that the journal goes on from
        self.cut = 0  # bytes that followed the last whole record
        self._check()
        self._lock()
        self.file = (folder / self._name("journal")).open("ab")

    def replay(self) -> tuple[bytes | None, Iterator[bytes]]:
        """The last snapshot, and the whole records after it."""
        if not self.number:
            return None, self._records()
        snapshot = self.folder / self._name("snapshot")
        with snapshot.open("rb") as file:
            state = _read(file)
        if state is None:
            raise ValueError(f"{snapshot} is damaged, so that this cannot go on; delete {self.folder} to begin anew")
        return state, self._records()

    def append(self, record: bytes) -> None:
        self.file.write(_head(record) + record)
        self.file.flush()

    @property
    def full(self) -> bool:
        return self.file.tell() >= SNAPSHOT_BYTES

    def snapshot(self, state: bytes) -> None:
        """`state` stands for all records so far."""
        old = [self.folder / self._name("journal"), self.folder / self._name("snapshot")]
        with written_aside(self.folder / f"snapshot.{self.number + 1}", lasting=True) as draft:
            draft.write_bytes(_head(state) + state)
        self.number += 1
        self.file.close()
        self.file = (self.folder / self._name("journal")).open("ab")
        for path in old:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self.file.close()
        self.lock.close()

    def remove(self) -> None:
        """What was written here; what else lies in the folder stays."""
        self.close()
        for path in self.folder.iterdir():
            if _OWN.fullmatch(path.name):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _name(self, what: str) -> str:
        return f"{what}.{self.number}"

    def _check(self) -> None:
        path = self.folder / "origin.json"
        if not path.exists():
            if self.folder.exists() and any(p.suffix != ".part" for p in self.folder.iterdir()):
                raise FileExistsError(
                    f"{self.folder} exists and is not the state of a {self.what}; choose another name"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_aside(path, lasting=True) as draft:
                draft.write_text(json.dumps(self.origin, indent=1))
        try:
            before = json.loads(path.read_text())
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise ValueError(
                f"{path} does not say what it was begun with (empty, or damaged): delete {self.folder} to begin anew, "
                f"or choose another output"
            )
        now = json.loads(json.dumps(self.origin))
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            told = "; ".join(f"{name}: {_short(before.get(name))}, now {_short(now.get(name))}" for name in changed)
            raise ValueError(
                f"{self.folder} was begun otherwise ({told}). Run it as it was begun to go on, delete that folder to "
                f"begin anew, or choose another output"
            )
        numbers = [int(p.suffix[1:]) for p in self.folder.glob("snapshot.*") if p.suffix[1:].isdigit()]
        self.number = max(numbers, default=0)

    def _lock(self) -> None:
        self.lock = (self.folder / "lock").open("wb")
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise ValueError(f"{self.folder} is in use: this {self.what} is being made by another process") from None

    def _records(self) -> Iterator[bytes]:
        whole = 0
        with (self.folder / self._name("journal")).open("rb") as file:
            while (record := _read(file)) is not None:
                whole = file.tell()
                yield record
        self.cut = self.file.tell() - whole
        self.file.truncate(whole)
        self.file.seek(whole)


def _head(record: bytes) -> bytes:
    return len(record).to_bytes(8, "little") + zlib.crc32(record).to_bytes(4, "little")


def _read(file: BinaryIO) -> bytes | None:
    """The record that begins here, None where no whole one does. None is empty, so zeros are none."""
    head = file.read(12)
    size, left = int.from_bytes(head[:8], "little"), os.fstat(file.fileno()).st_size - file.tell()
    if len(head) < 12 or not 0 < size <= left:
        return None
    record = file.read(size)
    return record if _head(record) == head else None


def _short(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 60 else said[:57] + "..."
