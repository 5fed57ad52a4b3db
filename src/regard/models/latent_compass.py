"""Directions of a generator that a person finds by sorting what it makes.

Latent Compass: Creation by Navigation (arXiv:2012.14283): a person sorts a few generated pictures into two heaps, by
something seen and perhaps not named; a linear model of the generator's codes, or of the activations of one of its
layers, tells the heaps apart; along its normal, other pictures change in the same way.

No code of the method itself is at hand: that the model is linear is the paper's, its regularisation, units and the loop
of `Compass.ask` are ours. In a layer, features are divided by their deviations over the sorted pictures first, and the
step is taken in those units; features that do not differ are left alone. Amounts beyond `limit` are refused, since a
generator's codes are drawn from a bounded region. Any module that makes pictures of codes will do; for a diffusion
model codes are the noise that it starts from. There is no attention here, so `regard.record` has nothing to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hooks import attach

MODELS = "logistic", "svm"
Amount = float | Tensor


class Direction(NamedTuple):
    """Where to go in codes, or in a layer, and where the boundary between the two heaps is."""

    step: Tensor  # of length 1, towards the heap labelled 1; without the axis of the batch
    spread: float  # deviation of what was sorted along it
    normal: Tensor  # score is this times the features, plus offset; above 0 in the heap labelled 1
    offset: float

    def scores(self, features: Tensor) -> Tensor:
        """On which side of the boundary, above 0 where labelled 1. [batch, ...] -> [batch]"""
        return features.double().flatten(1) @ self.normal.to(features.device).flatten() + self.offset


def separate(
    features: Tensor, labels: Tensor, *, model: str = "logistic", strength: float = 1.0
) -> tuple[Tensor, float]:
    """Normal and offset of a linear model that tells labels 1 from 0. [example, dim], [example] -> [dim] and a number

    model: "logistic" or "svm" (squared hinge); strength: of the squares of the normal, against the sum of losses; the
    offset is free. It has one optimum, found by Newton's steps in the space that the examples span, in float64.
    ValueError for another model, a strength that is not above 0, and labels that are not 0 and 1, one each.
    """
    if model not in MODELS or not strength > 0:
        raise ValueError(f"separate: model is one of {', '.join(MODELS)}, strength above 0; got {model!r}, {strength}")
    if features.ndim != 2 or labels.shape != features.shape[:1] or not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"separate: features [example, dim] and labels 0 or 1 [example]; got {list(features.shape)} and {labels}"
        )
    x, signs = features.double(), 2 * labels.double() - 1
    base, sizes, across = torch.linalg.svd(x, full_matrices=False)
    inputs = torch.cat([base * sizes, torch.ones_like(x[:, :1])], 1)
    ridge = torch.full_like(inputs[0], strength)
    ridge[-1] = 0.0

    def parts(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        margin = signs * (inputs @ w)
        if model == "logistic":
            miss = (-margin).sigmoid()
            return F.softplus(-margin).sum() + ridge @ w**2 / 2, -signs * miss, miss * (1 - miss)
        short = (1 - margin).clamp_min(0)
        return short.square().sum() + ridge @ w**2 / 2, -2 * signs * short, 2.0 * (short > 0)

    w = torch.zeros_like(ridge)
    for _ in range(200):
        loss, slope, bend = parts(w)
        gradient = inputs.T @ slope + ridge * w
        hessian = inputs.T @ (bend[:, None] * inputs) + torch.diag(ridge + 1e-12)
        way, share = torch.linalg.solve(hessian, gradient), 1.0
        while parts(w - share * way)[0] > loss - 1e-4 * share * (gradient @ way) and share > 1e-9:
            share /= 2
        w = w - share * way
        if gradient.abs().max() < 1e-10 * len(x):
            break
    return across.T @ w[:-1], float(w[-1])


class Compass(nn.Module):
    """Finds directions of a generator from sorted pictures, and steers by them.

    generator: makes pictures of codes [batch, ...], `generator(codes, *given)`, where `given` is a class or another
    condition; in evaluation mode, where it has layers that differ in training. layer: the name of a module in it, whose
    output is a tensor and which runs once a picture; None for the codes themselves. model, strength: see `separate`;
    limit: the largest amount. `directions` keeps those that were named, and the module's state with it.

    ValueError for no such layer or model.

    >>> import torch
    >>> from regard.models.latent_compass import Compass
    >>> compass = Compass(torch.nn.Identity())
    >>> codes = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [-2, 0]])
    >>> found = compass.fit(codes, [1, 1, 0, 0])
    >>> found.step, compass.mirror(found, torch.tensor([[2.0, 1]]))
    (tensor([1., 0.], dtype=torch.float64), tensor([[-2.,  1.]]))
    """

    directions: dict[str, Direction]

    def __init__(
        self,
        generator: nn.Module,
        layer: str | None = None,
        *,
        model: str = "logistic",
        strength: float = 1.0,
        limit: float = 3.0,
    ) -> None:
        super().__init__()
        if layer is not None and (not layer or layer not in dict(generator.named_modules())):
            some = ", ".join(name for name, _ in generator.named_modules() if name)
            raise ValueError(f"Compass: the generator has no module {layer!r}; it has {some or 'none'}")
        if model not in MODELS or not strength > 0 or not limit > 0:
            raise ValueError(
                f"Compass: model is one of {', '.join(MODELS)}, strength and limit are above 0; "
                f"got {model!r}, {strength}, {limit}"
            )
        self.generator, self.layer, self.model = generator, layer, model
        self.strength, self.limit, self.directions = strength, limit, {}

    def fit(self, codes: Tensor, labels: Tensor | Sequence[int], *given: Any, name: str | None = None) -> Direction:
        """The direction from pictures labelled 0 to those labelled 1, of their codes [batch, ...]; kept under `name`.

        ValueError for fewer than four pictures, labels of one kind or none of 0 and 1, codes that are not finite, and
        heaps that do not differ on average.
        """
        return self._fitted(self.features(codes, *given), torch.as_tensor(labels), name)

    @torch.no_grad()
    def features(self, codes: Tensor, *given: Any) -> Tensor:
        """What the linear model sees: codes, or the layer's output. [batch, ...]"""
        return codes if self.layer is None else self._run(codes, given, None)[1]

    def steer(self, direction: str | Direction | Mapping[str, float], codes: Tensor, amount: Amount = 1.0, *given: Any):
        """Pictures of codes moved along a direction; with amount 0 those of the codes as they are. [batch, ...]

        direction: a name, a direction, or names and their shares, whose steps are added; amount: in deviations of what
        was sorted, a number or one for each code [batch]. ValueError beyond the limit, and where shapes do not fit.
        """
        amounts = torch.as_tensor(amount, dtype=torch.float64, device=codes.device)
        if amounts.ndim and amounts.shape != codes.shape[:1]:
            raise ValueError(f"Compass: an amount is a number or [{len(codes)}], one a code; got {list(amounts.shape)}")
        shares = direction if isinstance(direction, Mapping) else {direction: 1.0} if isinstance(direction, str) else {}
        pairs = [(self._named(key), share) for key, share in shares.items()]
        pairs = pairs or ([(direction, 1.0)] if isinstance(direction, Direction) else [])
        if not pairs:
            raise ValueError("Compass: steer along one direction or more, got none")
        furthest = float(amounts.abs().max() if amounts.numel() else amounts.new_zeros(()))
        if not furthest * max(abs(share) for _, share in pairs) <= self.limit:
            raise ValueError(
                f"Compass: amounts are -{self.limit:g} to {self.limit:g} deviations, or raise `limit`; got {amount}"
            )
        move = sum(share * found.spread * found.step for found, share in pairs)
        assert isinstance(move, Tensor)

        def moved(features: Tensor) -> Tensor:
            self._fits(move, features)
            each = amounts.view(-1, *[1] * move.ndim) if amounts.ndim else amounts
            return torch.where(each == 0, features, features + (each * move.to(features.device)).to(features.dtype))

        return self._moved(codes, given, moved)

    def mirror(self, direction: str | Direction, codes: Tensor, *given: Any) -> Tensor:
        """Pictures of codes as far behind the boundary as they were before it. [batch, ...]"""
        found = self._named(direction) if isinstance(direction, str) else direction
        per = float((found.normal * found.step).sum())

        def moved(features: Tensor) -> Tensor:
            self._fits(found.step, features)
            back = (2 * found.scores(features) / per).view(-1, *[1] * found.step.ndim)
            return features - (back * found.step.to(features.device)).to(features.dtype)

        return self._moved(codes, given, moved)

    @torch.no_grad()
    def ask(
        self,
        person: Callable[[Tensor], Tensor | Sequence[int]],
        draw: Callable[[int], tuple[Any, ...]],
        *,
        rounds: int = 2,
        size: int = 12,
        reach: float = 2.0,
        name: str | None = None,
    ) -> Direction:
        """The direction by which a person sorts, found in rounds of `size` pictures.

        person: pictures to labels 0 and 1; draw: so many codes, and what else the generator is given, in a tuple. The
        pictures of the first round are of codes as drawn, those of later ones are moved along the direction found so
        far, evenly from -reach to reach deviations. All that was sorted counts. ValueError where it is all of one kind.
        """
        if rounds < 1 or size < 1 or not 0 <= reach <= self.limit:
            raise ValueError(
                f"Compass: one round of one picture or more, reach 0 to {self.limit}; got {rounds, size, reach}"
            )
        seen, said, found = [], [], None
        for _ in range(rounds):
            codes, *given = draw(size)
            kept: list[Tensor] = []
            move = 0.0 if found is None else found.spread * found.step
            along = torch.linspace(-reach, reach, size, dtype=torch.float64, device=codes.device)

            def moved(features: Tensor, move: Any = move, along: Tensor = along, kept: list[Tensor] = kept) -> Tensor:
                if isinstance(move, Tensor):
                    features = features + (along.view(-1, *[1] * move.ndim) * move.to(along.device)).to(features.dtype)
                kept.append(features)
                return features

            labels = torch.as_tensor(person(self._moved(codes, given, moved)))
            seen, said = [*seen, *kept], [*said, labels.to(codes.device)]
            if len(torch.cat(said).unique()) > 1 and sum(map(len, said)) >= 4:
                found = self._fitted(torch.cat(seen), torch.cat(said), name)
        return found or self._fitted(torch.cat(seen), torch.cat(said), name)

    def get_extra_state(self) -> dict[str, Any]:
        return {name: tuple(of) for name, of in self.directions.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.directions = {name: Direction(*of) for name, of in state.items()}

    def _named(self, name: str) -> Direction:
        if name not in self.directions:
            raise ValueError(f"Compass: no direction {name!r}; kept are {', '.join(self.directions) or 'none'}")
        return self.directions[name]

    @staticmethod
    def _fits(step: Tensor, features: Tensor) -> None:
        if features.shape[1:] != step.shape:
            raise ValueError(
                f"Compass: the direction is {list(step.shape)}, what it is to move {list(features.shape[1:])}"
            )

    def _fitted(self, features: Tensor, labels: Tensor, name: str | None) -> Direction:
        if labels.shape != features.shape[:1] or len(features) < 4:
            raise ValueError(
                f"Compass: four pictures or more, each with a label; got {list(labels.shape)} of {len(features)}"
            )
        if sorted(set(labels.tolist())) != [0, 1]:
            raise ValueError(f"Compass: labels are 0 and 1, some of each; got {sorted(set(labels.tolist()))}")
        x = features.detach().double().flatten(1)
        if not x.isfinite().all():
            raise ValueError("Compass: codes, and what the layer makes of them, have to be finite")
        if (x == x[0]).all():
            raise ValueError("Compass: the sorted pictures do not differ in what the compass sees, so there is no way")
        scale, middle = torch.ones_like(x[0]), torch.zeros_like(x[0])
        if self.layer is not None:
            scale, middle = x.std(0), x.mean(0)
        inverse = torch.where(scale > 1e-6 * scale.max(), 1 / scale, 0.0)
        inputs = (x - middle) * inverse
        w, offset = separate(inputs, labels.to(x.device), model=self.model, strength=self.strength)
        if float((inputs @ w).abs().max()) < 1e-9:  # as far as Newton's steps go
            raise ValueError(
                "Compass: both heaps are alike in what the compass sees, so there is no way from one to the other"
            )
        step, normal = w * scale * (inverse > 0), w * inverse
        step = step / step.norm()
        shape = features.shape[1:]
        found = Direction(
            step.view(shape), float((x @ step).std()), normal.view(shape), offset - float(middle @ normal)
        )
        if name is not None:
            self.directions[name] = found
        return found

    def _moved(self, codes: Tensor, given: Sequence[Any], change: Callable[[Tensor], Tensor]) -> Tensor:
        if self.layer is None:
            return self.generator(change(codes), *given)
        return self._run(codes, given, change)[0]

    def _run(
        self, codes: Tensor, given: Sequence[Any], change: Callable[[Tensor], Tensor] | None
    ) -> tuple[Any, Tensor]:
        """Pictures, and what the layer gave before it was changed."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or len(output) != len(codes) or seen:
                raise ValueError(
                    f"Compass: the layer {self.layer!r} has to give one tensor [{len(codes)}, ...] once; take another"
                )
            seen.append(output)
            return output if change is None else change(output)

        with ExitStack() as undo:
            attach(undo, self.generator.get_submodule(self.layer or "").register_forward_hook, hook)
            pictures = self.generator(codes, *given)
        if not seen:
            raise ValueError(f"Compass: the layer {self.layer!r} did not run; choose one that makes the picture")
        return pictures, seen[0]


def latent_compass(generator: nn.Module, layer: str | None = None, **knobs: Any) -> Compass:
    """A `Compass` of this generator with these knobs, and no direction yet.

    >>> import torch
    >>> from regard.models.latent_compass import latent_compass
    >>> latent_compass(torch.nn.Identity(), model="svm").directions
    {}
    """
    return Compass(generator, layer, **knobs)
