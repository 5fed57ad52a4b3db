"""Derivatives of a model whose attention Regard computes: those of the model that does the same by itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from derivatives import assert_same
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import regard


class Half:
    def inputs(self, call):
        return call.but(scale=call.scale * 0.5)


def llama(implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=99,
        hidden_act="relu",  # silu has no forward mode over reverse
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.set_attn_implementation(implementation)
    return model


def of_embeddings(model):
    return lambda x: model(inputs_embeds=x, use_cache=False).logits


@pytest.fixture(scope="module")
def truth():
    model = llama("eager").double()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5
    return model


@pytest.fixture
def embeddings():
    return torch.randn(1, 13, 32, generator=torch.Generator().manual_seed(1)) * 0.02


def twice(f, x):
    """The gradient of the squared gradient."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("recorded", [False, True])
def test_under_an_intervention(truth, embeddings, recorded):
    model = llama("sdpa")
    with regard.intervene(model, Half()), regard.record(model, "entropy") if recorded else nullcontext():
        second = twice(of_embeddings(model), embeddings)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(embeddings, torch.ones_like(embeddings))
            found = torch.autograd.forward_ad.unpack_dual(of_embeddings(model)(dual)).tangent
    right = torch.func.jvp(of_embeddings(truth), (embeddings.double(),), (torch.ones_like(embeddings).double(),))[1]
    assert_same({"forward": [found]}, {"forward": [right]}, 2e-4)
    assert_same({"second": [second]}, {"second": [twice(of_embeddings(truth), embeddings.double())]}, 2e-4)


def test_of_a_checkpoint(truth, embeddings):
    """Non-reentrant checkpoints have second derivatives."""

    model = llama("sdpa")
    with regard.intervene(model, Half()):
        found = twice(lambda x: checkpoint(of_embeddings(model), x, use_reentrant=False), embeddings)
    assert_same({"second": [found]}, {"second": [twice(of_embeddings(truth), embeddings.double())]}, 2e-4)
