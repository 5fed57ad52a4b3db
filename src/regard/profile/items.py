"""What a profile is taken over: texts and pictures, read one by one from files, folders, tables or any iterable."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as made
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import DataError, media
from ..data.loaders import files as data
from ..extras import needs

_TEXTS = (".txt", ".md", ".text")
_NAMED = 3  # rows that were left out whose faults are told


@dataclass(frozen=True)
class Item:
    """One text, or one picture: a file, the bytes of one, or an opened one."""

    id: str
    text: str | None = None
    image: Path | bytes | Image.Image | None = None

    def picture(self) -> Image.Image:
        assert self.image is not None
        return media.picture(self.image, self.id)


class BadRow(DataError):
    """One row that holds no item, of a source that may be fine otherwise."""


@dataclass
class Skipped:
    """The rows that were left out since reading last began: how many, and what is wrong with the first few."""

    count: int = 0
    first: list[str] = made(default_factory=list)

    def add(self, why: str) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(why)


@dataclass(frozen=True)
class Source:
    """Items of a file or folder; can be read again, and says whether it is still the same."""

    path: Path
    field: str | None = None
    skip_bad: bool = False
    skipped: Skipped = made(default_factory=Skipped, compare=False)

    def __iter__(self) -> Iterator[Item]:
        self.skipped.count, self.skipped.first[:] = 0, []
        for row in _reader(self.path)(self.path, self.field):
            if isinstance(row, Item):
                yield row
            elif self.skip_bad:
                self.skipped.add(str(row))
            else:
                raise row

    def state(self) -> list[Any]:
        """Name, size and time of change of each file, the field, and whether bad rows are left out."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file()) if self.path.is_dir() else [self.path]
        stats = ((file, file.stat()) for file in files)
        held = [self.field, *([str(file.resolve()), s.st_size, s.st_mtime_ns] for file, s in stats)]
        return [*held, "skip_bad"] if self.skip_bad else held


