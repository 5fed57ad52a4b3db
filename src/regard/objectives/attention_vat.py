"""Training against the change of attention that changes a prediction most, which needs no labels.

Kitada and Iyatomi, Making Attention Mechanisms More Robust and Interpretable with Virtual Adversarial Training
(arXiv:2104.08763), after Miyato et al., Virtual Adversarial Training (arXiv:1704.03976). Where `attention_at` moves
scores (before softmax) to raise a loss, here they are moved to change the model's own prediction: by the divergence
KL(p || p moved) of its classes, averaged over examples, in the direction that one step of power iteration finds from a
random one. So text without labels counts too. The paper adds it to the loss of what has labels, times 1.

Deviations. No code of this paper was at hand; what Attention iVAT is was not checked with the paper. As in
`attention_at`, a perturbation runs over all attention of an example together, and differences between scores are
normalised over their row as a whole. All runs draw the same dropout, in training mode too, so that nothing but the
change of scores tells them apart. epsilon has no default: it is tuned for each data set. At xi = 1 the first step is
long enough for float32; the theory's is as short as can be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import Site
from ..seam import intervene
from ._perturb import Key, Moved, Probe, apart_of, norm, stepped

NAME = "attention_vat"


def attention_vat(
    model: nn.Module,
    logits: Callable[[], Tensor],
    *,
    epsilon: float,
    xi: float = 1.0,
    iterations: int = 1,
    interpretable: bool = False,
    where: Callable[[Site], bool] = lambda site: True,
    queries: slice = slice(None),
    generator: torch.Generator | None = None,
) -> Tensor:
    """How much the worst change of attention changes predictions, in nats, 0 or more. A scalar, with gradient.

    logits: runs the model on texts, labelled or not, and gives logits [batch, class], or of one class against none
    [batch] or [batch, 1]; it is called `iterations` + 2 times. epsilon: how far the scores of one example are moved, by
    the 2-norm. xi: the same of the steps that look for the direction. interpretable: Attention iVAT in place of VAT.
    where: which sites are changed; queries: which rows of them, such as `slice(0, 1)` for `[CLS]`. Rows keep what was
    masked masked. generator: of the first directions. The prediction without a change is a constant: gradients come
    through the other. It holds the maps of what it changes.

    ValueError for a negative epsilon, an xi that is not above 0, no iteration, logits of another shape, where nothing
    is changed, or where `logits` runs a layer more than once.

        loss = model(**labelled).loss + attention_vat(model, lambda: model(**texts).logits, epsilon=1.0)
    """
    found, plain, again = _found(model, logits, epsilon, xi, iterations, interpretable, where, queries, generator)
    with intervene(model, found):
        return divergence(plain, again()).mean()


def perturbation(
    model: nn.Module,
    logits: Callable[[], Tensor],
    *,
    epsilon: float,
    xi: float = 1.0,
    iterations: int = 1,
    interpretable: bool = False,
    where: Callable[[Site], bool] = lambda site: True,
    queries: slice = slice(None),
    generator: torch.Generator | None = None,
) -> Moved:
    """The change of attention scores, `epsilon` long for each example, that changes predictions most; an intervention.

    Arguments as in `attention_vat`.
    """
    return _found(model, logits, epsilon, xi, iterations, interpretable, where, queries, generator)[0]


def divergence(plain: Tensor, moved: Tensor) -> Tensor:
    """KL(plain || moved) of the classes of logits [batch, class], or of one against none [batch, 1]; nats. [batch]

    >>> import torch
    >>> a, b = (torch.tensor([p]).log() for p in ([0.7, 0.2, 0.1], [0.6, 0.3, 0.1]))
    >>> f"{divergence(a, b).item():.5f}"
    '0.02681'
    """
    if plain.shape[1:] in ((), (1,)):
        plain, moved = (torch.stack([some.flatten(), torch.zeros_like(some.flatten())], -1) for some in (plain, moved))
    if plain.ndim != 2:
        raise ValueError(f"{NAME}: logits are [batch, class], one prediction of an example, not {list(plain.shape)}")
    return F.kl_div(moved.log_softmax(-1), plain.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _found(
    model: nn.Module,
    logits: Callable[[], Tensor],
    epsilon: float,
    xi: float,
    iterations: int,
    interpretable: bool,
    where: Callable[[Site], bool],
    queries: slice,
    generator: torch.Generator | None,
) -> tuple[Moved, Tensor, Callable[[], Tensor]]:
    """The change, predictions without it, and how to run the model with the same dropout again."""
    if epsilon < 0 or xi <= 0 or iterations < 1:
        raise ValueError(
            f"{NAME}: epsilon and xi are lengths, 0 or more and above 0, and there is one iteration or more; got "
            f"epsilon={epsilon}, xi={xi}, iterations={iterations}"
        )
    seed = int(torch.randint(2**31, ()))

    def again() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return logits()

    probe = Probe(NAME, where, queries, keep=True)
    with torch.no_grad(), intervene(model, probe):
        plain = again()
    keys = probe.chosen("logits")
    logs = probe.logs if interpretable else None
    steps = _drawn(probe.logs, xi, interpretable, generator)
    for i in range(iterations):
        leaves = {key: step.requires_grad_() for key, step in steps.items()}
        with torch.enable_grad(), intervene(model, Moved(leaves, queries)):
            apart = divergence(plain, again()).sum()
        found = dict(zip(keys, torch.autograd.grad(apart, [leaves[key] for key in keys])))
        steps = stepped(found, epsilon if i == iterations - 1 else xi, logs)
    return Moved(steps, queries), plain, again


def _drawn(
    logs: dict[Key, Tensor], length: float, interpretable: bool, generator: torch.Generator | None
) -> dict[Key, Tensor]:
    """Random directions, so long for each example, that leave what is masked where it is."""
    drawn = {}
    for key, rows in logs.items():
        device = rows.device if generator is None else generator.device
        some = torch.randn(rows.shape, generator=generator, dtype=rows.dtype, device=device).to(rows.device)
        some = torch.where(rows.isfinite(), some, 0.0)
        drawn[key] = some * apart_of(rows).sqrt() if interpretable else some
    long = norm(drawn)
    return {key: length * some / long.view(-1, 1, 1, 1) for key, some in drawn.items()}
