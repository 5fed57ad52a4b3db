"""Prompts whose answer and whose telling words are known: clean and corrupted pairs for finding circuits.

Each task is a generator, `task(n, *, seed, ...) -> list[Prompt]`; prompt i of a seed is the same for every n. A
`Prompt` names its telling words. `encode` finds their tokens with a real tokenizer, and `ask` makes tensors of many;
`batch` gives each word one id, for small models. In-context regression has no words: `regression` gives tensors.
"""

from .arguments import docstring
from .asked import Asked, ask, stacked
from .copying import induction, passkey
from .names import ioi
from .objects import coloured_objects
from .prompt import Batch, Encoded, Prompt, batch, encode, pieces, single, vocabulary
from .regression import Regression, regression
from .years import greater_than

__all__ = [
    "Asked",
    "Batch",
    "Encoded",
    "Prompt",
    "Regression",
    "ask",
    "batch",
    "coloured_objects",
    "docstring",
    "encode",
    "greater_than",
    "induction",
    "ioi",
    "passkey",
    "pieces",
    "regression",
    "single",
    "stacked",
    "vocabulary",
]
