"""He et al. (arXiv:2503.12734): softmax heads trained on linear regression in context, beside what theory says of them.

Five covariates, 40 examples, noise of variance 0.1: the paper's. Heads have whole key-query and output-value maps, the
products of which are trained. The last column of a key-query map meets only the query's y, which is 0: it stays what
it was drawn as, and is left out. Linear attention is trained in the same way; it adds up what its scores weigh, over
the 40 of training. Errors are taken on fresh tasks. Of several heads of one sign theory determines only the weighted
mean of the maps. Heads begin near zero, but on both sides in turn, as theory lets them: drawn freely, two heads may
both come to be positive, and then stay as good as one.

Errors are held against those which theory's own predictors have on the same tasks: one head of the scale and weight
that theory finds best, and the debiased step at its best rate. Theory's formula for the error is for many examples and
small scales; at 40 and five covariates that very step has 0.246 on seed 0 where the formula says 0.221. Until the last
of four designs the formula was the bar, at 12%, most of which was its own error: two heads, with 0.252 on seed 0,
failed by it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...catalog import Finding, Premise
from ...studies.icl_regression import best_weight, gradient_step, head_patterns, icl_regression, least_error, ridge
from .._measure import failed, mean

SCALES = "small", "large"
DIM, EXAMPLES, NOISE = 5, 40, 0.1
LENGTHS = (20, 40, 80, 160)
STEPS, BATCH, TASKS = {"small": 1500, "large": 15_000}, 256, 20_000

EXPECTED = (
    "in models of two and four heads, the key-query maps of heads of one sign, averaged by their weights, are at least "
    "98% a multiple of the identity, output-value maps at least 95% on y, and weights add up to at most 10% of the sum "
    "of their sizes; with one head and with two, the error is within 5% of that of the predictor that theory says they "
    "become, on the same tasks, and that of two is lower by 30% and by two standard errors; what two heads predict is "
    "nearer to the debiased step than to the plain one, by two standard errors; with four times the examples, the "
    "error of two heads falls and comes within 10% of the debiased step's, while that of linear attention, the "
    "control, rises"
)


class Tasks(NamedTuple):
    x: Tensor  # [batch, example, dim]
    y: Tensor  # [batch, example]
    query: Tensor  # [batch, dim]
    target: Tensor  # [batch]


class Heads(NamedTuple):
    key_query: Tensor  # [head, dim + 1, dim + 1]
    output_value: Tensor  # [head, dim + 1]
    softmax: bool
    examples: int = EXAMPLES  # by which linear attention divides

    def __call__(self, tasks: Tasks) -> Tensor:
        tokens = torch.cat([tasks.x, tasks.y[..., None]], dim=-1)
        scores = torch.einsum("bei,hij,bj->bhe", tokens, self.key_query[..., :-1], tasks.query)
        look = scores.softmax(-1) if self.softmax else scores / self.examples
        return torch.einsum("bhe,bei,hi->b", look, tokens, self.output_value)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Trained heads have the patterns and errors of theory; two beat one; longer contexts serve them."""
    torch.manual_seed(seed)
    models = {heads: _trained(heads, STEPS[scale]) for heads in (1, 2, 4)}
    linear = _trained(1, STEPS[scale], softmax=False)
    tests = {length: _tasks(TASKS, length) for length in LENGTHS}
    curves = {f"{heads} head{'s' * (heads > 1)}": _errors(model, tests) for heads, model in models.items()}
    curves["linear attention"] = _errors(linear, tests)
    curves["ridge (best)"] = [_error(ridge(t.x, t.y, t.query, noise=NOISE), t) for t in tests.values()]
    shapes = {heads: _patterns(model) for heads, model in models.items()}
    signs = {heads: _patterns(_by_sign(models[heads])) for heads in (2, 4)}
    formula = {heads: least_error(heads, dim=DIM, examples=EXAMPLES, noise=NOISE) for heads in (1, 2)}
    best_scale = torch.tensor([DIM**-0.5])
    weight = best_weight(best_scale, dim=DIM, examples=EXAMPLES, noise=NOISE).float()
    step = partial(gradient_step, rate=1 / (1 + (1 + NOISE) * DIM / EXAMPLES))
    at, far = LENGTHS.index(EXAMPLES), LENGTHS.index(4 * EXAMPLES)
    here = tests[EXAMPLES]
    theory = {1: _error(icl_regression(*here[:3], scale=best_scale, weight=weight), here)}
    steps = [_error(step(*t[:3]), t) for t in tests.values()]
    theory[2] = steps[at]
    one, two, straight = (curves[name] for name in ("1 head", "2 heads", "linear attention"))
    diagonal = {heads: float(signs[heads]["diagonal"].min()) for heads in (2, 4)}
    last = min(float(shapes[heads]["last_entry"].min()) for heads in (2, 4))
    left = max(float(shapes[h]["weight"].sum().abs() / shapes[h]["weight"].abs().sum()) for h in (2, 4))
    with torch.no_grad():
        losses = [_losses(models[heads], here) for heads in (1, 2)]
        nothing = mean(here.target.square())
        said = models[2](here)
        plain, debiased = ((said - step(*here[:3], debiased=way)).square() for way in (False, True))
    gain, nearer = mean(losses[0] - losses[1]), mean(plain - debiased)
    asked = {
        "maps do not have theory's shape": min(diagonal.values()) >= 0.98 and last >= 0.95 and left <= 0.1,
        "two heads do not beat one by enough": gain.above() and two[at] <= 0.7 * one[at],
        "an error is not that of theory's predictor": all(
            abs(e[at] / theory[h] - 1) <= 0.05 for h, e in ((1, one), (2, two))
        ),
        "two heads are no nearer to the debiased step than to the plain one": nearer.above(),
        "two heads do not serve longer contexts": two[far] < two[at] and abs(two[far] / steps[far] - 1) <= 0.1,
        "linear attention serves longer contexts too": straight[far] > straight[at],
    }
    learned = Premise(
        "heads learned something",
        "an error of one head at most half of that of giving nothing",
        f"{one[at]:.3f} against {nothing:.3f}",
        one[at] <= nothing.value / 2,
    )
    with torch.no_grad():
        divided = _error(linear._replace(examples=4 * EXAMPLES)(tests[4 * EXAMPLES]), tests[4 * EXAMPLES])
    four, best = (curves[name][at] for name in ("4 heads", "ridge (best)"))
    measured = (
        f"key-query maps by sign are at least {diagonal[2]:.1%} diagonal with two heads, {diagonal[4]:.1%} with "
        f"four, output-value maps {last:.1%} on y, weights cancel to {left:.1%}; errors {one[at]:.3f} with one head "
        f"(theory's predictor {theory[1]:.3f}, formula {formula[1]:.3f}), {two[at]:.3f} with two (debiased step "
        f"{theory[2]:.3f}, formula {formula[2]:.3f}), lower by {gain:.3f}; {four:.3f} with four, best possible "
        f"{best:.3f}; two heads are {float(debiased.mean()):.4f} from the debiased step, {float(plain.mean()):.4f} "
        f"from the plain one (more by {nearer:.4f}); with {4 * EXAMPLES} examples two heads {two[far]:.3f} "
        f"(debiased step {steps[far]:.3f}), linear attention {straight[far]:.3f} after {straight[at]:.3f} "
        f"({divided:.3f} where it divides by their number)"
        f"{failed(asked)}"
    )

    def draw(figure: Any) -> None:
        maps, errors = figure.subfigures(1, 2)
        key_query, output_value = (m.detach() for m in models[2][:2])
        largest = float(key_query[..., :-1].abs().max())
        for row, head in zip(maps.subplots(2, 2, width_ratios=(3, 1)), range(2)):
            row[0].imshow(key_query[head, :, :-1], vmin=-largest, vmax=largest, cmap="RdBu_r")
            row[0].set(xticks=[], yticks=[], title=f"head {head}: key-query")
            most = float(output_value.abs().max())
            row[1].imshow(output_value[head, :, None], vmin=-most, vmax=most, cmap="RdBu_r")
            row[1].set(xticks=[], yticks=[], title="output-value")
        axes = errors.subplots()
        for name, values in curves.items():
            axes.plot(LENGTHS, values, "o-", label=name)
        axes.plot(LENGTHS, steps, "k:", label="debiased step")
        axes.set(xlabel="examples in context (trained with 40)", title="Error", ylim=(0, 1.2))
        errors.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return Finding(all(asked.values()), measured, EXPECTED, seed, premises=[learned], draw=draw)


