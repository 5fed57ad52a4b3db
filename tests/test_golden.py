"""Methods beside values that others made: whatever cases stand in the folder `REGARD_GOLDEN`."""

from __future__ import annotations

from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from golden import Case, Source, Unmapped, difference, differences

from regard.catalog import rows

MAPPINGS = golden.mappings()
BUILT = {key for key, row in rows().items() if row.object}
ABSENT = pytest.mark.skip(reason=f"no folder {golden.FOLDER}: set REGARD_GOLDEN")


def _every():
    if not golden.FOLDER.is_dir():
        return [pytest.param("", None, marks=ABSENT)]
    return [pytest.param(key, case, id=f"{key}-{case.name}") for key in MAPPINGS for case in golden.cases(key)]


@pytest.mark.parametrize(("key", "case"), _every())
def test_equal(key, case):
    try:
        found = differences(MAPPINGS[key], case)
    except Unmapped as reason:
        pytest.skip(str(reason))
    off = {name: f"{d.off:.1e}, may be {d.allowed:.0e}" for name, d in found.items() if not d.off <= d.allowed}
    assert not off


def test_every_built_row_with_values_is_compared():
    assert {path.stem for path in golden.FOLDER.glob("*.npz")} & BUILT <= MAPPINGS.keys()


@pytest.mark.parametrize("key", MAPPINGS)
def test_a_mapping_is_of_a_built_row_and_says_whose_the_values_are(key):
    assert key in BUILT
    assert MAPPINGS[key].__name__.split(".")[-2] == rows()[key].room
    assert MAPPINGS[key].SOURCE.kind in ("authors", "reimplementation")
    assert MAPPINGS[key].SOURCE.name


@pytest.mark.parametrize(
    ("ours", "theirs", "allowed"),
    [
        (1.0, 1.001, 1e-5),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), 1e-5),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf]), 1e-5),
        (torch.ones(2, 1), torch.ones(2), 1e-5),
        (torch.tensor([True, False]), torch.tensor([True, True]), 0.0),
        (torch.tensor([3, 4]), torch.tensor([3, 5]), 0.0),
        (torch.tensor([1e-3, 2.001e-3]), torch.tensor([1e-3, 2e-3]), 1e-5),  # in shares of the largest
    ],
)
def test_what_differs_is_seen(ours, theirs, allowed):
    found = difference(ours, theirs, allowed)
    assert found.off > found.allowed


def test_what_is_equal_to_rounding_is_let_pass():
    one = torch.tensor([1.0, 1000.0, torch.nan, -torch.inf])
    assert difference(one, one * (1 + 1e-7)) == (pytest.approx(1e-7, rel=0.5), 1e-5)
    assert difference(one.double(), one.double()).allowed == 1e-9
    assert difference(np.array([1, 2]), torch.tensor([1, 2])) == (0.0, 0.0)


def test_a_gradient_that_is_not_compared_is_an_error():
    case = Case("key", "case0", {}, {"output": torch.ones(2), "grad_query": torch.ones(2)})
    mapping = SimpleNamespace(SOURCE=Source("authors", ""), compare=lambda case: {"output": torch.ones(2)})
    with pytest.raises(ValueError, match="grad_query is left out"):
        differences(mapping, case)
    mapping.compare = lambda case: {}
    with pytest.raises(ValueError, match="nothing is compared"):
        differences(mapping, case)


def test_settings_are_found_wherever_they_stand(tmp_path):
    for settings in ({"settings": '[{"a": 1}, {"a": 2}]'}, {"settings": np.array(['{"a": 1}', '{"a": 2}'])}):
        np.savez(tmp_path / "key.npz", **settings, **{"case0.x": np.ones(1), "case1.x": np.ones(1)})
        assert [case.settings for case in golden.read(tmp_path / "key.npz")] == [{"a": 1}, {"a": 2}]
    held = {f"case{i}.settings": f'{{"a": {i}}}' for i in (10, 2)} | {"case2.kind": "b"}
    np.savez(tmp_path / "key.npz", **held)
    found = golden.read(tmp_path / "key.npz")
    assert [(case.name, dict(case.settings)) for case in found] == [
        ("case2", {"kind": "b", "a": 2}),
        ("case10", {"a": 10}),
    ]


def test_what_is_built_has_the_dtype_of_the_weights():
    def compare(case):
        return {"output": torch.nn.Linear(2, 1)(case["output"]).sum() * 0 + case["output"]}

    mapping = SimpleNamespace(SOURCE=Source("authors", ""), compare=compare)
    for dtype in (torch.float64, torch.float32):
        arrays = {"output": torch.ones(2, dtype=dtype), "weight.x": torch.ones(2, dtype=dtype)}
        assert differences(mapping, Case("key", "case0", {}, arrays))["output"].off == 0
    assert torch.get_default_dtype() == torch.float32
