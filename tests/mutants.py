"""`python -m tests.mutants [KEY ...]`: are methods' tests such that a small change of the method makes one fail?

Of each file some changes are drawn, by a seed: a sign, an operator, a comparison, a number, sum for mean. The changed
file stands in a copy of the package, which is what is imported (that is checked), and the row's tests run: those of its
room that name it, and its values made by others. A change that no test sees is printed, with its line. Some of these
change nothing that could be seen; the others want a test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import inspect
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "regard"

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMBINED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
JOINED = {ast.And: ast.Or, ast.Or: ast.And}
_PAIRS = "sum mean, amax amin, max min, maximum minimum, argmax argmin, floor ceil, cos sin, tril triu"
CALLED = {one: other for pair in _PAIRS.split(", ") for one, other in (pair.split(), pair.split()[::-1])}
DROPPED = ("abs", "sqrt", "square", "clamp", "clamp_min", "clamp_max", "exp", "log", "relu", "detach", "norm")


class Change(NamedTuple):
    line: int
    said: str
    apply: Callable[[], None]  # to the tree that it was found in


class _Changes(ast.NodeVisitor):
    """Everything in a tree that could be changed. Messages, types, imports and decorators are left alone."""

    def __init__(self) -> None:
        self.found: list[Change] = []

    def note(self, node: Any, said: str, change: Callable[[], None]) -> None:
        self.found.append(Change(node.lineno, said, change))

    def visit_Raise(self, node: ast.Raise) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, operator in enumerate(node.ops):
            if (other := COMPARED.get(type(operator))) is not None:
                self.note(
                    node, f"{ast.unparse(node)}: {_sign(operator)} to {_sign(other())}", _put(node.ops, i, other())
                )
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = COMBINED.get(type(node.op))
        if other is not None and not isinstance(node.left, ast.Constant | ast.JoinedStr) | _is_type(node):
            said = f"{ast.unparse(node)}: {_sign(node.op)} to {_sign(other())}"
            self.note(node, said, lambda: setattr(node, "op", other()))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = JOINED[type(node.op)]
        self.note(node, f"{ast.unparse(node)}: to {other.__name__.lower()}", lambda: setattr(node, "op", other()))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub | ast.Invert):
            same = ast.UAdd() if isinstance(node.op, ast.USub) else None
            if same is not None:
                self.note(node, f"{ast.unparse(node)}: sign dropped", lambda: setattr(node, "op", same))
            else:
                self.note(node, f"{ast.unparse(node)}: not inverted", _become(node, node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.note(node, f"{value} to {not value}", lambda: setattr(node, "value", not value))
        elif isinstance(value, int):
            self.note(node, f"{value} to {value + 1}", lambda: setattr(node, "value", value + 1))
        elif isinstance(value, float):
            self.note(node, f"{value} to {value * 2 + (value == 0)}", lambda: setattr(node, "value", value * 2 or 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute):
            if (other := CALLED.get(called.attr)) is not None:
                self.note(node, f"{ast.unparse(node)}: to {other}", lambda: setattr(called, "attr", other))
            elif called.attr in DROPPED and not isinstance(called.value, ast.Name):
                self.note(node, f"{ast.unparse(node)}: dropped", _become(node, called.value))
        self.generic_visit(node)


def _put(within: list[Any], i: int, value: Any) -> Callable[[], None]:
    return lambda: within.__setitem__(i, value)


def _become(node: ast.AST, other: ast.AST) -> Callable[[], None]:
    """One node in another's place: a call that gives its first argument would not do for keywords."""

    def change() -> None:
        kept = copy.copy(other)
        node.__class__ = kept.__class__
        node.__dict__ = kept.__dict__

    return change


def _sign(operator: ast.AST) -> str:
    return type(operator).__name__


def _is_type(node: ast.BinOp) -> bool:
    """X | None, and the like, outside annotations."""
    return isinstance(node.right, ast.Constant) and node.right.value is None


def changes(text: str) -> list[Change]:
    """All changes of a file."""
    found = _Changes()
    found.visit(ast.parse(text))
    return found.found


def changed(text: str, number: int) -> str:
    tree = ast.parse(text)
    found = _Changes()
    found.visit(tree)
    found.found[number].apply()
    return ast.unparse(ast.fix_missing_locations(tree))


class Row(NamedTuple):
    key: str
    room: str
    stem: str

    @property
    def file(self) -> Path:
        return Path(self.room) / f"{self.stem}.py"


class _Chosen:
    """A plugin of pytest: of a room's tests those that name a row, or anything that its file defines."""

    def __init__(self, row: Row) -> None:
        tree = ast.parse((SOURCE / row.file).read_text())
        defined = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        self.row, self.names = row, {row.stem, row.key, *(name for name in defined if len(name) > 4)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if self.belongs(item)]

    def named(self, text: str) -> bool:
        return any(name in text for name in self.names)

    def belongs(self, item: Any) -> bool:
        if item.path.stem == f"test_{self.row.stem}":
            return True
        source = inspect.getsource(item.function)
        return self.row.stem in item.nodeid.partition("::")[2] or self.named(source)


