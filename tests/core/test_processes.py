"""Two processes of torch.distributed run one model: what they record and change is what one process does."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers as t
import xarray as xr
from families import NO_IDS, VOCAB
from ways import is_clean

import regard
from regard.adapters import parallel
from regard.objectives import collect

pytestmark = [pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")]

STATISTICS = ("entropy", "received", "mass", "top_keys")
CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}
# GPT-OSS comes with a plan for its experts alone.
SINKS = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
SINKS |= {"model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.self_attn.sinks": "colwise"}
SINKS |= {"model.layers.*.self_attn": "local_params"}


def ids(batch=4, n=10, first=3):
    return (torch.arange(batch * n).reshape(batch, n) * 7) % 80 + first


class Ablate:
    """Silence heads by their number; one that there is not is an error."""

    def __init__(self, layer, *heads):
        self.layer, self.heads = layer, heads

    def output(self, call, output):
        if call.site.layer != self.layer:
            return output
        if missing := [head for head in self.heads if head >= output.shape[1]]:
            raise ValueError(f"{call.site} has no head {missing[0]}")
        output = output.clone()
        output[:, list(self.heads)] = 0.0
        return output


class AboveTheMean:
    """Keep only the weights that are above the mean of all heads."""

    def weights(self, call, weights, rows):
        kept = torch.where(weights >= weights.mean(1, keepdim=True), weights, 0.0)
        return kept / kept.sum(-1, keepdim=True).clamp_min(1e-9)


class Away:
    """Turn queries of head 5 round."""

    def inputs(self, call):
        query = call.query.clone()
        query[:, 5] = -query[:, 5]
        return call.but(query=query)


class Neurons:
    """Change neurons by their number: one is the first's, another is shut."""

    def neurons(self, site, activations):
        activations = activations.clone()
        activations[..., 40] = activations[..., 0] * 20
        activations[..., 5] = 0.0
        return activations


CHANGES = {"ablate": lambda: Ablate(1, 2, 5), "compare": AboveTheMean, "query": Away, "neurons": Neurons}


@torch.no_grad()
def looked(model, change=None, **inputs):
    changes = [] if change is None else [CHANGES[change]()]
    with regard.intervene(model, *changes), regard.record(model, *STATISTICS) as recording:
        logits = model(**inputs).logits
    return logits, recording


@torch.no_grad()
def generated(model):
    with regard.record(model, *STATISTICS) as recording:
        made = model.generate(
            input_ids=ids(2), attention_mask=torch.ones(2, 10, dtype=torch.long), max_new_tokens=3, do_sample=False
        )
    return made, recording


def gradient(model, change):
    with contextlib.ExitStack() as blocks:
        if change == "collect":  # of what all heads do, and not of the output
            seen = blocks.enter_context(collect(model, "entropy"))
        else:
            blocks.enter_context(regard.intervene(model, CHANGES[change]()))
        loss = model(input_ids=ids()).logits.float().square().sum()
    if change == "collect":
        loss = torch.stack([(value * torch.arange(8.0)[:, None]).mean() for _, value in seen]).sum()
    (slope,) = torch.autograd.grad(loss, model.get_input_embeddings().weight)
    return slope.full_tensor() if hasattr(slope, "full_tensor") else slope


def same(one, other, atol=1e-5):
    assert [len(one), len(other)] == [len(one)] * 2
    for mine, theirs in zip(one, other):
        assert list(mine.children) == list(theirs.children)
        for stack in mine.children:
            a, b = (tree[stack].to_dataset(inherit=False) for tree in (mine, theirs))
            xr.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)
            assert set(a.coords) == set(b.coords)
            assert a.attrs == b.attrs


def refused(kind, match, run, *args, **kwargs):
    with pytest.raises(kind, match=match):
        run(*args, **kwargs)


# What each process does


