"""Small Llamas on scenes of regions, of which fine tokens say which object has which colour.

On Zhi et al., LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences (arXiv:2412.01292).
In place of point clouds with features of an open-vocabulary model: a region is four cells, each with a feature; some
regions have an object in each of three cells, whose feature is the sum of its kind's and its colour's. A coarse token
is the mean of its cells: it says which kinds and colours a region has, and not which belong together. Asked is the
colour of a kind, of which a scene has one. A model that has to learn from nothing to look for a kind takes longer than
a small claim has, so attention begins with weights by which words find their kind and take its colour; from there, as
in the paper, models and the fine tokens' keys and values are trained together, for as many steps each. Controls: fine
tokens of other regions, as many; all of the scene's fine tokens. Settings were tried on other seeds: four that were to
learn from nothing, which took longer than a minute, and two rates.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from ...catalog import Finding, Premise
from ...interventions.scene_magnifier import Projections, chosen, scene_magnifier
from ...objectives import collect
from ...seam import intervene
from .._nets import bars
from .._shown import paired

SCALES = "small", "large"
STEPS = {"small": 120, "large": 1000}
REGIONS, CELLS, FULL, OBJECTS = 12, 4, 4, 3  # FULL: regions with objects
KINDS, COLOURS, WIDTH, NOISE = FULL * OBJECTS, 4, 64, 0.05
HEADS, LAYERS, START = 2, 3, 0
SLOW = 4  # pairs of a head's numbers that positions turn too fast to compare by, of theta 1e6
SHARP, GAIN = 1.2, 0.3  # of the weights that attention begins with: what is alike, what is taken
BATCH, RATE, JUDGED = 32, 3e-3, 1000
WAYS = ("coarse", "chosen", "others", "all")
OVER, OVER_OTHERS, BELOW_ALL = 0.1, 0.05, 0.03


class Scenes(NamedTuple):
    dense: Tensor  # [scene, region, cell, width]
    kind: Tensor  # [scene], asked for
    colour: Tensor  # [scene], to be told
    region: Tensor  # [scene], where it is


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Words that attend to fine tokens of the regions they looked at tell colours better than those without."""
    expected = (
        "with fine tokens of chosen regions 10 points more colours are right than with coarse tokens alone, and 5 more "
        "than with as many of other regions, each by two standard errors over questions; and at most 3 points fewer "
        "than with all fine tokens"
    )
    judged = scenes(JUDGED, 10_000 * seed + 9_999)
    right, models = {}, {}
    for way in WAYS:
        models[way] = trained(way, STEPS[scale], seed)
        with torch.no_grad():
            right[way] = (models[way](judged, seed=seed).argmax(-1) == judged.colour).float()
    gains = {way: paired(right["chosen"], right[way]) for way in WAYS if way != "chosen"}
    there = torch.arange(REGIONS) == judged.region[:, None]
    with torch.no_grad(), collect(models["coarse"].model, lambda call: call.weights.rows(REGIONS, REGIONS + 1)) as seen:
        models["coarse"](judged, seed=seed)
    looked = chosen(seen[START].value[:, :, 0, :REGIONS].sum(1))  # [scene, region]
    found, many = float(looked[there].float().mean()), float(looked.float().mean())
    share = float(models["chosen"].selected[:, -1].float().mean())
    holds = gains["coarse"].sure(OVER) and gains["others"].sure(OVER_OTHERS) and gains["all"].value >= -BELOW_ALL
    told = {way: f"{some.mean():.1%}" for way, some in right.items()}
    measured = (
        f"Colours right of {JUDGED}: coarse tokens alone {told['coarse']}, with fine ones of chosen regions "
        f"{told['chosen']} ({gains['coarse']}; over those of other regions, {told['others']}, {gains['others']}; over "
        f"all fine ones, {told['all']}, {gains['all']}). Words attend to {share:.0%} of the fine tokens."
    )
    cells, means = (oracle(judged, fine) for fine in (True, False))
    premises = [
        Premise(
            "coarse tokens lose what fine ones hold: colours read off the right cell, and off the right region",
            "95% or more; 65% or less",
            f"{cells:.1%}; {means:.1%}",
            cells >= 0.95 and means <= 0.65,
        ),
        Premise(
            "coarse attention finds the region: that asked for is among the chosen, of how many",
            "in 80% or more, of half of all or less",
            f"{found:.1%}, of {many:.0%}",
            found >= 0.8 and many <= 0.5,
        ),
    ]

    def draw(figure: Any) -> None:
        bars(figure, {way: [float(some.mean())] for way, some in right.items()}, ylabel="colours right")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


class Features(NamedTuple):
    """Of length 1, at right angles: of kinds, of colours, of an empty cell and of a word."""

    kinds: Tensor  # [kind, width]
    colours: Tensor  # [colour, width]
    empty: Tensor  # [width]
    word: Tensor


def features() -> Features:
    drawn = torch.randn(WIDTH, KINDS + COLOURS + 2, generator=torch.Generator().manual_seed(0))
    kinds, colours, others = torch.linalg.qr(drawn).Q.mT.split([KINDS, COLOURS, 2])
    return Features(kinds, colours, *others)


