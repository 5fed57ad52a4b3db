"""Planted sinks are found, and the norm of the vector that makes one tells how strong it is and how long it lives.

On Wong et al., On the Existence and Behaviour of Secondary Attention Sinks (arXiv:2512.22213). The model is a Llama
with weights set by hand, so that the truth is known: a feed-forward module writes the sink direction onto tokens that
are marked for its layer, attention looks along that direction and writes nothing, and every layer adds some content to
every token, which dilutes the direction. That the paper's trained models work like this is not shown here; what the
bundled reader holds is reported beside it. What is tested is the detector, with decoys along another direction, weak
and short-lived ones as controls.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ...catalog import Finding
from ...data import paragraph
from ...extras import needs
from ...loading import load
from ...seam import intervene, record
from ...statistics.secondary_sinks import SinkReader, secondary_sinks

SCALES = "small", "large"
EXPECTED = (
    "of planted sinks every one is found with its onset and lifetime, and nothing else is called a sink; over planted "
    "strengths, the norm of the vector that makes a sink has a rank correlation of 0.8 or more with its score and with "
    "its lifetime, and that vector a cosine of 0.9 or more with the primary sink's direction"
)
LAYERS, WIDTH, HEAD = 16, 128, 32
SINK, DECOY, FIRST = 0, 1, 2  # dimensions: the direction of sinks, another one, the mark of the first token
MARKS = (
    3  # then, for each layer, the marks of tokens onto which it writes SINK, writes DECOY, from which it erases SINK
)
CONTENT = MARKS + 3 * LAYERS  # then what tokens are otherwise
NORM, ADDED = 4.0, 3.0  # of a token's content, and of what each layer adds to it
PRIMARY, PLANTED = 300.0, 40.0  # norms of the vectors that make the sinks
LOGIT = 6.0  # of a key that lies along SINK


class Plant(NamedTuple):
    """A token onto which layer `onset` writes, and from which that is erased `lifetime` layers later (None: never)."""

    onset: int
    lifetime: int | None = None
    strength: float = PLANTED
    direction: int = SINK


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Plant sinks, find them; plant strengths, and compare what they lead to."""
    with needs("this claim", "claims"):
        from scipy.stats import spearmanr

    sinks = [Plant(1, LAYERS - 2), Plant(3, 9), Plant(4, 5), Plant(6, 7), Plant(8, 6)]  # the first is a primary one
    others = [
        Plant(5, direction=DECOY),  # as strong, along another direction
        Plant(5, strength=6.0),  # along the direction, but weak
        Plant(7, 3),  # too short
    ]
    model, ids, places = planted([[*sinks, *others]], seed)
    found = sinks_of(model, ids)
    truth = {place: (sink.onset, sink.lifetime) for place, sink in zip(places[0], sinks)}
    tokens = 1 + np.flatnonzero(found["kind"].values[0, 1:])
    seen = {int(i): (int(found["onset"][0, i]), int(found["lifetime"][0, i])) for i in tokens}

    strengths = np.random.default_rng(seed).uniform(8, 26, 150 if scale == "small" else 1500)
    model, ids, _ = planted([[Plant(3, strength=float(s))] for s in strengths], seed)
    faded = sinks_of(model, ids, shortest=1)
    row, token = np.nonzero(faded["kind"].values == "secondary")
    onset, lifetime = faded["onset"].values[row, token], faded["lifetime"].values[row, token]
    strength = faded["strength"].values[row, token]
    norm, cosine = (faded[name].values[row, onset, token] for name in ("mlp_norm", "mlp_alignment"))
    of_score, of_lifetime = float(spearmanr(norm, strength)[0]), float(spearmanr(norm, lifetime)[0])

    reader, tokenizer = load("reader")
    own = sinks_of(reader, tokenizer(paragraph(), return_tensors="pt")["input_ids"], shortest=1)
    right = sum(seen.get(place) == pair for place, pair in truth.items())
    holds = seen == truth and min(of_score, of_lifetime) >= 0.8 and bool(cosine.min() >= 0.9)
    measured = (
        f"{right} of {len(truth)} planted sinks found as planted, {len(seen) - right} other; over {len(norm)} sinks, "
        f"rank correlation of the norm with the score {of_score:.2f}, with the lifetime {of_lifetime:.2f}, smallest "
        f"cosine {cosine.min():.2f}. In the bundled reader the norm of the first token grows most in layer "
        f"{int(own['onset'][0, 0])} of 0 to {int(own['layer'][-1])}, and "
        f"{int((own['kind'] == 'secondary').sum())} other tokens of a paragraph are secondary sinks."
    )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        picture = left.imshow(found["alignment"].values[0].T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for place, (first, layers) in truth.items():
            left.plot(np.array([0, layers, layers, 0, 0]) + first - 0.5, place + np.array([-1, -1, 1, 1, -1]), "k")
        left.set(xlabel="layer", ylabel="token", title="Found, and planted (boxes)")
        figure.colorbar(picture, ax=left, label="cosine with the first token")
        points = right.scatter(norm, lifetime, c=strength, s=14)
        right.set(xlabel="norm of what the onset layer's MLP gives", ylabel="lifetime, layers")
        right.set_title(f"{len(norm)} sinks of other strengths")
        figure.colorbar(points, ax=right, label="score")

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


@torch.no_grad()
def sinks_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **knobs: Any) -> xr.Dataset:
    """`secondary_sinks` of one pass over `ids`."""
    reader = SinkReader(mask)
    with intervene(model, reader), record(model, "received") as recording:
        model(ids, attention_mask=mask)
    return secondary_sinks(recording.tree["language_model"].to_dataset(), reader, **knobs)


