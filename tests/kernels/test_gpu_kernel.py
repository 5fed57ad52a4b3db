"""The Triton programs against the dense float64 oracle: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from oracle import dense, reductions

from regard.call import Call, Site
from regard.kernels import Chosen, Reduction, gpu, strips

pytest.importorskip("triton")
# The interpreter's numpy warns of what float arithmetic does on purpose: log(0), infinity - infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
SITE = Site("attention", "language_model", 0)
INF = float("inf")
ROWS = [Reduction("entropy"), Reduction("maximum"), Reduction("distance"), Reduction("distance", 2)]
TOP = [Reduction("top_weights", 3), Reduction("top_keys", 3)]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def reduce(call: Call, wanted: list[Reduction], **options) -> tuple[dict[Reduction, torch.Tensor], torch.Tensor]:
    """Refuses what the kernel does not support; results on the CPU."""
    on = {
        name: value.to(DEVICE)
        for name in ("query", "key", "value", "mask", "bias", "sinks")
        if (value := getattr(call, name)) is not None
    }
    call = call.but(**on)
    assert gpu.refusal(call.operands, wanted) is None
    found, output = gpu.forward(call.operands, wanted, output=True, **options)
    return {r: t.cpu() for r, t in found.items()}, output.cpu()


def exact(call: Call) -> Call:
    """The same numbers in float64."""
    return call.but(**{name: getattr(call, name).double() for name in ("query", "key", "value")})


def close(got, wanted, grain, what):
    torch.testing.assert_close(
        got.double(), wanted.double(), atol=grain, rtol=grain, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def simple(n_query: int = 20, n_key: int = 20, heads: int = 2, kv_heads: int = 1, dim: int = 4, **options) -> Call:
    torch.manual_seed(0)
    query = torch.randn(1, n_query, heads, dim).transpose(1, 2)  # strided, as models give it
    key, value = torch.randn(1, kv_heads, n_key, dim), torch.randn(1, kv_heads, n_key, dim)
    return Call(SITE, query, key, value, **{"scale": dim**-0.5, **options})


@st.composite
def calls(draw) -> Call:
    torch.manual_seed(draw(st.integers(0, 10_000)))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 3), (2, 1, 1), (1, 2, 2)]))
    n_query, n_key = draw(st.integers(1, 36)), draw(st.integers(1, 36))
    dim, value_dim = draw(st.sampled_from([(1, 1), (8, 8), (20, 16), (16, 24)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    sharp = draw(st.sampled_from([0.1, 1.0, 30.0]))
    heads = kv_heads * group
    query = torch.randn(batch, n_query, heads, dim).to(dtype).transpose(1, 2) * sharp
    key, value = (torch.randn(batch, n_key, kv_heads, d).to(dtype).transpose(1, 2) for d in (dim, value_dim))
    window = (torch.arange(n_query)[:, None] - torch.arange(n_key)).abs() < 5
    masks = {
        "none": None,
        "boolean": torch.rand(batch, 1, n_query, n_key) < 0.6,
        "additive": torch.randn(1, heads, n_query, n_key).to(dtype),
        "padding": torch.rand(batch, 1, 1, n_key) < 0.6,
        "window": window[None, None],
    }
    mask = masks[draw(st.sampled_from(sorted(masks)))]
    hides = mask is not None and mask.dtype == torch.bool
    return Call(
        SITE,
        query,
        key,
        value,
        scale=dim**-0.5,
        mask=mask,
        causal=draw(st.booleans()),
        bias=torch.randn(heads, n_query, n_key) if not hides and draw(st.booleans()) else None,
        softcap=draw(st.sampled_from([None, 2.0])),
        sinks=torch.randn(heads) if draw(st.booleans()) else None,
        query_start=draw(st.integers(0, 5)),
        key_start=draw(st.integers(0, 5)),
    )


@settings(deadline=None, max_examples=25, derandomize=True)
@given(calls(), st.booleans())
def test_any_call_equals_the_oracle(call, split):
    batch, (n_query, n_key) = call.query.shape[0], (call.query.shape[2], call.key.shape[2])
    keys, queries = torch.rand(batch, n_key) < 0.5, torch.rand(1, n_query) < 0.5
    mass, mass_of_few = (Reduction("mass", Chosen(s)) for s in (keys, keys[:1]))
    received, received_from = Reduction("received"), Reduction("received", Chosen(queries))
    at = Reduction("at", Chosen(torch.randint(-1, n_key, (1, n_query))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SPLIT", 16 if split else 1024)
        got, output = reduce(call, [*ROWS, *TOP, mass, mass_of_few, received, received_from, at])

    p = dense(call)
    truth = reductions(p, query_start=call.query_start, key_start=call.key_start, keys=keys)
    wanted = dict(zip(ROWS, (truth[name] for name in ("entropy", "maximum", "distance", "near"))))
    wanted |= {mass: truth["mass"], received: truth["received"], mass_of_few: (p * keys[:1, None, None]).sum(-1)}
    wanted[received_from] = (p * queries[:, None, :, None]).sum(-2)
    where = at.knob.where[:, None, :, None].expand(*p.shape[:3], 1)
    wanted[at] = (p.gather(-1, where.clamp(min=0)) * (where >= 0))[..., 0]
    grain = 1e-5 + 1e-5 * float(call.query.abs().max())  # scores of hundreds have a float32 grain of their own
    for r, tensor in wanted.items():
        close(got[r], tensor, grain, r)

    largest, keys = (got[r] for r in TOP)
    few = min(3, n_key)
    close(largest[..., :few], truth["top_weights"], grain, "top weights")
    places = keys[..., :few] - call.key_start
    close(torch.where(keys[..., :few] >= 0, p.gather(-1, places.clamp(min=0)), 0.0), largest[..., :few], grain, "keys")
    assert (keys[largest == 0] == -1).all()

    assert output.dtype == call.query.dtype
    values = call.value.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    tolerance = max(grain, {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(call.query.dtype, 0.0)) * 4
    close(output, p @ values, tolerance, "output")


@pytest.mark.parametrize(("n_query", "n_key", "heads"), [(50, 50, 2), (50, 50, 1), (40, 70, 3), (70, 40, 1)])
def test_blocks_that_causality_leaves_whole(n_query, n_key, heads):
    call = simple(n_query=n_query, n_key=n_key, heads=heads, causal=True)
    wanted = [*ROWS, Reduction("received")]  # and no largest weights, which take one path for all blocks
    truth = strips.reduce(exact(call).operands, wanted)
    got, output = reduce(call, wanted)
    for r in wanted:
        close(got[r], truth[r], 1e-5, r)
    close(output, strips.output(exact(call).operands), 1e-5, "output")


def test_one_query_against_a_long_cache(monkeypatch):
    call = simple(n_query=1, n_key=100, heads=6, kv_heads=2, sinks=torch.randn(6), query_start=99)
    wanted = [*ROWS, *TOP, Reduction("received")]
    truth = strips.reduce(exact(call).operands, wanted)
    for least in (1024, 16):  # in one go, and in splits
        monkeypatch.setattr(gpu, "SPLIT", least)
        assert (gpu._splits(call, 16)[0] > 1) == (least == 16)
        got, output = reduce(call, wanted)
        for r in wanted:
            close(got[r], truth[r], 1e-5, r)
        close(output, strips.output(exact(call).operands), 1e-5, "output")


@pytest.mark.parametrize("causal", [False, True])
def test_rows_with_every_key_masked_are_as_the_reference_has_them(causal):
    hidden = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    hidden[..., 3, :] = hidden[..., 17, :] = False
    lowest = torch.where(hidden, 0.0, torch.finfo(torch.float32).min)
    wanted = [*ROWS, *TOP, Reduction("received"), Reduction("at", Chosen(torch.zeros(1, 20, dtype=torch.long)))]
    for options in (
        {"mask": hidden},
        {"mask": lowest},
        {"mask": lowest.masked_fill(~hidden, -INF)},
        {"mask": hidden, "bias": torch.randn(1, 2, 20, 20)},
        {"mask": hidden, "sinks": torch.zeros(2)},
    ):
        call = simple(causal=causal, **options)
        truth = strips.reduce(exact(call).operands, wanted)
        got, output = reduce(call, wanted)
        for r in wanted:
            if r.name != "top_keys":  # equal weights come in any order
                close(got[r], truth[r], 1e-5, r)
        close(output, strips.output(exact(call).operands), 1e-5, "output")


def test_sharp_scores_keep_their_digits():
    # whole numbers, so that float32 and float64 start from the same scores, up to 1e4 and less than 1 apart or much
    torch.manual_seed(0)
    query, key = torch.randint(-6, 7, (1, 2, 20, 16)).float(), torch.randint(-6, 7, (1, 2, 40, 16)).float()
    query[..., 0], key[..., 0] = 100.0, 100.0
    for scale in (1.0, 2**-5):
        call = Call(SITE, query, key, key, scale)
        wanted = [*ROWS, Reduction("received")]
        truth = strips.reduce(exact(call).operands, wanted)
        got, _ = reduce(call, wanted)
        close(got[ROWS[0]], truth[ROWS[0]], 1e-5, "entropy")
        close(got[wanted[-1]], truth[wanted[-1]], 1e-5, "received")
    equal = Call(SITE, query * 0, key, key, 1.0)
    close(reduce(equal, ROWS)[0][ROWS[0]], torch.full((1, 2, 20), math.log(40)), 2e-6, "entropy of equal weights")
    one_hot = Call(SITE, torch.eye(20)[None, None] * 1e4, torch.eye(20)[None, None], torch.eye(20)[None, None], 1.0)
    got, output = reduce(one_hot, [*ROWS, Reduction("received")])
    assert got[ROWS[0]].abs().max() == 0
    assert got[ROWS[1]].eq(1).all()
    assert torch.equal(output[0, 0], torch.eye(20))


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_nan_stays_where_dense_has_it(bad):
    call = simple(causal=True)
    query, key = call.query.clone(), call.key.clone()
    query[0, 0, 2] = bad
    key[0, 0, 17] = bad
    call = call.but(query=query, key=key)
    wanted = [*ROWS, TOP[0]]
    truth = strips.reduce(call.operands, wanted)
    got, _ = reduce(call, wanted)
    for r in wanted:
        assert torch.equal(got[r].isnan(), truth[r].isnan()), r


def test_sinks_by_row_and_masks_with_fewer_axes():
    torch.manual_seed(1)
    sinks, mask = torch.randn(1, 2, 20, 1), torch.rand(20, 30) < 0.7  # of more keys than there are
    call = simple(sinks=sinks, mask=mask)
    wanted = [*ROWS, Reduction("received")]
    got, _ = reduce(call, wanted)
    truth = strips.reduce(exact(call).operands, wanted)
    for r in wanted:
        close(got[r], truth[r], 1e-5, r)


def test_sets_select_keys_and_queries():
    first, none = (Chosen(torch.arange(20)[None] == at) for at in (0, -1))
    call = simple(causal=True)
    asked = [Reduction("mass", first), Reduction("mass", none), Reduction("received", first)]
    got, _ = reduce(call, asked)
    truth = strips.reduce(exact(call).operands, asked)
    for r in asked:
        close(got[r], truth[r], 1e-6, r)


def test_what_a_mask_hides_at_either_end_is_skipped():
    window = (torch.arange(40)[:, None] - torch.arange(30)).abs() < 5
    call = simple(n_query=40, n_key=30, mask=window.to(DEVICE))
    for axis, seen in (("query", window), ("key", window.mT)):
        spans = [edge.expand(1, 2, -1)[0, 1] for edge, _ in gpu._spans(call, axis)]
        for i, row in enumerate(seen):
            if row.any():
                assert [int(edge[i]) for edge in spans] == [int(row.nonzero()[0]), int(row.nonzero()[-1]) + 1]
            else:
                assert spans[0][i] >= spans[1][i]
    padding = call.but(mask=torch.ones(1, 1, 1, 30, dtype=torch.bool, device=DEVICE))
    assert gpu._spans(padding, "query")[0][1][2] == 0, "one span for all queries"
    assert gpu._spans(padding, "key") is None
    assert gpu._spans(call.but(bias=torch.zeros(1, 1, 40, 30)), "query") is None, "hidden keys share blind rows"


def test_nothing_but_the_output():
    call = simple(causal=True)
    found, output = reduce(call, [])
    assert found == {}
    close(output, strips.output(exact(call).operands), 1e-6, "output")
    assert output.transpose(1, 2).is_contiguous()
    here = call.but(**{n: getattr(call, n).to(DEVICE) for n in ("query", "key", "value")})
    assert gpu.forward(here.operands, [])[1] is None


def test_what_it_cannot_do_it_says(monkeypatch):
    call, wanted = simple(), ROWS
    for changed, reason in (
        (exact(call), "dtype torch.float64"),
        (call.but(key=call.key.half()), "differ in dtype"),
        (call.but(query=call.query.clone().requires_grad_()), "gradients"),
        (call.but(scale=-1.0), "scale"),
        (simple(dim=300), "head dim above 256"),
        (simple(n_key=0), "empty"),
        (call.but(edits=(lambda *_: None,)), "edited"),
        (call.but(dropout=0.1), "dropout"),
    ):
        assert reason in gpu.refusal(changed.operands, wanted)
    assert "no reduction named variance" in gpu.refusal(call.operands, [Reduction("variance")])
    assert "more than 64" in gpu.refusal(call.operands, [Reduction("top_keys", 65)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu.refusal(call.operands, wanted) == "not on a GPU"


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from regard.kernels import Operands, Reduction, gpu, gpu_programs

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

class Compiled:
    def __init__(self, name):
        self.program, self.name = getattr(gpu_programs, name), name
        setattr(gpu_programs, name, self)

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *positional, **arguments):
        program, sizes = self.program, {}
        if hasattr(program, "configs"):
            sizes = gpu_programs._fitting(program.configs, {}, **arguments)[-1].all_kwargs()
            program = program.fn
        binary = program.warmup(*positional, **arguments, **sizes, grid=(1,))
        assert binary.metadata.shared < 2**17 and len(binary.asm["cubin"])
        print(self.name)

driver.set_active(Hopper())
for name in ("by_query", "merge", "by_key", "at_keys", "find_spans"):
    Compiled(name)
gpu.SPLIT = 128
wanted = [Reduction(name) for name in ("entropy", "distance", "received")]
at = type("At", (), {"where": torch.zeros(1, 1, dtype=torch.long)})()

def reduce(dtype, n_query, wanted, **options):
    q, k, v = (torch.randn(1, h, n, 64, dtype=dtype) for h, n in ((4, n_query), (2, 256), (2, 256)))
    gpu.forward(Operands(q, k, v, 0.1, **options), wanted, output=True)

reduce(torch.bfloat16, 1, [*wanted, Reduction("at", at), Reduction("top_keys", 4)], sinks=torch.zeros(4))
reduce(torch.bfloat16, 64, wanted, mask=torch.ones(1, 1, 64, 256, dtype=torch.bool), softcap=2.0)
reduce(torch.float32, 64, wanted, causal=True)
"""


def test_what_a_gpu_would_run_compiles(tmp_path):
    """For Hopper, without one: the interpreter takes programs that the compiler does not."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"by_query", "merge", "by_key", "at_keys", "find_spans"} == set(done.stdout.split())