def _tasks(count: int, examples: int) -> Tasks:
    x, coefficients = torch.randn(count, examples + 1, DIM), torch.randn(count, DIM, 1) / DIM**0.5
    y = (x @ coefficients)[..., 0] + NOISE**0.5 * torch.randn(count, examples + 1)
    return Tasks(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


def _losses(model: Heads, tasks: Tasks) -> Tensor:
    return (model(tasks) - tasks.target).square()


def _by_sign(model: Heads) -> Heads:
    """The mean map of the heads whose weight is positive, and of those whose weight is negative, by their weights."""
    with torch.no_grad():
        weight = model.output_value[:, -1]
        maps, values = [], []
        for side in (weight > 0, weight < 0):
            if side.any():
                share = weight[side] / weight[side].sum()
                maps.append(torch.einsum("h,hij->ij", share, model.key_query[side]))
                values.append(model.output_value[side].sum(0))
        return model._replace(key_query=torch.stack(maps), output_value=torch.stack(values))


def _error(given: Tensor, tasks: Tasks) -> float:
    return float((given - tasks.target).square().mean())


def _errors(model: Heads, tests: dict[int, Tasks]) -> list[float]:
    with torch.no_grad():
        return [_error(model(tasks), tasks) for tasks in tests.values()]


def _patterns(model: Heads) -> dict[str, Tensor]:
    key_query = model.key_query.detach().clone()
    key_query[..., -1] = 0
    return head_patterns(key_query, model.output_value.detach())


def _trained(heads: int, steps: int, *, softmax: bool = True) -> Heads:
    sides = 0.03 - 0.06 * (torch.arange(heads) % 2)  # with all on one side, two heads stay as good as one
    key_query, output_value = (0.005 * torch.randn(heads, *shape) for shape in ((DIM + 1, DIM + 1), (DIM + 1,)))
    key_query += sides[:, None, None] * torch.eye(DIM + 1)
    output_value[:, -1] += sides
    key_query.requires_grad_()
    output_value.requires_grad_()
    model = Heads(key_query, output_value, softmax)
    optimizer = torch.optim.Adam([key_query, output_value], 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        tasks = _tasks(BATCH, EXAMPLES)
        (model(tasks) - tasks.target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model
