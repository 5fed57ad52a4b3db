"""Importance of heads, pruning, and a smaller model that gives what the masked one gives."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as t
from families import GROUPED, NO_IDS, SIZES, build, text
from torch import nn

import regard
from regard.circuits._gates import Gates, frozen
from regard.circuits.sixteen_heads import Masked, ablation, gone, greedy, load_pruned, prune, sixteen_heads
from regard.claims import _planted
from regard.claims._planted import INDUCTIVE, MOVER, TELLING, WRONG

IDS = text()["input_ids"]


def losses(model):
    logits = model(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, -2], IDS[:, -1], reduction="none")


def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def gpt2():
    model, _ = build("gpt2", "sdpa")
    return model.double()


def test_importance_is_the_mean_size_of_each_rows_derivative(gpt2):
    found = sixteen_heads(gpt2, losses, normalise=False)
    step = 1e-5
    for layer, head in ((0, 2), (1, 0)):
        moved = []
        for sign in (1, -1):
            gates = torch.ones(4, dtype=torch.float64)
            gates[head] += sign * step
            with torch.no_grad(), regard.intervene(gpt2, Gates("language_model", {layer: gates})):
                moved.append(losses(gpt2))
        expected = ((moved[0] - moved[1]) / (2 * step)).abs().mean()
        assert float(found.sel(layer=layer, head=head)) == pytest.approx(float(expected), rel=1e-5)
    normed = sixteen_heads(gpt2, losses)
    assert (normed**2).sum("head").values == pytest.approx(1.0)
    assert (normed / found).std("head").values == pytest.approx(0.0, abs=1e-5)


def test_by_token_sizes_are_taken_before_the_sum_over_tokens(gpt2):
    found = sixteen_heads(gpt2, losses, by="token", normalise=False)
    step, slopes = 1e-5, []

    class Gate:
        def __init__(self, token, value):
            self.token, self.value = token, value

        def output(self, call, output):
            if call.site.layer != 1:
                return output
            gates = torch.ones(output.shape[:3], dtype=output.dtype)
            gates[:, 3, self.token] += self.value
            return output * gates[..., None]

    for token in range(IDS.shape[1]):
        moved = []
        for sign in (1, -1):
            with torch.no_grad(), regard.intervene(gpt2, Gate(token, sign * step)):
                moved.append(losses(gpt2))
        slopes.append((moved[0] - moved[1]) / (2 * step))
    expected = torch.stack(slopes).abs().sum(0).mean()
    assert float(found.sel(layer=1, head=3)) == pytest.approx(float(expected), rel=1e-4)
    by_row = torch.stack(slopes).sum(0).abs().mean()
    assert float(sixteen_heads(gpt2, losses, normalise=False).sel(layer=1, head=3)) == pytest.approx(
        float(by_row), rel=1e-4
    )
    with pytest.raises(ValueError, match="by 'row' or by 'token', got 'head'"):
        sixteen_heads(gpt2, losses, by="head")


def test_shares_of_heads_are_rounded_down_and_a_step_takes_one_at_least(gpt2):
    assert greedy(gpt2, losses, by=0.3)["gone"].values.tolist() == [0, 2, 4, 6]  # 2.4, 4.8, 7.2 of 8; 2 stay
    assert greedy(gpt2, losses, by=0.01)["gone"].values.tolist() == [*range(7)]
    assert greedy(gpt2, losses, by=0.25, least=3)["gone"].values.tolist() == [0, 2]


def test_ablation_is_the_loss_with_the_heads_output_at_zero(gpt2):
    found = ablation(gpt2, losses)

    class Mute:  # one layer, by hand
        def __init__(self, heads):
            self.kept = torch.tensor([h not in heads for h in range(4)], dtype=torch.float64)

        def output(self, call, output):
            return output * self.kept[:, None, None] if call.site.layer == 1 else output

    with torch.no_grad():
        whole = float(losses(gpt2).mean())
        for way, heads in (("without", [2]), ("alone", [0, 1, 3])):
            with regard.intervene(gpt2, Mute(heads)):
                expected = float(losses(gpt2).mean()) - whole
            assert float(found[way].sel(layer=1, head=2)) == pytest.approx(expected)
    assert found.attrs["loss"] == pytest.approx(whole)


def test_planted_heads_matter_and_stay_to_the_last():
    model, task = _planted.planted(), _planted.repeats(32)
    importance = sixteen_heads(model, task.losses, normalise=False)
    best = importance.stack(at=("layer", "head")).sortby(importance.stack(at=("layer", "head")))["at"].values[-4:]
    assert set(best) == {*INDUCTIVE, WRONG}
    found = greedy(model, task.losses, by=0.25)
    assert found["gone"].values.tolist() == [0, 4, 9, 13, 15]
    assert found["loss"].values[-1] < 0.5  # one head of each layer is left: the circuit
    assert {(layer, head) for layer in range(3) for head in range(6)} - set(gone(found, 4)) == {*INDUCTIVE}
    without = ablation(model, task.losses)["without"]
    assert float(without.sel(layer=WRONG[0], head=WRONG[1])) < 0 < float(without.sel(layer=MOVER[0], head=MOVER[1]))
    asked = ablation(model, _planted.questions(16).losses)["without"].stack(at=("layer", "head"))
    assert set(asked.sortby(asked)["at"].values[-2:]) == {*TELLING}


HEADS = [(0, 1), (1, 0), (1, 3)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "bert", "vit"])
def test_the_pruned_model_is_the_masked_one(family):
    model, inputs = build(family, "eager" if family == "gemma2" else "sdpa")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def run(model):
        return model(**inputs).logits

    pruned = prune(model, HEADS, run)
    with torch.no_grad(), regard.intervene(model, Masked(HEADS)):
        masked = run(model)
    with torch.no_grad():
        torch.testing.assert_close(run(pruned), masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))
        assert not torch.allclose(run(pruned), run(model), atol=1e-2 * float(masked.abs().max()))
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not hasattr(model.config, "pruned_heads")


def neox():
    """Query, key and value of a head lie side by side in one matrix."""
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, **NO_IDS))


def adapted():
    """Low-rank adapters beside the projections."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, **NO_IDS)), config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("make", [neox, adapted])
