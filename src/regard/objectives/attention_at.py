"""Training against the worst small change of attention.

Kitada and Iyatomi, Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training
(arXiv:2009.12064), section 3: the loss, plus `strength` times the loss with scores (before softmax) moved by epsilon
along their gradient, as Goodfellow et al. do with inputs. Attention iAT moves them along differences between the
scores of a row. epsilon has no default: the paper tunes it for each data set.

Deviations. The paper's models attend once, from one query; here a perturbation runs over all attention of an example
together: every site, head and row, unless `where` and `queries` choose. For iAT, with differences d[t, k] = score k -
score t and a weight a[t, k] for each, the perturbation of key t is the sum over k of a[t, k] d[t, k], and a is epsilon
long along its gradient. Normalising d for each t by itself gives the perturbation of AT to the letter, since the
gradient of a[t, k] is g[t] d[t, k]; here d is normalised over its row as a whole, so that keys whose scores stand out
are moved more. Negative epsilons, which would lower the loss, are refused.

The authors' code for iAT does something else, which is not offered: its differences are between the sentences of a
batch, at the same place, and as it starts from weights of 0, they do not reach the gradient. What is left is the step
of AT with the other sign, towards a smaller loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..call import Site
from ..seam import intervene
from ._perturb import Key, Moved, Probe, stepped


def attention_at(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    epsilon: float,
    strength: float = 1.0,
    interpretable: bool = False,
    where: Callable[[Site], bool] = lambda site: True,
    queries: slice = slice(None),
) -> Tensor:
    """The loss, plus `strength` times the loss under the worst change of attention scores. A scalar, with gradient.

    loss: runs the model and gives its loss, the mean or the sum over examples; it is called twice. epsilon: how far the
    scores of one example are moved, by the 2-norm. interpretable: Attention iAT instead of Attention AT. where: which
    sites are changed; queries: which rows of them, such as `slice(0, 1)` for `[CLS]`. Rows keep what was masked masked.
    It costs two runs of the model and a backward pass more than the loss alone, and holds the maps of what it changes;
    dropout differs between the two runs. Raises ValueError for a negative epsilon, where nothing is changed, or where
    `loss` runs a layer more than once.

        attention_at(model, lambda: model(**batch).loss, epsilon=5.0).backward()
    """
    worst = perturbation(model, loss, epsilon=epsilon, interpretable=interpretable, where=where, queries=queries)
    with intervene(model, worst):
        adversarial = loss()
    return worst.loss + strength * adversarial


class Perturbation(Moved):
    """An intervention: attention scores plus `scores`, one tensor [batch, head, query, key] for each stack and layer.

    loss: that of the run in which the perturbation was found, before any change, with gradient.
    """

    def __init__(self, loss: Tensor, scores: dict[Key, Tensor], queries: slice) -> None:
        super().__init__(scores, queries)
        self.loss = loss


def perturbation(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    epsilon: float,
    interpretable: bool = False,
    where: Callable[[Site], bool] = lambda site: True,
    queries: slice = slice(None),
) -> Perturbation:
    """The change of attention scores, `epsilon` long for each example, that raises the loss most to first order.

    Arguments as in `attention_at`. To measure how much a model stands: `with intervene(model, perturbation(...))`.
    """
    if epsilon < 0:
        raise ValueError(f"attention_at: epsilon is a length, 0 or more, got {epsilon}: below 0 the loss would fall")
    probe = Probe("attention_at", where, queries, keep=interpretable)
    with torch.enable_grad(), intervene(model, probe):
        before = loss()
    keys = probe.chosen("loss")
    found = torch.autograd.grad(before, [probe.zeros[k] for k in keys], retain_graph=True)
    steps = stepped(dict(zip(keys, found)), epsilon, probe.logs if interpretable else None)
    return Perturbation(before, steps, queries)
