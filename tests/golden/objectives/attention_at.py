"""One attention with tanh scores: the worst change of its scores, and the loss with it."""

import torch
from torch import nn

from regard.objectives.attention_at import attention_at, perturbation

from .. import Case, Source

SOURCE = Source("authors", "shunk031/attention-meets-perturbation, TanhBCAttentionAT")


class TanhAttention(nn.Module):
    """Weights over the words of a text, and the mean of their states by these."""

    def __init__(self, scores: nn.Module) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.scores(hidden)[..., 0].masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return scores.softmax(-1)[:, None] @ hidden  # [batch, 1, dim]


class Classifier(nn.Module):
    def __init__(self, attention: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.attention, self.output = attention, output

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.output(self.attention(hidden, mask)[:, 0])


def compare(case: Case):
    settings, weights, hidden = case.settings, case.weights, case["hidden"]
    first, last, out = (weights[name] for name in ("attn.0.weight", "attn.2.weight", "output"))
    scores = nn.Sequential(nn.Linear(*first.shape[::-1]), nn.Tanh(), nn.Linear(*last.shape[::-1], bias=False))
    scores.load_state_dict({name.removeprefix("attn."): w for name, w in weights.items() if name.startswith("attn.")})
    output = nn.Linear(*out.shape[::-1])
    output.load_state_dict({"weight": out, "bias": case["bias.output"]})
    model = Classifier(TanhAttention(scores), output)

    def loss():
        return nn.functional.cross_entropy(model(hidden, case["mask"]), case["label"])

    worst = perturbation(model, loss, epsilon=settings["epsilon"])
    (moved,) = worst.scores.values()
    found = attention_at(model, loss, epsilon=settings["epsilon"], strength=settings["strength"])
    (slope,) = torch.autograd.grad(found, [scores[0].weight])
    shifted = scores(hidden)[..., 0].detach() + moved[:, 0, 0]
    return {
        "perturbation": moved[:, 0, 0],
        "attention": shifted.masked_fill(~case["mask"], -torch.inf).softmax(-1),
        "output": found,
        "gradient.score0": slope,
    }
