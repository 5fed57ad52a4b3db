"""Files to text, tables, records and arrays, with errors that say where."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from .. import media
from .._common import DataError

T = TypeVar("T")
Where = str | os.PathLike[str]
LARGEST_CELL = 2**31 - 1  # characters; the limit of `csv` is one of the process, and as low as 131,072
LARGEST_MEMBER = 1 << 26  # bytes; a small archive must not unpack to fill the memory


def find(where: Where, *names: str) -> Path:
    """`where` itself if it is a file; otherwise the first of `names` in that folder, plain or gzipped.

    Raises FileNotFoundError that lists the names.
    """
    where = Path(where)
    if where.is_file():
        return where
    for name in names:
        for candidate in (where / name, where / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    what = "in this folder" if where.is_dir() else "there is no such file or folder"
    raise FileNotFoundError(f"{where}: expected {' or '.join(names)} (or the same with .gz), {what}")


def folder(where: Where) -> Path:
    """`where`, if it is a folder."""
    path = Path(where)
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder")
    return path


def content(path: Path) -> bytes:
    """The bytes of a file, unpacked if its name ends in .gz."""
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); get it again") from error


def text(path: Path) -> str:
    try:
        return content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text, at byte {error.start}") from error


def csv_rows(file: Iterable[str], separator: str = ",") -> Any:
    """A reader of rows of cells, which may be as long as a text is; raises csv.Error."""
    csv.field_size_limit(LARGEST_CELL)
    return csv.reader(file, strict=True, delimiter=separator)


def unlike(names: list[str], where: str) -> list[str]:
    """The names of columns, if no two are the same."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"{where}: two columns are named {twice[0]!r}; give one another name")
    return names