@torch.no_grad()
def planted(rows: list[list[Plant]], seed: int, n: int = 64) -> tuple[nn.Module, Tensor, list[list[int]]]:
    """A model with sinks planted in it; sequences of `n` tokens, one for each row of plants; and the plants' places."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    plants = [plant for row in rows for plant in row]
    size = 1 + len(plants) + 200  # the first token, planted ones, plain ones
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        head_dim=HEAD,
        intermediate_size=13,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()

    embedding = model.model.embed_tokens.weight
    content = torch.randn(size, WIDTH - CONTENT, generator=generator)
    embedding[:, CONTENT:] = NORM * content / content.norm(dim=1, keepdim=True)
    embedding[0, FIRST] = 1.0
    for i, plant in enumerate(plants, start=1):
        embedding[i, MARKS + plant.direction * LAYERS + plant.onset] = plant.strength / PLANTED
        if plant.lifetime is not None:
            embedding[i, MARKS + 2 * LAYERS + plant.onset + plant.lifetime] = 1.0

    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        slowest = HEAD // 2 - 1  # of the rotary frequencies: over so few positions it turns by nearly nothing
        attention.q_proj.bias[slowest] = LOGIT
        attention.k_proj.weight[slowest, SINK] = HEAD**0.5 / WIDTH**0.5

        steep = 500.0  # a gate is linear where it is open
        rest = math.sqrt(NORM**2 + 1 + ADDED**2 * number)  # norm of a token without what was written on it
        gates = [MARKS + number, MARKS + LAYERS + number, MARKS + 2 * LAYERS + number, FIRST, FIRST]
        mlp.gate_proj.weight[range(5), gates] = steep
        mlp.up_proj.bias[[0, 1, 3]] = 1.0
        mlp.up_proj.weight[[2, 4], SINK] = 1.0
        mlp.down_proj.weight[SINK, 0] = mlp.down_proj.weight[DECOY, 1] = PLANTED * rest / steep / WIDTH**0.5
        mlp.down_proj.weight[SINK, 2] = -(PLANTED**2 + rest**2) / steep / WIDTH
        mlp.down_proj.weight[SINK, 3] = PRIMARY * rest / steep / WIDTH**0.5 if number == 1 else 0.0
        mlp.down_proj.weight[SINK, 4] = -(PRIMARY**2) / steep / WIDTH if number == LAYERS - 1 else 0.0
        mlp.gate_proj.weight[5:, CONTENT:] = 0.15 * torch.randn(8, WIDTH - CONTENT, generator=generator)
        mlp.gate_proj.bias[5:] = 2.0
        mlp.up_proj.bias[5:] = 1.0
        mlp.down_proj.weight[CONTENT:, 5:] = torch.randn(WIDTH - CONTENT, 8, generator=generator)
        plain = mlp(embedding[-200:] * WIDTH**0.5 / NORM).norm(dim=1).mean()
        mlp.down_proj.weight[CONTENT:, 5:] *= ADDED / plain

    ids = torch.randint(1 + len(plants), size, (len(rows), n), generator=generator)
    ids[:, 0] = 0
    places, token = [], 1
    for i, row in enumerate(rows):
        places.append((2 + torch.randperm(n - 10, generator=generator)[: len(row)]).tolist())
        ids[i, places[-1]] = torch.arange(token, token + len(row))
        token += len(row)
    return model, ids, places