def read(path: str | Path, field: str | None = None, *, skip_bad: bool = False) -> Source:
    """The items of a file or folder, read as they are asked for.

    A `.txt` file gives one text a line; `.jsonl`, `.csv` and `.parquet` one item a row, from the column `field`; a
    folder one item a file, of texts or of pictures; a folder written by `datasets`' `save_to_disk` one a row. Without
    `field`, the column `text` is taken, or the only one that holds texts or pictures, and it must be the same in every
    row. A row without it is a DataError that says where.

    skip_bad: leave out rows of `.jsonl`, `.csv` and `.parquet` that cannot be read, or hold nothing in `field`; how
    many there were is in `skipped`, once all is read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    reader = _reader(path)
    if field is not None and reader in (_lines, _folder):
        raise DataError(f"{path} has no fields; leave field={field!r} out")
    return Source(path, field, skip_bad)


def items(things: Iterable[Any], field: str | None = None) -> Iterator[Item]:
    """Texts, pictures, rows (mappings) or items of any iterable, as items; their ids are their places in it."""
    of_row = _Rows(field)
    for i, thing in enumerate(things):
        if isinstance(thing, Item):
            yield thing
        elif isinstance(thing, Mapping):
            yield of_row.item(thing, str(i), f"item {i}")
        elif isinstance(thing, str):
            yield Item(str(i), text=_readable(thing, f"item {i}"))
        elif isinstance(thing, Image.Image):
            yield Item(str(i), image=thing)
        else:
            raise TypeError(f"item {i} is a {type(thing).__name__}; expected a text, a picture, a row or an Item")


def _reader(path: Path) -> Callable[[Path, str | None], Iterator[Item | BadRow]]:
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            held = path / "dataset_dict.json"
            splits = data.field(data.parsed(held), "splits", list, str(held))
            raise DataError(
                f"{path} holds several splits; give one of them: {', '.join(str(path / s) for s in splits)}"
            )
        return _dataset if (path / "dataset_info.json").is_file() else _folder
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet, **dict.fromkeys(_TEXTS, _lines)}
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a folder or a file that ends in {', '.join(readers)}")
    return readers[path.suffix]


def _lines(path: Path, field: str | None) -> Iterator[Item]:
    for number, line in _numbered(path):
        yield Item(f"{path.name}:{number}", text=line)


def _json_lines(path: Path, field: str | None) -> Iterator[Item | BadRow]:
    of_row = _Rows(field)
    for number, line in _numbered(path):
        where = f"{path}, line {number}"
        try:
            row = data.of_kind(data.from_json(line, where), dict, where)
        except DataError as error:
            yield BadRow(str(error))
        else:
            yield of_row(row, f"{path.name}:{number}", where)


def _csv(path: Path, field: str | None) -> Iterator[Item | BadRow]:
    of_row = _Rows(field)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = data.csv_rows(file)
        try:
            names = data.unlike(next(rows, []), f"{path}, line 1")
            for cells in rows:
                where = f"{path}, line {rows.line_num}"
                if not cells:
                    continue
                if len(cells) != len(names):
                    yield BadRow(f"{where}: not as many cells as the {len(names)} columns")
                    continue
                yield of_row(dict(zip(names, cells)), f"{path.name}:{rows.line_num}", where)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}") from error


def _parquet(path: Path, field: str | None) -> Iterator[Item | BadRow]:
    with needs("Parquet", "datasets"):
        import pyarrow
        import pyarrow.parquet
    of_row = _Rows(field)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field is not None and field not in file.schema_arrow.names:
                raise DataError(f"{path}: no field {field}; it has {', '.join(file.schema_arrow.names) or 'none'}")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=None if field is None else [field]):
                for row in batch.to_pylist():
                    yield of_row(row, f"{path.name}:{number}", f"{path}, row {number}")
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a whole Parquet file ({error})") from error


def _dataset(path: Path, field: str | None) -> Iterator[Item | BadRow]:
    with needs("a saved data set", "datasets"):
        import datasets
    of_row = _Rows(field)
    try:
        rows: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # of pyarrow, or whatever its JSON files lack
        raise DataError(f"{path}: not a whole data set ({error})") from error
    for number, row in enumerate(rows):
        yield of_row(row, f"{path.name}:{number}", f"{path}, row {number}")


def _folder(path: Path, field: str | None) -> Iterator[Item]:
    pictures = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    found = 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name, suffix = file.relative_to(path).as_posix(), file.suffix.lower()
        if suffix in _TEXTS:
            try:
                yield Item(name, text=file.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(f"{file}: not UTF-8 text, at byte {error.start}") from error
        elif suffix in pictures:
            yield Item(name, image=file)
        else:
            continue
        found += 1
    if not found:
        raise DataError(f"{path}: no text ({', '.join(_TEXTS)}) and no picture in this folder")


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number, from 1."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 text, at byte {error.start}") from error
            if line:
                yield number, line


class _Rows:
    """Rows of one source to items, all from the same column: the one that was asked for, or the first row's."""

    def __init__(self, field: str | None) -> None:
        self.asked, self.field = field, field

    def __call__(self, row: Mapping[str, Any], id: str, where: str) -> Item | BadRow:
        try:
            return self.item(row, id, where)
        except BadRow as error:
            return error

    def item(self, row: Mapping[str, Any], id: str, where: str) -> Item:
        """BadRow where this row holds no item; DataError where it cannot be told which column is meant."""
        has = ", ".join(map(str, row)) or "none"
        if self.asked is None:
            usable = ["text"] if "text" in row else [name for name, value in row.items() if _usable(value)]
            if self.field is None and len(usable) != 1:
                raise DataError(f"{where}: which field to read? It has {has}; give field=")
            self.field = self.field or usable[0]
            if usable not in ([self.field], []):
                raise DataError(
                    f"{where}: which field to read? It has {has}, and the rows before were read from {self.field}; "
                    f"give field="
                )
        assert self.field is not None
        if self.field not in row:
            raise BadRow(f"{where}: no field {self.field}; it has {has}")
        value, where = row[self.field], f"{where}, field {self.field}"
        if not _usable(value):
            raise BadRow(f"{where}: expected a text or a picture, got {value!r:.60}")
        if isinstance(value, str):
            if why := data.unreadable(value):
                raise BadRow(f"{where}: the text {why}")
            return Item(id, text=value)
        if isinstance(value, Mapping):  # a picture as `datasets` keeps it in a table
            value = value.get("bytes") or Path(value["path"])
        return Item(id, image=value)


def _readable(text: str, where: str) -> str:
    if why := data.unreadable(text):
        raise DataError(f"{where}: the text {why}")
    return text


def _usable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes") or None, bytes) or isinstance(value.get("path") or None, str)
    return isinstance(value, (str, bytes, Image.Image))