def _tensor_parallel(rank, folder):
    from transformers.distributed import DistributedConfig

    for name in ("grouped", "sinks"):
        kind = t.LlamaForCausalLM if name == "grouped" else t.GptOssForCausalLM
        for implementation in ("sdpa", "eager") if name == "grouped" else ("eager",):
            config = DistributedConfig(tp_size=2, tp_plan="auto" if name == "grouped" else SINKS)
            model = kind.from_pretrained(
                folder / name, distributed_config=config, attn_implementation=implementation
            ).eval()
            truth = torch.load(folder / f"{name}-{implementation}.pt", weights_only=False)
            for change, (logits, trees) in truth["looked"].items():
                ours, recording = looked(model, change, input_ids=ids())
                torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
                same(recording, trees)
                whole = recording.gather()
                assert (whole is None) == (rank > 0)
                if whole is not None:
                    same(whole, trees)
            made, trees = truth["generated"]
            ours, recording = generated(model)
            assert torch.equal(ours, made)
            same(recording, trees)
            assert is_clean(model)
            held = model.model.layers[0].self_attn.q_proj.weight.to_local()
            assert held.shape[0] == 32, "nothing is shared out"
    path = folder / "shared.zarr"
    for _ in range(3):
        recording.save(path)  # all at once, and once more over it
    dist.barrier()
    same(regard.open(path), trees)
    assert [file.name for file in folder.iterdir() if file.name.startswith(".shared")] == []


def _gradients(rank, folder):
    from transformers.distributed import DistributedConfig

    model = t.LlamaForCausalLM.from_pretrained(
        folder / "grouped", distributed_config=DistributedConfig(tp_plan="auto"), attn_implementation="eager"
    ).eval()
    for change, slope in torch.load(folder / "slopes.pt").items():
        torch.testing.assert_close(gradient(model, change), slope, atol=1e-4, rtol=1e-4)
    # A head that there is not, and processes that do not do the same
    refused(ValueError, "no head 8", lambda: _through(model, Ablate(0, 8)))
    assert is_clean(model)
    _through(model, Ablate(0, 7))
    refused(RuntimeError, "in different ways", lambda: _through(model, [AboveTheMean, Away][rank]()))
    assert is_clean(model)


def _alone(rank, folder):
    """Only one of the processes opens a block. The last task: the other waits for what is not sent."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto")
    model = t.LlamaForCausalLM.from_pretrained(folder / "grouped", distributed_config=config).eval()
    parallel.PATIENCE = 1.0
    if rank == 0:
        refused(RuntimeError, "process 1 did not run the model inside", lambda: _through(model, Away()))
        assert is_clean(model)
    else:
        with contextlib.suppress(RuntimeError):
            _through(model)


def _through(model, *changes):
    block = regard.intervene(model, *changes) if changes else contextlib.nullcontext()
    with torch.no_grad(), block:
        return model(input_ids=ids()).logits


def _replicated_keys(rank, folder):
    """One head of keys for all: transformers cannot share it out, a plan of one's own has it everywhere."""
    from transformers.distributed import DistributedConfig

    every = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "kv"}
    config = DistributedConfig(tp_size=2, tp_plan=every)
    model = t.LlamaForCausalLM.from_pretrained(folder / "one", distributed_config=config).eval()
    truth = torch.load(folder / "one-sdpa.pt", weights_only=False)
    for change, (logits, trees) in truth["looked"].items():
        ours, recording = looked(model, change, input_ids=ids())
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
        same(recording, trees)


def _whole_heads(rank, folder):
    """Projections whose outputs are brought together before attention: each process has all heads."""
    from transformers.distributed import DistributedConfig

    every = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
    every["model.layers.*.self_attn.o_proj"] = "rowwise_split_input"
    config = DistributedConfig(tp_size=2, tp_plan=every)
    model = t.LlamaForCausalLM.from_pretrained(folder / "grouped", distributed_config=config).eval()
    truth = torch.load(folder / "grouped-sdpa.pt", weights_only=False)
    for change, (logits, trees) in truth["looked"].items():
        ours, recording = looked(model, change, input_ids=ids())
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
        whole = recording.gather()
        assert (whole is None) == (rank > 0)
        if whole is not None:
            same(whole, trees)


