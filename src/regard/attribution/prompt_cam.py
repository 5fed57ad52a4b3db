"""Prompt-CAM: a prompt for each class before a frozen vision transformer; what the true class's attends to, is a trait.

Chowdhury et al., Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained Analysis (arXiv:2501.09333),
section 3, and the authors' code. Before each layer as many learned prompts as there are classes are put in front of the
tokens (before the class token), and taken away behind it, all but the last layer's ("deep"; "shallow" prompts are put
before the first layer alone and carried through). A class's logit is read off the last state of its own prompt, by one
vector for all classes. The map of a class is the last layer's attention of its prompt to the patches, head by head, not
made to sum to 1. Heads are ranked by blurring: with its logits at 0 a head looks evenly; the head without which the
class stays likeliest goes first, and those that go last matter most.

The backbone stays in evaluation mode in training too, where the authors keep its stochastic depth of 0.1 for DINO. They
train with SGD; how is the caller's. In the shallow form, of which the code has none, no prompts are taken away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import hooks, sites
from ..call import Call, Site
from ..prediction import Prediction, Target, predict
from ..recording import statistic
from ..seam import intervene, record
from ._maps import blocks, enlarged, grid


class PromptCAM(nn.Module):
    """A classifier: a frozen backbone with a prompt for each class, and one vector that reads them all.

    backbone: a vision transformer of one sequence of tokens that gives its last states, such as transformers' ViT, DINO
    and DINOv2; of a classifier its `base_model`. It becomes part of this, is frozen and stays in evaluation mode.
    labels: the names of the classes. deep: prompts before every layer, or before the first one alone. dropout: of
    prompts.

    Train it by the cross entropy of `model(pixel_values).logits`: what requires a gradient are `prompts` and `head`.
    ValueError where the backbone attends in windows, by relative positions, in several stacks, or not at all.

    >>> import regard
    >>> from regard.attribution.prompt_cam import PromptCAM
    >>> model = PromptCAM(regard.load("viewer").model.base_model, ["red star", "red heart"])
    >>> model(torch.zeros(1, 3, 64, 64)).logits.shape
    torch.Size([1, 2])
    """

    def __init__(self, backbone: nn.Module, labels: Sequence[str], *, deep: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        kind, config = type(backbone).__name__, cast(Any, getattr(backbone, "config", None))
        found = sites.find(backbone)
        self.layers = blocks(backbone)
        if len({site.stack for site in found.values()}) != 1 or len(self.layers) != len(found):
            raise ValueError(f"PromptCAM: {kind} is no stack of layers of self attention, one in each")
        if not hasattr(config, "hidden_size") or not hasattr(config, "patch_size"):
            raise ValueError(f"PromptCAM: {kind} has no config that says hidden_size and patch_size")
        if any(v for k, v in vars(config).items() if k.endswith("relative_position_bias")):
            raise ValueError(f"PromptCAM: {kind} has positions relative to its own tokens, and none for prompts")
        if not labels or isinstance(labels, str) or len(set(labels)) != len(labels):
            raise ValueError(f"PromptCAM: labels are the classes' names, each once, not {labels!r}")
        self.backbone, self.deep = backbone.requires_grad_(False), deep
        names = dict(enumerate(labels))
        self.config = SimpleNamespace(id2label=names, label2id={v: k for k, v in names.items()}, problem_type=None)
        width, size = config.hidden_size, config.patch_size
        pixels = size * size if isinstance(size, int) else math.prod(size)
        bound = math.sqrt(6 / (3 * pixels + width))
        depth = len(self.layers) if deep else 1
        self.prompts = nn.Parameter(torch.empty(depth, len(labels), width).uniform_(-bound, bound))
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, 1)
        self.to(next(backbone.parameters()).device)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, pixel_values: Tensor, **given: Any) -> SimpleNamespace:
        """With `logits` [batch, class]. `given` goes to the backbone, such as `interpolate_pos_encoding`."""
        count = self.prompts.shape[1]
        with ExitStack() as undo:
            for i, name in enumerate(self.layers):
                prompts = self.dropout(self.prompts[i]) if self.deep or i == 0 else None
                dropped = count if self.deep and i + 1 < len(self.layers) else 0
                run = partial(_prompted, prompts, dropped)
                hooks.wrap(undo, self.backbone.get_submodule(name), run)
            states = getattr(self.backbone(pixel_values, **given), "last_hidden_state", None)
        if states is None:
            raise ValueError(
                f"PromptCAM: {type(self.backbone).__name__} gives no last states; of a classifier give the base_model"
            )
        return SimpleNamespace(logits=self.read(states))

    def read(self, states: Tensor) -> Tensor:
        """Logits of the last states. [batch, token, dim] -> [batch, class]"""
        return self.head(states[:, : self.prompts.shape[1]].to(self.head.weight))[..., 0]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of what was learned, without the backbone."""
        about = {"labels": list(self.config.label2id), "deep": self.deep, "dropout": self.dropout.p}
        learned = {k: v.detach().contiguous() for k, v in self.state_dict().items() if not k.startswith("backbone.")}
        save_file(learned, path, {"prompt_cam": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, backbone: nn.Module) -> Self:
        """What `save` wrote, before this backbone. ValueError where the file is another's, or does not fit."""
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("prompt_cam")
            if about is None:
                raise ValueError(f"{path} holds no prompts of PromptCAM.save")
            model = cls(backbone, **json.loads(about))
            learned = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        own = {k: v for k, v in model.state_dict().items() if k in learned}
        if wrong := [k for k, v in learned.items() if k not in own or own[k].shape != v.shape]:
            kind, shape = type(model.backbone).__name__, list(learned[wrong[0]].shape)
            raise ValueError(f"{path}: {wrong[0]} {shape} does not fit {kind}; load the backbone it was trained before")
        model.load_state_dict(learned, strict=False)
        return model.eval()


def _prompted(
    prompts: Tensor | None, dropped: int, layer: nn.Module, forward: Any, states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """A layer with prompts put before its tokens, and `dropped` of its first outputs taken away."""
    if prompts is not None:
        if states.ndim != 3 or states.shape[-1] != prompts.shape[-1]:
            raise ValueError(
                f"PromptCAM is for vision transformers of one sequence of tokens; {type(layer).__name__} is given "
                f"{list(states.shape)}, and prompts are {prompts.shape[-1]} wide"
            )
        states = torch.cat([prompts.expand(len(states), -1, -1).to(states), states], 1)
    output = forward(states, *args, **kwargs)
    if not dropped:
        return output
    return (output[0][:, dropped:], *output[1:]) if isinstance(output, tuple) else output[:, dropped:]


def prompt_cam(
    model: nn.Module, inputs: Mapping[str, Any], target: Target = None, *, head: int | None = None
) -> xr.DataArray:
    """Weight of the target's prompt on each patch in the last layer, 0 to 1. [batch, row, column], in pixels

    What makes the picture one of this class, where the target is the true one; of another class, what was looked for.
    The mean over heads, or of one. Enlarged to pixels bicubically, so that it may pass 0 and 1 a little.

    ValueError where the model is no `PromptCAM`, or has no such head.

    >>> import regard
    >>> from regard.attribution.prompt_cam import PromptCAM
    >>> model = PromptCAM(regard.load("viewer").model.base_model, ["red star", "red heart"])
    >>> regard.attribute(model, {"pixel_values": torch.zeros(1, 3, 64, 64)}, "red star", method="prompt_cam").dims
    ('batch', 'row', 'column')
    """
    with predict(_checked(model), inputs, target) as prediction:
        found = _weights(prediction)
        if head is not None and not 0 <= head < found.shape[1]:
            raise ValueError(f"prompt_cam(head={head}): the last layer has heads 0 to {found.shape[1] - 1}")
        chosen = found.mean(1) if head is None else found[:, head]
        return prediction.labelled(enlarged(prediction, grid(prediction, chosen), "bicubic"), "prompt_cam")


def head_maps(model: nn.Module, inputs: Mapping[str, Any], target: Target = None) -> xr.DataArray:
    """Weight of the target's prompt on each patch, in each head of the last layer. [batch, head, row, column]"""
    with predict(_checked(model), inputs, target) as prediction:
        found = grid(prediction, _weights(prediction))
        along = {"target": ("batch", prediction.target.cpu().numpy())}
        return xr.DataArray(found.cpu().numpy(), along, ("batch", "head", "row", "column"), "weight")


def rank_heads(model: nn.Module, inputs: Mapping[str, Any], target: Target = None) -> xr.DataArray:
    """Heads of the last layer by how much the target needs them, the most important first. [batch, rank]

    The coordinate `probability` is what is left of the target's, with this head blurred and all that are ranked behind
    it. Runs the model head * (head + 1) / 2 times.
    """
    with predict(_checked(model), inputs, target) as prediction, torch.no_grad():
        heads = _weights(prediction).shape[1]
        blur = Blur(prediction.target, torch.zeros(len(prediction.target), heads, dtype=torch.bool))
        order, left = [], []
        for _ in range(heads):
            remaining = torch.stack([(~row).nonzero()[:, 0] for row in blur.heads])
            tried = [blur.and_of(remaining[:, i]) for i in range(remaining.shape[1])]
            likely = []
            for one in tried:
                with intervene(prediction.model, one):
                    likely.append(prediction.probability())
            best = torch.stack(likely).max(0)
            head = remaining.gather(1, best.indices.cpu()[:, None])[:, 0]
            blur = blur.and_of(head)
            order.append(head)
            left.append(best.values.cpu())
        return xr.DataArray(
            torch.stack(order[::-1], 1).numpy(),
            {"probability": (("batch", "rank"), torch.stack(left[::-1], 1).numpy())},
            ("batch", "rank"),
            "head",
        )


class Blur:
    """An intervention: in the last layer of a `PromptCAM`, a class's prompt looks evenly at everything in some heads.

    target: the class, of each sample. [batch] heads: which are blurred. [batch, head] boolean

        with regard.intervene(model, Blur(target, heads)):
            model(pixel_values).logits
    """

    def __init__(self, target: Tensor, heads: Tensor) -> None:
        self.target, self.heads = target, heads
        self.last: Site | None = None

    def and_of(self, head: Tensor) -> Blur:
        """With one more in each sample. head: [batch]"""
        return Blur(self.target, self.heads.scatter(1, head[:, None], True))

    def begin(self, model: nn.Module) -> None:
        self.last = _last(_checked(model))

    def inputs(self, call: Call) -> Call:
        if self.last is None or call.site.name != self.last.name:
            return call
        if self.heads.shape != call.query.shape[:2]:
            raise ValueError(f"Blur: heads {list(self.heads.shape)}, and {call.site} has {list(call.query.shape[:2])}")
        own = torch.zeros(call.query.shape[:3], dtype=torch.bool, device=call.query.device)
        rows = torch.arange(len(own), device=own.device)
        own[rows, :, self.target.to(own.device)] = self.heads.to(own.device)
        return call.but(query=call.query.masked_fill(own[..., None], 0.0))  # logits of 0


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(getattr(model, "_orig_mod", model), PromptCAM):
        raise ValueError(
            f"prompt_cam reads the prompts of classes, and {type(model).__name__} has none; train a PromptCAM on it"
        )
    return model


def _last(model: nn.Module) -> Site:
    return max(sites.find(model).values(), key=lambda site: site.layer)


def _weights(prediction: Prediction) -> Tensor:
    """Of the target's prompt, in the last layer, on all that stand behind the prompts. [batch, head, key]"""
    model = cast(PromptCAM, getattr(prediction.model, "_orig_mod", prediction.model))
    count, last, rows = model.prompts.shape[1], _last(model).name, torch.arange(len(prediction.target))
    seen: list[Tensor] = []

    @statistic("batch head key", title="Weights of a prompt")
    def read(call: Call) -> None:
        if call.site.name == last:
            weights = call.weights.rows(0, count)
            seen.append(weights[rows, :, prediction.target.to(weights.device)][..., count:])

    with torch.no_grad(), record(prediction.model, read):
        prediction.score()
    return seen[0]
