"""Regard: see where a transformer looks, test whether to believe it, change it."""

from importlib import import_module as _import
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from wrapt import when_imported as _when_imported

if _TYPE_CHECKING:
    from . import adapters, mechanisms
    from .attribution import attribute
    from .call import Call, Site, UnreachableAttention
    from .loading import UnknownModel, load
    from .recording import Recording, open, statistic
    from .seam import intervene, record
    from .tokens import Tokens, chat_roles
    from .weights import Weights

# What is asked for is imported then: a command that needs no model does not wait for torch.
_HOMES = {
    "Call": "call",
    "Recording": "recording",
    "Site": "call",
    "Tokens": "tokens",
    "UnknownModel": "loading",
    "UnreachableAttention": "call",
    "Weights": "weights",
    "attribute": "attribution",
    "chat_roles": "tokens",
    "intervene": "seam",
    "load": "loading",
    "open": "recording",
    "record": "seam",
    "statistic": "recording",
}

__all__ = [
    "Call",
    "Recording",
    "Site",
    "Tokens",
    "UnknownModel",
    "UnreachableAttention",
    "Weights",
    "adapters",
    "attribute",
    "chat_roles",
    "intervene",
    "load",
    "mechanisms",
    "open",
    "record",
    "statistic",
]


def __getattr__(name: str) -> _Any:
    if name in _HOMES:
        found = getattr(_import(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("_"):
        try:
            return _import(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@_when_imported("transformers.modeling_utils")
def _register(_module: _Any) -> None:
    """Mechanisms become attention implementations as soon as there is something that they can be chosen for."""
    from . import mechanisms
    from .adapters.mechanisms import register, understood

    understood()
    for operator in mechanisms.operators().values():
        register(operator)