def run(row: Row, package: Path, limit: float) -> tuple[bool, float]:
    """Whether all tests of a row pass with the package that stands here, in a process of its own; and the seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 2
        try:
            code = _tests(row, package)
        finally:
            os._exit(code)
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 77:
                raise RuntimeError(f"not the copy is imported, but something else: {package}")
            return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, time.monotonic() - began
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, limit


def _tests(row: Row, package: Path) -> int:
    import pytest

    hide = os.open(os.devnull, os.O_WRONLY)
    os.dup2(hide, 1)
    os.dup2(hide, 2)
    # the finder of an editable installation stands before the path
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    sys.path.insert(0, str(package))
    import regard

    if not Path(regard.__file__).is_relative_to(package):
        return 77
    os.chdir(ROOT)
    if not _values(row):
        return 1
    chosen = _Chosen(row)
    places = [str(p) for p in sorted(ROOT.glob(f"tests/{row.room}/test_*.py")) if chosen.named(p.read_text())]
    early = "ignore::pytest.PytestAssertRewriteWarning"  # of what is imported before the processes part
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", early, *places], plugins=[chosen]))


def _values(row: Row) -> bool:
    """Whether the row is equal to values that others made, where there are any."""
    sys.path.insert(0, str(ROOT / "tests"))
    import golden

    cases = golden.cases(row.key)
    mapping = importlib.import_module(f"golden.{row.room}.{row.stem}") if cases else None
    for case in cases:
        try:
            found = golden.differences(mapping, case)
        except golden.Unmapped:
            continue
        if any(not of.off <= of.allowed for of in found.values()):
            return False
    return True


def tried(row: Row, package: Path, most: int, seed: int) -> tuple[int, list[str]]:
    """How many changes were tried, and those that no test saw. Raises RuntimeError where tests fail without any."""
    file, text = package / "regard" / row.file, (SOURCE / row.file).read_text()
    found = changes(text)
    drawn = random.Random(f"{seed} {row.key}").sample(range(len(found)), min(most, len(found)))
    passed, seconds = run(row, package, 1800.0)
    if not passed:
        raise RuntimeError(f"{row.key}: its tests fail as it is, or it has none")
    unseen = []
    for number in sorted(drawn):
        file.write_text(changed(text, number))
        try:
            if run(row, package, 30 + 4 * seconds)[0]:
                unseen.append(f"{row.file}:{found[number].line}  {found[number].said}")
        finally:
            file.write_text(text)
    return len(drawn), unseen


def rows(room: str | None, keys: list[str]) -> Iterator[Row]:
    from regard import catalog

    for row in catalog.rows().values():
        module = row.object.partition(":")[0].split(".")
        if len(module) == 3 and (room in (None, row.room)) and (not keys or row.key in keys):
            yield Row(row.key, row.room, module[2])


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    asked.add_argument("keys", nargs="*", help="of papers; all that are built where none is named")
    asked.add_argument("--room")
    asked.add_argument("--most", type=int, default=20, help="changes of a file (20)")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    of = [Row(*row) for row in _apart(lambda: [tuple(row) for row in rows(given.room, given.keys)])]
    _ready()
    caught = total = 0
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        shutil.copytree(SOURCE, package / "regard", ignore=shutil.ignore_patterns("__pycache__"))
        for row in of:
            try:
                n, unseen = tried(row, package, given.most, given.seed)
            except RuntimeError as error:
                print(error, flush=True)
                continue
            caught, total = caught + n - len(unseen), total + n
            print(f"{row.key}: {n - len(unseen)} of {n}", *unseen, sep="\n    ", flush=True)
    if total:
        print(f"caught {caught} of {total}, {caught / total:.0%}")


def _apart(ask: Callable[[], Any]) -> Any:
    """What a function gives in a process of its own, so that nothing of the package is imported in this one."""
    import json

    out, into = os.pipe()
    if (child := os.fork()) == 0:
        os.write(into, json.dumps(ask()).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as given:
        found = json.loads(given.read())
    os.waitpid(child, 0)
    return found


def _ready() -> None:
    """Import what tests need, once for all processes that follow; the kernel is the one that is installed."""
    library = _apart(_kernel)
    if library:
        os.environ.setdefault("REGARD_NATIVE", library)
    for name in ("torch", "transformers", "xarray", "scipy.stats", "sklearn.linear_model", "pytest"):
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)


def _kernel() -> str | None:
    found = importlib.util.find_spec("regard.kernels.native._native")
    return found.origin if found else None


if __name__ == "__main__":
    main()
