"""Small models for objectives in double precision, and gradients that are to be equal."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification


def bert(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=99, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification._from_config(config, **options).double()


IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-11, msg=name)


class Sentence(nn.Module):
    """One attention over words, as in the paper: linear scores, softmax, a sum of values, a linear layer."""

    class OneAttention(nn.Module):
        def forward(self, query, key, value):
            return (query @ key.mT).softmax(-1) @ value

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Parameter(torch.randn(1, 1, 3)), nn.Linear(4, 3)
        self.attention, self.output = self.OneAttention(), nn.Linear(4, 2)

    def forward(self, x):
        return self.output(self.attention(self.query.expand(len(x), -1, -1), self.key(x), x))[:, 0]

    def scores(self, x):
        return self.query @ self.key(x).mT

    def from_scores(self, scores, x):
        return self.output(scores.softmax(-1) @ x)[:, 0]