class Table:
    """A CSV file by columns, with the columns that are needed."""

    def __init__(self, path: Path, *columns: str) -> None:
        self.path = path
        reader = csv_rows(io.StringIO(text(path), newline=""))
        self.lines: list[int] = []  # where each row ends: a quoted cell may hold line breaks
        cells: list[str] = []
        try:
            self.names = unlike(next(reader, []), f"{path}, line 1")
            if missing := [c for c in columns if c not in self.names]:
                raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(self.names) or 'none'}")
            for row in reader:
                if len(row) != len(self.names):
                    if not row:
                        continue
                    raise DataError(f"{path}, line {reader.line_num}: {len(row)} cells, expected {len(self.names)}")
                cells += row
                self.lines.append(reader.line_num)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
        # strings in one list, not a list for each row: the garbage collector does not look at them again and again
        self._columns = {name: cells[k :: len(self.names)] for k, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, column: str) -> list[str]:
        return self._columns[column]

    def error(self, row: int, column: str, expected: str) -> DataError:
        return DataError(
            f"{self.path}, line {self.lines[row]}, column {column}: expected {expected}, got {self[column][row]!r}"
        )

    def numbers(self, column: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """A column as numbers. Whole numbers may be written with .0; NaN and infinity are refused."""
        whole = np.issubdtype(dtype, np.integer)
        try:
            values = np.array(self[column], dtype=np.float64)
        except ValueError:
            values = np.array([_float(cell) for cell in self[column]])
        wrong = ~np.isfinite(values)
        if whole:
            wrong |= values != np.round(values)
        if wrong.any():
            raise self.error(int(wrong.argmax()), column, "a whole number" if whole else "a number")
        return values.astype(dtype)

    def among(self, column: str, codes: Mapping[str, T]) -> list[T]:
        """A column of codes, each replaced by what it stands for."""
        for row, cell in enumerate(self[column]):
            if cell not in codes:
                raise self.error(row, column, " or ".join(codes))
        return [codes[cell] for cell in self[column]]

    def times(self, column: str, unit: str) -> NDArray[np.datetime64]:
        """A column of dates and times, in universal time where they have a zone."""
        moments = []
        for row, cell in enumerate(self[column]):
            try:
                moment = datetime.fromisoformat(cell)
            except ValueError:
                raise self.error(row, column, "a date and time") from None
            moments.append(moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment)
        return np.array(moments, dtype=f"datetime64[{unit}]")


TRUTH = {"0": False, "1": True, "0.0": False, "1.0": True}


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


def parsed(path: Path) -> Any:
    """The content of a JSON file."""
    return from_json(text(path), str(path))


def from_json(said: str, where: str) -> Any:
    """What JSON says. where: what messages call it."""
    try:
        return json.loads(said)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in said else ""
        raise DataError(f"{where}{line}, column {error.colno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
        raise DataError(f"{where}: JSON that cannot be read ({error})") from error


def unreadable(said: str) -> str | None:
    """What keeps a text from being read by a tokenizer: half of a surrogate pair, as broken JSON has it."""
    try:
        said.encode()
    except UnicodeEncodeError as error:
        return f"is not Unicode at character {error.start + 1}: {said[error.start]!r}, half of a surrogate pair"
    return None


def json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a file with one JSON object a line, each with its place for messages."""
    for number, line in enumerate(text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield of_kind(from_json(line, where), dict, where), where


def of_kind(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """`value`, if it is of this kind."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise DataError(f"{where}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r:.60}")
    return value


def field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """One field of a JSON object, of the kind that it should be."""
    if name not in of_kind(record, dict, where):
        raise DataError(f"{where}: no field {name}; it has {', '.join(record) or 'none'}")
    return of_kind(record[name], kind, f"{where}, field {name}")


def numbers(record: Any, name: str, where: str, length: int | None = None) -> NDArray[np.float32]:
    """A field that is a list of numbers."""
    values = field(record, name, list, where)
    for value in values:
        of_kind(value, (int, float), f"{where}, field {name}")
    if length is not None and len(values) != length:
        raise DataError(f"{where}, field {name}: expected {length} numbers, got {len(values)}")
    return np.array(values, dtype=np.float32)


def arrays(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Arrays of an npz file. Pickled objects are refused: they would run code."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not a whole npz file")
    try:
        with np.load(path, allow_pickle=False) as held:
            if missing := [name for name in names if name not in held]:
                raise DataError(f"{path}: no array {', '.join(missing)}; it has {', '.join(held.files) or 'none'}")
            return {name: held[name] for name in names}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole npz file of plain arrays ({error})") from error


class Files:
    """The files of a folder or of a zip, by their path in it. Nothing is unpacked to disk."""

    def __init__(self, where: Where) -> None:
        self.where = Path(where)
        if self.where.is_dir():
            found = (p for p in self.where.rglob("*") if p.is_file())
            self.names = sorted(p.relative_to(self.where).as_posix() for p in found)
        elif self.where.is_file():
            self.names = sorted(n for n in self._zip.namelist() if not n.endswith("/") and "__MACOSX" not in n)
        else:
            raise FileNotFoundError(f"{self.where}: there is no such folder or zip")

    @property
    def _zip(self) -> zipfile.ZipFile:
        # opened when first needed, and again in each worker process
        if "_opened" not in self.__dict__:
            try:
                self._opened = zipfile.ZipFile(self.where)
            except zipfile.BadZipFile as error:
                raise DataError(f"{self.where}: not a folder, and not a whole zip ({error})") from error
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_opened"}

    def read(self, name: str) -> bytes:
        if self.where.is_dir():
            return (self.where / name).read_bytes()
        try:
            if (size := self._zip.getinfo(name).file_size) > LARGEST_MEMBER:
                raise DataError(f"{self.where}, {name}: {size:,} bytes, too large to be one of these files")
            return self._zip.read(name)
        except KeyError:
            raise DataError(f"{self.where}: no file {name} in it") from None
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self.where}, {name}: damaged ({error})") from error

    def image(self, name: str) -> Image.Image:
        return media.opened(self.read(name), f"{self.where}, {name}")


class Lazy(Sequence[T]):
    """A sequence whose items are read when they are asked for, and not kept."""

    def __init__(self, keys: Sequence[Any], read: Callable[[Any], T]) -> None:
        self._keys, self._read = keys, read

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> Lazy[T]: ...
    def __getitem__(self, i: int | slice) -> T | Lazy[T]:
        return Lazy(self._keys[i], self._read) if isinstance(i, slice) else self._read(self._keys[i])
