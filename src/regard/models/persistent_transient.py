"""Two recurrent graph networks that forecast people and objects: one always runs, one wakes while something is handled.

Tran et al., Persistent-Transient Duality: A Multi-mechanism Approach for Modeling Human-Object Interaction
(arXiv:2307.12729), with the details of the authors' code. The persistent network sees all people and objects in the
world's coordinates. Each person also has a transient one, of a centre and a leaf for each object, in coordinates around
the person. A switch of distance and memory turns it on; while it is on, its prediction stands for the persistent one's.

Deviations: dense tensors and masks where the code has a graph library. An object's distance is from its middle to the
box around a person's joints. What the centre tells the persistent network is that of the step before. Coordinates
around a person are moved, not turned. Activations are ReLUs, and readings of states have one hidden layer.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ._relations import Mixed, RelationAttention

MOST = 8  # people, each with a graph of their own


@dataclass(frozen=True)
class DualityConfig:
    """Sizes of a `PersistentTransient`, and which of its mechanisms it has."""

    dim: int = 3  # coordinates of a point
    joints: int = 1  # points of a person
    corners: int = 1  # points of an object
    kinds: int = 1  # of objects
    width: int = 64
    heads: int = 1
    mechanism: Literal["both", "persistent", "transient"] = "both"  # transient: the switch is on throughout
    switch: Literal["learned", "distance", "memory", "rule"] = "learned"
    aware: float = 1.0  # as far as a centre attends to leaves, in the unit of the coordinates
    reach: float = 0.3  # as far as an object is handled, and the rule's distance


class Forecast(NamedTuple):
    """What is told of the steps after those observed, and of the switch at every step."""

    human: Tensor  # [batch, person, step, joint, dim]
    objects: Tensor  # [batch, object, step, corner, dim]
    score: Tensor  # of the switch, from which step each next one is told: observed + steps - 1 [batch, person, step]
    on: Tensor  # whether it is on, boolean, of the same shape
    observed_human: Tensor  # of observed steps from the second on, each told from the ones before
    observed_objects: Tensor


class PersistentTransient(nn.Module, PyTorchModelHubMixin):
    """Forecasts people and the objects that they handle, step by step, each told from the last.

    `regard.record` sees the attention of each relation in each step, as calls of cross attention.

    >>> import torch
    >>> from regard.models.persistent_transient import persistent_transient
    >>> model = persistent_transient(dim=2, width=8)
    >>> human, objects = torch.rand(4, 1, 6, 1, 2), torch.rand(4, 3, 6, 1, 2)
    >>> model(human, objects, 5).objects.shape
    torch.Size([4, 3, 5, 1, 2])
    """

    def __init__(self, config: DualityConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.mechanism not in ("both", "persistent", "transient"):
            raise ValueError(f"PersistentTransient: mechanism is both, persistent or transient, not {c.mechanism!r}")
        if c.switch not in ("learned", "distance", "memory", "rule"):
            raise ValueError(f"PersistentTransient: switch is learned, distance, memory or rule, not {c.switch!r}")
        person, thing, w = c.joints * c.dim, c.corners * c.dim, c.width
        self.persistent = nn.ModuleDict(
            {
                "person": _embedding(person, w),
                "object": _embedding(thing + c.kinds, w),
                "objects_to_person": RelationAttention(2 * w, w, heads=c.heads),
                "people_to_person": RelationAttention(2 * w, w, heads=c.heads, same=True),
                "people_to_object": RelationAttention(2 * w, w, heads=c.heads),
                "objects_to_object": RelationAttention(2 * w, w, heads=c.heads, same=True),
                "person_mix": Mixed(w),
                "object_mix": Mixed(w),
                "person_state": nn.GRUCell(3 * w, w),
                "object_state": nn.GRUCell(2 * w, w),
                "person_step": _reading(w, person),
                "object_step": _reading(w, thing),
            }
        )
        if c.mechanism == "persistent":
            return
        self.beta = nn.Parameter(torch.ones(()))  # of the distance in the switch
        self.memory = _reading(w, 1)
        self.transient = nn.ModuleDict(
            {
                "centre": _embedding(person, w),
                "leaf": _embedding(thing + c.kinds, w),
                "leaves_to_centre": RelationAttention(2 * w, w, heads=c.heads),
                "from_person": _embedding(w, w),
                "to_person": _embedding(w, w),
                "to_leaf": _embedding(2 * w, w),
                "centre_state": nn.GRUCell(3 * w, w),
                "leaf_state": nn.GRUCell(2 * w, w),
                "centre_step": _reading(w, person),
                "leaf_step": _reading(w, thing),
            }
        )

    def forward(
        self, human: Tensor, objects: Tensor, steps: int, *, kinds: Tensor | None = None, on: Tensor | None = None
    ) -> Forecast:
        """human: observed [batch, person, step, joint, dim]; objects: [batch, object, step, corner, dim]; kinds: of
        objects, one-hot [batch, object, kind]; on: boolean [batch, person, observed + steps - 1], which takes the
        switch's place.

        ValueError for other shapes, values that are not finite, fewer than 1 step, more than 8 people, no object, kinds
        that were not given where there are several, and `on` where no switch is.
        """
        kinds = self._checked(human, objects, steps, kinds, on)
        batch, people, observed = human.shape[:3]
        zero = human.new_zeros(batch, people, self.config.width)
        things = zero.new_zeros(batch, objects.shape[1], self.config.width)
        leaves = zero.new_zeros(batch, people, *things.shape[1:])
        states, known = (zero, things, zero, leaves, zero), (human[:, :, 0], objects[:, :, 0])
        told: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for t in range(observed + steps - 1):
            here = (human[:, :, t], objects[:, :, t]) if t < observed else known
            found, states = self._step(*here, kinds, states, None if on is None else on[:, :, t])
            told.append(found)
            known = found[:2]
        person, thing, score, label = (torch.stack(some, 2) for some in zip(*told, strict=True))
        first = observed - 1
        return Forecast(
            person[:, :, first:], thing[:, :, first:], score, label.bool(), person[:, :, :first], thing[:, :, :first]
        )

    def _step(
        self, human: Tensor, objects: Tensor, kinds: Tensor, states: tuple[Tensor, ...], on: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Where all are in the next step, the switch's score and label, and the states after it."""
        p, (g_h, g_o, g_c, g_l, said) = self.persistent, states
        e_h, e_o = p["person"](human.flatten(2)), p["object"](torch.cat([objects.flatten(2), kinds], -1))
        x_h, x_o = torch.cat([e_h, g_h], -1), torch.cat([e_o, g_o], -1)
        to_person = p["objects_to_person"](x_h, x_o).message, p["people_to_person"](x_h, x_h, _others(x_h)).message
        to_object = p["people_to_object"](x_o, x_h).message, p["objects_to_object"](x_o, x_o, _others(x_o)).message
        g_h = _next(p["person_state"], g_h, e_h, p["person_mix"](*to_person), said)
        g_o = _next(p["object_state"], g_o, e_o, p["object_mix"](*to_object))
        person = human + p["person_step"](g_h).view_as(human)
        thing = objects + p["object_step"](g_o).view_as(objects)
        if self.config.mechanism == "persistent":
            off = human.new_zeros(human.shape[:2])
            return (person, thing, off, off), (g_h, g_o, g_c, g_l, said)

        far = distance(human, objects)
        score, label = self.switched(far.amin(-1), g_h, on)
        awake = label.bool()
        aware, handled = (awake[..., None] & (far <= limit) for limit in (self.config.aware, self.config.reach))
        q, centre = self.transient, human.mean(2)
        around = objects[:, None] - centre[:, :, None, None]  # [batch, person, object, corner, dim]
        e_c = q["centre"]((human - centre[:, :, None]).flatten(2))
        e_l = q["leaf"](torch.cat([around.flatten(3), kinds[:, None].expand(-1, human.shape[1], -1, -1)], -1))
        x_c, x_l = torch.cat([e_c, g_c], -1), torch.cat([e_l, g_l], -1)
        heard = q["leaves_to_centre"](x_c.flatten(0, 1)[:, None], x_l.flatten(0, 1), aware.flatten(0, 1)[:, None])
        near = _next(q["centre_state"], g_c, e_c, heard.message.view_as(g_c), q["from_person"](g_h))
        g_c = torch.where(awake[..., None], near, g_c)
        to_leaf = q["to_leaf"](torch.cat([e_c, g_c], -1))[:, :, None].expand_as(g_l)
        g_l = torch.where(handled[..., None], _next(q["leaf_state"], g_l, e_l, to_leaf), g_l)

        # Both frames are where the person is now, so that a step in the one is a step in the other.
        moved = human + q["centre_step"](g_c).view_as(human)
        carried = objects[:, None] + q["leaf_step"](g_l).view_as(around)
        gate = label[..., None, None]
        person = gate * moved + (1 - gate) * person
        sure, who = (score.detach()[..., None] * handled).max(1)  # [batch, object]
        of = carried.gather(1, who[:, None, :, None, None].expand_as(carried[:, :1]))[:, 0]
        thing = torch.where((sure >= 0.5)[..., None, None], of, thing)
        said = q["to_person"](g_c) * awake[..., None]
        return (person, thing, score, label), (g_h, g_o, g_c, g_l, said)

    def switched(self, far: Tensor, state: Tensor, on: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score and label of the switch, the label 0 or 1 with the score's gradient. [batch, person]

        far: to the nearest object, [batch, person]; state: [batch, person, width]; on: what the label is to be.
        """
        by_distance = (-self.beta.square() * far).exp()
        by_memory = self.memory(state)[..., 0].sigmoid()
        kind = self.config.switch
        score = by_distance * by_memory
        score = {"distance": by_distance, "memory": by_memory}.get(kind, score)
        if kind == "rule":
            score = (far <= self.config.reach).to(score)
        if self.config.mechanism == "transient":
            score = torch.ones_like(score)
        if on is not None:
            score = on.to(score)
        return score, (score >= 0.5).to(score) - score.detach() + score

    def loss(
        self,
        forecast: Forecast,
        human: Tensor,
        objects: Tensor,
        *,
        on: Tensor | None = None,
        weight: float = 0.1,
    ) -> Tensor:
        """Mean distance of all that was told from what was, of observed steps from the second on and those after.

        human, objects: observed steps and those after, as `forward` takes them. on: whether each person handles
        something, boolean as `Forecast.on`; then `weight` times the cross entropy of the switch is added.
        """
        pairs = (
            (torch.cat([forecast.observed_human, forecast.human], 2), human[:, :, 1:]),
            (torch.cat([forecast.observed_objects, forecast.objects], 2), objects[:, :, 1:]),
        )
        for told, true in pairs:
            if told.shape != true.shape:
                raise ValueError(f"loss: {list(true.shape)} steps after the first were, {list(told.shape)} were told")
        off = sum((told - true).norm(dim=-1).mean() for told, true in pairs)
        if on is None:
            return torch.as_tensor(off)
        if self.config.mechanism != "both" or self.config.switch == "rule":
            raise ValueError("loss: on trains a switch that is learned, and this model has none")
        if on.dtype != torch.bool or on.shape != forecast.score.shape:
            raise ValueError(
                f"loss: on is boolean {list(forecast.score.shape)}, from which step each was told, so not of the last; "
                f"got {on.dtype} {list(on.shape)}"
            )
        return off + weight * F.binary_cross_entropy(forecast.score.clamp(1e-6, 1 - 1e-6), on.to(forecast.score))

    def _checked(self, human: Tensor, objects: Tensor, steps: int, kinds: Tensor | None, on: Tensor | None) -> Tensor:
        c = self.config
        for name, given, points in (("human", human, c.joints), ("objects", objects, c.corners)):
            if given.ndim != 5 or given.shape[3:] != (points, c.dim) or 0 in given.shape[1:]:
                wanted = f"[batch, {'person' if name == 'human' else 'object'}, step, {points}, {c.dim}]"
                raise ValueError(f"PersistentTransient: {name} is {wanted}, one or more; got {list(given.shape)}")
            if not given.isfinite().all():
                raise ValueError(f"PersistentTransient: {name} holds values that are not finite")
        if len(human) != len(objects) or human.shape[2] != objects.shape[2]:
            raise ValueError(
                f"PersistentTransient: human {list(human.shape)} and objects {list(objects.shape)} are of other "
                f"samples or steps"
            )
        if human.shape[1] > MOST or steps < 1:
            raise ValueError(
                f"PersistentTransient: at most {MOST} people and 1 step or more; got {human.shape[1]} and {steps}"
            )
        if kinds is None and c.kinds > 1:
            raise ValueError(f"PersistentTransient: there are {c.kinds} kinds of objects; say which they are (kinds)")
        kinds = human.new_ones(*objects.shape[:2], 1) if kinds is None else kinds.to(human)
        if kinds.shape != (*objects.shape[:2], c.kinds):
            raise ValueError(f"PersistentTransient: kinds are {[*objects.shape[:2], c.kinds]}; got {list(kinds.shape)}")
        wanted = (*human.shape[:2], human.shape[2] + steps - 1)
        if on is not None and (c.mechanism != "both" or on.dtype != torch.bool or on.shape != wanted):
            raise ValueError(
                f"PersistentTransient: on is boolean {list(wanted)}, of a model with both mechanisms; got {on.dtype} "
                f"{list(on.shape)}, {c.mechanism}"
            )
        return kinds


def distance(human: Tensor, objects: Tensor) -> Tensor:
    """From the box around each person's joints to the middle of each object; 0 inside. [batch, person, object]

    human: [batch, person, joint, dim]; objects: [batch, object, corner, dim].

    >>> import torch
    >>> distance(torch.tensor([[[[0.0, 0.0], [1.0, 2.0]]]]), torch.tensor([[[[4.0, 6.0]], [[0.5, 1.0]]]]))
    tensor([[[5., 0.]]])
    """
    middle = objects.mean(2)[:, None]
    low, high = human.amin(2)[:, :, None], human.amax(2)[:, :, None]
    return (low - middle).clamp(min=0).add((middle - high).clamp(min=0)).norm(dim=-1)


def _next(cell: nn.Module, state: Tensor, *given: Tensor) -> Tensor:
    """A cell's next state, of any number of leading axes."""
    new: Tensor = cell(torch.cat(given, -1).flatten(0, -2), state.flatten(0, -2))
    return new.view_as(state)


def _others(nodes: Tensor) -> Tensor:
    """Everyone hears all but themselves. [1, node, node]"""
    n = nodes.shape[1]
    return ~torch.eye(n, dtype=torch.bool, device=nodes.device).expand(len(nodes), n, n)


def _embedding(dim: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, width), nn.ReLU())


def _reading(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def persistent_transient(**sizes: Any) -> PersistentTransient:
    """An untrained `PersistentTransient` of these sizes, the fields of `DualityConfig`."""
    return PersistentTransient(DualityConfig(**sizes))
