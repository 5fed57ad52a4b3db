"""Offsets learned from hidden states that an attention of Llama's kind reads as they are, and what they do to it.

The code's offsets of keys stay where they start, at 0: nothing depends on them.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import regard
from regard.interventions.focus_directions import Example, _Learner, focus_directions

from .. import Case, Source

SOURCE = Source("authors", "billzyx/focus_direction, LlamaAttention and the loop of train_attn_only.py")
APART = ("grad_key_direction",)  # compared beside that of queries, since it is 0
TOLERANCE = {"directions": 1e-4}  # after some steps of AdamW


def compare(case: Case):
    settings, hidden = case.settings, case["hidden"]  # [prompt, 1, token, dim]
    model, heads = _model(case), range(settings["heads"])
    place = torch.arange(hidden.shape[2])[None]
    relevant, answer = ((place >= low) & (place < high) for low, high in (settings["relevant"], settings["answer"]))
    start = {(0, head): direction for head, direction in enumerate(case["start"])}
    learner = _Learner(list(start), settings["rate"], torch.Generator(), start)
    learner.example = Example({}, relevant, answer)
    slopes = []
    for states in hidden:  # one prompt a step, in their order
        with torch.no_grad(), regard.intervene(model, learner):
            model(inputs_embeds=states)
        slopes.append(torch.stack([learner.directions[0, head].grad for head in heads]).clone())
    learned = {pair: direction.detach() for pair, direction in learner.directions.items()}
    first, _ = _run(model, hidden[0], start, 1.0)
    applied, output = _run(model, hidden[0], learned, settings["strength"])
    mass = (first * relevant[:, None, None]).sum(-1)[:, :, answer[0]]
    return {
        "first_weights": first,
        "losses": (-mass.mean(), case["losses"][0]),
        "grad_query_direction": (
            torch.stack([slopes[0], torch.zeros_like(slopes[0])]),
            torch.stack([case["grad_query_direction"], case["grad_key_direction"]]),
        ),
        "directions": torch.stack([learned[0, head] for head in heads]),
        "applied_weights": applied,
        "output": output,
    }


@torch.no_grad()
def _run(model: nn.Module, hidden: torch.Tensor, directions, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and what the attention gives."""
    kept = []
    handle = model.layers[0].self_attn.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    steered = focus_directions(directions=directions, strength=strength)
    with regard.intervene(model, steered), regard.record(model, "rows") as recording:
        model(inputs_embeds=hidden)
    handle.remove()
    rows = torch.tensor(recording.tree["language_model"]["rows"].values)[:, 0].nan_to_num()
    return rows, kept[0]


def _model(case: Case) -> nn.Module:
    settings, weights = case.settings, case.weights
    dim, mixed = weights["o_proj.weight"].shape
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"],
        hidden_size=dim,
        head_dim=mixed // settings["heads"],
        intermediate_size=4,
        vocab_size=4,
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        attn_implementation="eager",
    )
    model = LlamaModel(config).eval()
    model.layers[0].self_attn.load_state_dict(weights)
    model.layers[0].input_layernorm = nn.Identity()
    return model
