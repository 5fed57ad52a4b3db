"""The operators of the room of mechanisms, of settings with which short inputs hold several blocks, and inputs."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from regard import mechanisms

OPERATORS = mechanisms.operators()
CASES = [(name, pattern) for name, operator in OPERATORS.items() for pattern in operator.spec.patterns]
# Small blocks, so that the sizes below hold several, and a part of one.
SMALL = {
    "attendre": {"chunk": 4, "memory": 12, "wait": 8, "policy": "lfa"},
    "agent_attention": {"agents": 5},
    "fast": {"block": 8},
    "combiner": {"segment": 4},
    "dynamic_mask": {"window": 6},
    "hierarchical": {"tree": (3, 2)},
    "hyperattention": {"block": 4, "sample": 5, "least": 8},
    "landmark": {"block": 3},
    "lightning_2": {"block": 8},
    "memory_efficient": {"query_chunk": 5, "key_chunk": 7},
    "moba": {"block": 4, "top": 2},
    "neighborhood": {"window": 5, "dilation": 2},
    "gna": {"window": 5, "dilation": 2},
    "freeswim": {"train_shape": (2, 5)},
    "halonet": {"block": 4, "halo": 1},
    "biformer": {"size": 4, "top": 2},
    "part_attention": {},
    "regional_attention": {"window": 3},
    "power": {"block": 4, "window": 2},
    "routing": {
        "means": F.normalize(torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(7)), dim=-1),
        "window": 6,
    },
    "twins": {"window": 5},
}


def small(name):
    return partial(OPERATORS[name], **SMALL.get(name, {}))


def inputs(pattern, n=23, n_key=None, *, batch=2, heads=4, kv_heads=2, dim=8, value_dim=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    n_key = n_key or (n if pattern != "cross" else n + 6)
    shapes = (batch, heads, n, dim), (batch, kv_heads, n_key, dim), (batch, kv_heads, n_key, value_dim or dim)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