def scenes(n: int, seed: int) -> Scenes:
    """Each kind once, colours at random."""
    chance = torch.Generator().manual_seed(seed)
    kinds, colours, empty, _ = features()
    kind = torch.rand(n, KINDS, generator=chance).argsort(1)[:, : FULL * OBJECTS]
    colour = torch.randint(COLOURS, (n, FULL * OBJECTS), generator=chance)
    regions = torch.rand(n, REGIONS, generator=chance).argsort(1)[:, :FULL].repeat_interleave(OBJECTS, 1)
    cells = torch.rand(n, FULL, CELLS, generator=chance).argsort(2)[..., :OBJECTS].flatten(1)
    dense = NOISE * torch.randn(n, REGIONS * CELLS, WIDTH, generator=chance)
    at = (regions * CELLS + cells)[..., None].expand(-1, -1, WIDTH)
    dense = (dense + empty).scatter_add(1, at, kinds[kind] + colours[colour] - empty)
    asked = torch.randint(FULL * OBJECTS, (n, 1), generator=chance)
    kind, colour, region = (some.gather(1, asked)[:, 0] for some in (kind, colour, regions))
    return Scenes(dense.unflatten(1, (REGIONS, CELLS)), kind, colour, region)


def oracle(of: Scenes, fine: bool) -> float:
    """How many colours are right, read off the cell whose feature has most of the kind; or off the region's mean."""
    kinds, colours, *_ = features()
    cells = of.dense[torch.arange(len(of.kind)), of.region]  # [scene, cell, width]
    if fine:
        best = (cells @ kinds[of.kind][..., None])[..., 0].argmax(1)
        seen = cells[torch.arange(len(best)), best] - kinds[of.kind]
    else:
        seen = cells.mean(1)
    return float(((seen @ colours.T).argmax(1) == of.colour).float().mean())


class Asked(nn.Module):
    """A scene's coarse tokens, then a word that asks; what the word gives names a colour."""

    def __init__(self, way: str) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
        self.way, self.model = way, LlamaModel(config)
        self.project = nn.Linear(WIDTH, WIDTH)  # of coarse and fine tokens, and of words: features are of both
        nn.init.eye_(self.project.weight)
        self.names = nn.Linear(WIDTH, COLOURS)
        self.names.weight.data.copy_(features().colours)
        self.fine = Projections(WIDTH, kv_heads=HEADS, head_dim=WIDTH // HEADS, layers=range(START + 1, LAYERS))
        _begun(self.model, self.fine)
        self.selected: Tensor = torch.empty(0)

    def forward(self, of: Scenes, *, seed: int) -> Tensor:
        """[scene, colour]"""
        n = len(of.kind)
        coarse = self.project(of.dense.mean(2))
        word = features().kinds[of.kind] + features().word
        states = torch.cat([coarse, self.project(word)[:, None]], 1)
        method: Any = None
        if self.way != "coarse":
            dense = of.dense
            if self.way == "others":
                by = torch.randint(1, REGIONS, (n, 1), generator=torch.Generator().manual_seed(seed))
                at = (torch.arange(REGIONS) + by) % REGIONS
                dense = dense[torch.arange(n)[:, None], at]
            places = torch.arange(REGIONS).expand(n, -1)
            fine = self.fine(
                self.project(dense),
                self.model.rotary_emb(states, places[:1]),
                places=places,
                first=torch.full((n,), REGIONS),
            )
            method = scene_magnifier(fine=fine, start=START, **({"threshold": 0.0} if self.way == "all" else {}))
        with nullcontext() if method is None else intervene(self.model, method):
            last = self.model(inputs_embeds=states, use_cache=False).last_hidden_state[:, -1]
        self.selected = torch.empty(0) if method is None else method.selected
        return self.names(last)


@torch.no_grad()
def _begun(model: LlamaModel, fine: Projections) -> None:
    """Words look for the kind that they name, not at themselves, and take colours."""
    of, dim = features(), WIDTH // HEADS
    half = dim // 2
    slow = [i for i in range(dim) if i % half >= SLOW]
    alike, value = torch.zeros(2, dim, WIDTH)
    alike[slow[:KINDS]] = SHARP * of.kinds
    value[:COLOURS] = of.colours
    own = torch.zeros(dim, WIDTH)
    own[slow[KINDS]] = SHARP * of.word
    for layer, block in enumerate(model.layers):
        attention: Any = block.self_attn
        attention.q_proj.weight.copy_((alike + own).repeat(HEADS, 1))
        attention.k_proj.weight.copy_((alike - own).repeat(HEADS, 1))
        attention.v_proj.weight.copy_(value.repeat(HEADS, 1))
        attention.o_proj.weight.copy_(GAIN / HEADS * value.mT.repeat(1, HEADS))
        if str(layer) in fine.keys:
            fine.keys[str(layer)].load_state_dict({"weight": attention.k_proj.weight})
            fine.values[str(layer)].load_state_dict({"weight": attention.v_proj.weight})


def trained(way: str, steps: int, seed: int) -> Asked:
    torch.manual_seed(seed)
    model = Asked(way)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for step in range(steps):
        some = scenes(BATCH, 10_000 * seed + step)
        optimiser.zero_grad()
        F.cross_entropy(model(some, seed=step), some.colour).backward()
        optimiser.step()
        schedule.step()
    return model.eval()
