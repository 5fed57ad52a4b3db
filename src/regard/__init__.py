"""Regard: see where a transformer looks, test whether to believe it, change it."""

from importlib import import_module as _import
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from wrapt import when_imported as _when_imported

if _TYPE_CHECKING:
    from . import adapters as adapters
    from . import mechanisms as mechanisms
    from .attribution import attribute as attribute
    from .call import Call as Call
    from .call import Site as Site
    from .call import UnreachableAttention as UnreachableAttention
    from .loading import UnknownModel as UnknownModel
    from .loading import load as load
    from .recording import Recording as Recording
    from .recording import open as open
    from .recording import statistic as statistic
    from .seam import intervene as intervene
    from .seam import record as record
    from .tokens import Tokens as Tokens
    from .tokens import chat_roles as chat_roles
    from .weights import Weights as Weights

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

__all__ = sorted([*_HOMES, "adapters", "mechanisms"])  # pyright: ignore[reportUnsupportedDunderAll]


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