def test_heads_are_found_however_they_are_packed(make):
    torch.manual_seed(0)
    model = make().eval()
    pruned = prune(model, HEADS, logits)
    with torch.no_grad(), regard.intervene(model, Masked(HEADS)):
        masked = logits(model)
    with torch.no_grad():
        torch.testing.assert_close(logits(pruned), masked, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_key_heads_go_with_their_queries_and_are_doubled_where_they_must():
    model, _ = build("llama", "sdpa")  # 4 heads, 2 key heads
    key = [layer.self_attn.k_proj for layer in prune(model, [(0, 0), (0, 1), (1, 0)], logits).model.layers]
    assert [k.out_features for k in key] == [8, 24]  # a group gone; 1 and 2 queries: a key head for each
    assert torch.equal(key[1].weight[8:16], key[1].weight[16:])


def test_a_pruned_model_generates_trains_and_is_recorded():
    model, _ = build("llama", "sdpa")
    pruned = prune(model, HEADS, logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with regard.intervene(model, Masked(HEADS)):
        expected = model.generate(IDS, **options)
    assert torch.equal(pruned.generate(IDS, **options), expected)
    losses(pruned).sum().backward()
    assert pruned.model.layers[0].self_attn.q_proj.weight.grad.shape == (24, 32)
    with regard.record(pruned, "entropy") as recording:
        logits(pruned)
    assert recording.tree["language_model"]["entropy"].sel(layer=1).notnull().any(["batch", "query"]).sum() == 2


def test_a_pruned_model_is_saved_and_read(tmp_path):
    model, _ = build("gpt2", "sdpa")
    pruned = prune(model, HEADS, logits)
    pruned.save_pretrained(tmp_path)
    loaded, _ = load_pruned(tmp_path, logits)
    with torch.no_grad():
        assert torch.equal(logits(loaded), logits(pruned))
    with pytest.raises(ValueError, match="pruned before"):
        prune(pruned, [(0, 0)], logits)


@pytest.mark.parametrize(("family", "why"), [("albert", "more than once"), ("gpt_oss", "does not run without")])
def test_what_cannot_be_cut_is_refused(family, why):
    model, inputs = build(family, "eager")
    with pytest.raises(regard.UnreachableAttention, match=why):
        prune(model, [(0, 1)], lambda model: model(**inputs))


def test_bad_input_is_named(gpt2):
    with pytest.raises(ValueError, match="no head 4 in layer 0"):
        prune(gpt2, [(0, 4)], logits)
    with pytest.raises(ValueError, match="all heads of layer 1"):
        prune(gpt2, [(1, h) for h in range(4)], logits)
    with pytest.raises(ValueError, match="reduction='none'"):
        sixteen_heads(gpt2, lambda model: losses(model).mean())
    with pytest.raises(ValueError, match="a row"):
        sixteen_heads(gpt2, lambda model: losses(model)[:1])
    with pytest.raises(ValueError, match="no head 9 in layer 1"), regard.intervene(gpt2, Masked([(1, 9)])):
        logits(gpt2)
    with pytest.raises(ValueError, match="by is a share"):
        greedy(gpt2, losses, by=0)
    model, inputs = build("t5")
    with pytest.raises(ValueError, match="encoder, decoder, decoder_cross"):
        ablation(model, lambda model: model(**inputs).logits)
    with pytest.raises(ValueError, match="encoder and of decoder run"), regard.intervene(model, Masked([(0, 0)])):
        model(**inputs)


def test_the_model_is_left_as_it_was_found(gpt2):
    def broken(model):
        losses(model)
        raise RuntimeError("broken")

    gpt2.train()
    gpt2.transformer.h[0].eval()
    gpt2.transformer.wte.weight.requires_grad_(False)
    before = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in gpt2.modules()]
    flags = [p.requires_grad for p in gpt2.parameters()]
    try:
        for call in (sixteen_heads, greedy, ablation):
            with pytest.raises(RuntimeError, match="broken"):
                call(gpt2, broken)
        with pytest.raises(RuntimeError, match="broken"):
            prune(gpt2, HEADS, broken)
        with pytest.raises(RuntimeError, match="broken"), frozen(gpt2):
            broken(gpt2)
        prune(gpt2, HEADS, logits)
        sixteen_heads(gpt2, losses)
        assert before == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in gpt2.modules()]
        assert flags == [p.requires_grad for p in gpt2.parameters()]
        assert all(p.grad is None for p in gpt2.parameters())
    finally:
        gpt2.eval()
        gpt2.requires_grad_(True)
