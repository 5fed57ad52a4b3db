"""Files and folders that are whole or not there at all, and that take no other's place.

What Regard writes for a user says so: a file holds `MARK` near its beginning or end; the `zarr.json` of a zarr folder
holds it with a list of all files, their sizes and checksums. Only such a file or folder is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "written by Regard, which may replace it"
ROOT = "zarr.json"
_SEAL = "(the checksum of this file)"  # stands for it while it is computed
_NEAR = 4096  # bytes at both ends of a file in which its mark stands


@contextmanager
def written_aside(path: Path, *, lasting: bool = False) -> Iterator[Path]:
    """A draft beside `path` to write to, which takes its place when the block ends, and goes where the block fails.

    The draft is a file or a folder. lasting: what was written to a file is on the disk before it takes that place, so
    that a power cut leaves one or the other.
    """
    own = f"{os.getpid()}-{secrets.token_hex(3)}"  # machines that share a disk may have processes of one number
    draft, old = (path.with_name(f".{path.name}.{own}.{end}") for end in ("part", "old"))
    try:
        yield draft
        if lasting:
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
        if draft.is_dir():
            _take_place(draft, path, old)
        else:
            os.replace(draft, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        _remove(draft)
        _remove(old)


def _take_place(draft: Path, path: Path, old: Path) -> None:
    """Rename a folder to `path`, what stands there to `old`. Of several processes that do so at once, the last wins."""
    while True:
        try:
            return os.rename(draft, path)  # which takes the place of an empty folder only
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES) or not path.exists():
                raise
        _remove(old)
        with suppress(FileNotFoundError):  # another process was first
            os.rename(path, old)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """`written_aside` for what a user asked for: FileExistsError where it would replace what Regard did not write.

    A folder, a zarr, gets its list of files as the block ends. A file must hold the mark, or it is never replaced.
    """
    refuse_foreign(path)
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    with written_aside(path) as draft:
        yield draft
        if draft.is_dir():
            root = json.loads((draft / ROOT).read_bytes())
            files = {name: [len(raw), _checksum(raw)] for name, raw in _content(draft) if name != ROOT}
            root["attributes"]["regard"] = {"about": MARK, "seal": _SEAL, "files": files}
            raw = json.dumps(root, indent=1).encode()
            (draft / ROOT).write_bytes(raw.replace(_SEAL.encode(), _checksum(raw).encode(), 1))


def refuse_foreign(*paths: Path) -> None:
    """Raise FileExistsError where something stands at a path that Regard did not write."""
    for path in paths:
        try:
            why = _foreign(path)
        except FileNotFoundError as error:
            why = str(error)
        if why is not None:  # another process may just be replacing it
            time.sleep(0.1)
            why = _foreign(path)
        if why is not None:
            raise FileExistsError(
                f"{path} exists and is not a recording, page or picture that Regard wrote ({why}); choose another "
                f"name, or move it away"
            )


def intact(folder: Path) -> bool:
    """Whether a zarr lists its files. ValueError where one is not as it was written, with its name."""
    listed = _listed(folder)
    if listed is None:
        return False
    for name, raw in _content(folder):
        if name == ROOT or name.rpartition("/")[2].startswith("."):  # as file managers leave them
            continue
        if name not in listed:
            raise ValueError(f"{name} was not there when it was written; move it away")
        if [len(raw), _checksum(raw)] != listed.pop(name):
            raise ValueError(f"{name} is damaged: it is not as it was written")
    if listed:
        raise ValueError(f"{min(listed)} is missing")
    return True


def with_section(page: str, name: str, made: str) -> str:
    """A page of Markdown whose section of this name is made anew; at its end where there is none yet.

    It stands between two comments, so that what others make, or wrote, is left alone. ValueError where one is missing.
    """
    begin, end = f"<!-- section {name} -->", f"<!-- end of section {name} -->"
    section = f"{begin}\n\n{made.strip()}\n\n{end}"
    if (page.count(begin), page.count(end)) == (0, 0):
        return f"{page.rstrip()}\n\n{section}\n".lstrip()
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found or begin in rest or end in after:
        raise ValueError(f"a section begins with {begin} and ends with {end}, once in a page; put that right first")
    return f"{before}{section}{after}"


def _foreign(path: Path) -> str | None:
    """What tells that Regard did not write this, None where it did or nothing is there."""
    if path.is_dir():
        try:
            listed = _listed(path) if (path / ROOT).is_file() else None
        except (OSError, ValueError) as error:
            return str(error)
        if listed is None:
            return "it lacks the mark that its folders have"
        others = (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
        other = next((name for name in others if name not in listed and name != ROOT), None)
        return None if other is None else f"{other} in it is not of it"
    if path.is_symlink() and not path.exists():
        return "a link to nowhere"
    if not path.exists():
        return None
    if not path.is_file():
        return "no file and no folder"
    with path.open("rb") as file:
        ends = file.read(_NEAR)
        file.seek(-min(_NEAR, path.stat().st_size), os.SEEK_END)
        ends += file.read()
    return None if MARK.encode() in ends else "it lacks the mark that its files have"


def _listed(folder: Path) -> dict[str, list[object]] | None:
    """The files that a zarr lists, None where it was written without a list. ValueError where the list is damaged."""
    raw = (folder / ROOT).read_bytes()
    try:
        attributes = json.loads(raw)["attributes"]
        if not attributes:
            return None
        held = attributes["regard"]
        if held["about"] != MARK or _checksum(raw.replace(held["seal"].encode(), _SEAL.encode(), 1)) != held["seal"]:
            raise ValueError("it is not as it was written")
        return dict(held["files"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{ROOT} is not Regard's, or damaged: {error or type(error).__name__}") from error


def _content(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        yield file.relative_to(folder).as_posix(), file.read_bytes()


def _checksum(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