def _data_parallel(rank, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    truth = torch.load(folder / "grouped-sdpa.pt", weights_only=False)
    for way in ("ddp", "fsdp"):
        model = t.LlamaForCausalLM.from_pretrained(folder / "grouped").eval()
        if way == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                for part in (layer.self_attn.q_proj, layer.self_attn, layer):
                    fully_shard(part)
            fully_shard(model)
        for change, (logits, trees) in truth["looked"].items():
            mine = slice(2 * rank, 2 * rank + 2)
            ours, recording = looked(model, change, input_ids=ids()[mine])
            torch.testing.assert_close(ours, logits[mine], atol=1e-5, rtol=1e-5)
            refused(RuntimeError, "one of several processes", recording.save, folder / f"{way}.zarr")
            whole = recording.gather()
            assert (whole is None) == (rank > 0)
            if whole is not None:
                same(_named(whole, trees), trees)
                whole.save(folder / f"{way}.zarr")
                same(_named(regard.open(folder / f"{way}.zarr"), trees), trees)
        assert is_clean(model)
        _uneven(rank, model)


def _named(recording, trees):
    """Sites have one more name around them under DDP."""
    for tree, other in zip(recording, trees):
        for stack in tree.children:
            names = [name.removeprefix("module.") for name in tree[stack].attrs["sites"]]
            assert names == other[stack].attrs["sites"]
            tree[stack].attrs["sites"] = names
    return recording


@torch.no_grad()
def _uneven(rank, model):
    n = 6 + 2 * rank
    with regard.record(model, *STATISTICS, "rows") as recording:
        model(input_ids=ids(1 + rank, n))
    whole = recording.gather()
    if whole is None:
        return
    tree = whole.tree["language_model"]
    assert dict(tree.sizes) | {"batch": 3, "query": 8, "key": 8} == dict(tree.sizes)
    assert (tree["query_role"][0].values == ["bos", *["text"] * 5, "pad", "pad"]).sum() >= 7
    assert list(tree["query_role"][0].values[-2:]) == ["pad", "pad"]
    assert bool(tree["entropy"][0, ..., 6:].isnull().all())
    assert not bool(tree["entropy"][1:].isnull().any())
    assert bool(tree["received"][0, ..., 6:].isnull().all())
    torch.testing.assert_close(
        torch.from_numpy(tree["rows"][0, ..., :6, :6].sum("key").values), torch.ones(2, 8, 6), atol=1e-5, rtol=0
    )


def _runs_differ(rank, folder):
    model = t.LlamaForCausalLM.from_pretrained(folder / "grouped").eval()
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        for _ in range(1 + rank):
            model(input_ids=ids())
    if rank == 0:
        refused(ValueError, "1 to 2 runs each", recording.gather)
    else:
        assert recording.gather() is None
    with regard.record(model, "entropy") as recording:
        if rank == 0:
            model(input_ids=ids())
    if rank == 0:
        refused(ValueError, "process 1 recorded nothing", recording.gather)
    else:
        assert recording.gather() is None
    recording = None

    @regard.statistic("head", title="of no row")
    def overall(call):
        return call.weights.entropy().mean((0, 2))

    with torch.no_grad(), regard.record(model, overall) as recording:
        model(input_ids=ids())
    if rank == 0:
        refused(ValueError, "'overall' has no batch axis", recording.gather)
    else:
        recording.gather()


def _pieces(rank, folder):
    """A process that has a piece of each sequence, or some layers, cannot tell."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.experimental import context_parallel

    model = t.LlamaForCausalLM.from_pretrained(folder / "grouped").eval()
    mesh = init_device_mesh("cpu", (2,))
    piece = ids()
    with context_parallel(mesh, buffers=[piece], buffer_seq_dims=[1]):
        refused(regard.UnreachableAttention, "context parallelism", looked, model, input_ids=piece)
    with regard.record(model, "entropy"), context_parallel(mesh, buffers=[piece], buffer_seq_dims=[1]):
        refused(regard.UnreachableAttention, "context parallelism", model, input_ids=piece)
    looked(model, input_ids=ids())
    for name, value in (("pp_size", 2), ("enable_sequence_parallel", True)):
        model.config.distributed_config = type("Config", (), {name: value})()
        way = "pipeline" if name == "pp_size" else "sequence"
        refused(regard.UnreachableAttention, f"{way} parallelism", looked, model, input_ids=ids())
        del model.config.distributed_config

    def ulysses(module, query, key, value, mask, **kwargs):
        raise AssertionError

    ulysses.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    before = t.AttentionInterface._global_mapping["sdpa"]
    t.AttentionInterface.register("sdpa", ulysses)
    try:
        refused(regard.UnreachableAttention, "Ulysses", looked, model, input_ids=ids())
    finally:
        t.AttentionInterface.register("sdpa", before)
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: DTensor.from_local(output, mesh, [Replicate()])
    )
    refused(Exception, "DTensor", looked, model, input_ids=ids())
    handle.remove()
    assert is_clean(model)


# One process, then two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    grouped = t.LlamaForCausalLM(t.LlamaConfig(**CONFIG, num_key_value_heads=4, **NO_IDS))
    one = t.LlamaForCausalLM(t.LlamaConfig(**CONFIG, num_key_value_heads=1, **NO_IDS))
    config = {**CONFIG, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4, "head_dim": 8}
    sinks = t.GptOssForCausalLM(t.GptOssConfig(**config, num_key_value_heads=4, **NO_IDS))
    for name, parameter in sinks.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    for name, model in {"grouped": grouped, "one": one, "sinks": sinks}.items():
        model.eval().save_pretrained(at / name)
        for implementation in ("eager",) if name == "sinks" else ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            found = {}
            for change in (None, *CHANGES):
                if change == "neurons" and name == "sinks":  # its experts are no linear maps
                    continue
                logits, recording = looked(model, change, input_ids=ids())
                found[change] = logits, list(recording)
            made, recording = generated(model)
            torch.save({"looked": found, "generated": (made, list(recording))}, at / f"{name}-{implementation}.pt")
    torch.save({change: gradient(grouped, change) for change in (*CHANGES, "collect")}, at / "slopes.pt")
    return at


TASKS = (_tensor_parallel, _gradients, _replicated_keys, _whole_heads, _data_parallel, _runs_differ, _pieces, _alone)


@pytest.fixture(scope="module")
def outcomes(folder):
    """What each task raised in each process, of one pair of processes: they take long to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.suppress(mp.ProcessExitedException, mp.ProcessRaisedException):
        mp.spawn(_process, (port, str(folder)), nprocs=2)
    files = {task.__name__: [folder / f"{task.__name__}.{rank}" for rank in range(2)] for task in TASKS}
    return {name: [f.read_text() if f.exists() else "did not end" for f in two] for name, two in files.items()}


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_do_what_one_does(task, outcomes):
    assert outcomes[task.__name__] == ["", ""], "\n".join(outcomes[task.__name__])


def _process(rank, port, folder):
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()})
    warnings.simplefilter("ignore")
    t.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for task in TASKS:
        told = ""
        try:
            task(rank, Path(folder))
        except Exception:
            told = traceback.format_exc()
        (Path(folder) / f"{task.__name__}.{rank}").write_text(told)
        if told:  # the other may wait for what will not be sent
            raise SystemExit(1)
        if task is not TASKS[-1]:
            dist.barrier()
