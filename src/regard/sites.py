"""Which modules of a model attend, and which stack and layer each belongs to."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import takewhile

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import adapters
from .call import Site, UnreachableAttention

# Containers that say nothing about which part of a model this is.
_GENERIC = {"model", "transformer", "layers", "layer", "h", "block", "blocks", "module", "base_model", "_orig_mod"}
_NOT_SOFTMAX = re.compile(  # by the names of classes: state-space layers, linear attention, sampled points
    r"^(?!.*(norm|embed|feedforward|mlp))\w*"
    r"(mamba|delta|linear\w*attention|lightning|rwkv|recurrent|xlstm|mlstm|shortconv|ssm|deformable\w*attention)",
    re.IGNORECASE,
)
_NOT_MIXING = re.compile(r"output|bias|norm", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec", re.IGNORECASE)


def find(model: nn.Module) -> dict[nn.Module, Site]:
    """The attention modules that go through transformers' AttentionInterface or have an adapter, in module order."""
    named = [(n.removeprefix("_orig_mod."), m) for n, m in model.named_modules()]
    modules = [(n, m) for n, m in named if calls_interface(m) or adapters.attends(m)]
    around = {n for n, _ in modules if any(inner.startswith(f"{n}.") for inner, _ in modules)}
    modules = [(n, m) for n, m in modules if calls_interface(m) or n not in around]  # the innermost attends
    prefix = getattr(getattr(model, "_orig_mod", model), "base_model_prefix", "")
    templates: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in modules:
        templates[_template(name)].append((name, module))
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in _all_names(getattr(model, "_orig_mod", model)):
        names[module].append(name)

    found: dict[nn.Module, Site] = {}
    taken: dict[str, set[int]] = defaultdict(set)
    for template, members in templates.items():
        tail = template.rpartition("*")[2].strip(".")
        cross = all(_CROSS.search(tail) or getattr(m, "is_cross_attention", False) for _, m in members)
        says = [m.is_causal for _, m in members if hasattr(m, "is_causal")]
        causal = any(says) if says else _decodes(model)
        layers, others = _layers([name for name, _ in members]), _shared_layers(members, names)
        stack = _stack(template, prefix, causal) + ("_cross" if cross else "")
        if taken[stack] & set(layers):
            stack = f"{stack}.{tail.removeprefix(f'{stack}.')}"
        if taken[stack] & set(layers):
            stack = template.replace(".*", "").strip(".")
        taken[stack] |= set(layers)
        for (name, module), layer, also in zip(members, layers, others):
            found[module] = Site(name, stack, layer, cross, also=also)
    order = {module: i for i, (_, module) in enumerate(modules)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def unreached(model: nn.Module, sites: dict[nn.Module, Site]) -> tuple[list[str], list[str]]:
    """Names of modules with parameters that mix tokens and are not, and do not hold, a site.

    First those called attention, whose weights are missed; then those known to have no softmax over keys:
    state-space layers, linear attention, attention to sampled points.
    """
    names = [site.name for site in sites.values()]
    missed: list[str] = []
    other: list[str] = []

    def related(name: str, to: list[str]) -> bool:
        return any(s == name or s.startswith(f"{name}.") or name.startswith(f"{s}.") for s in to)

    for name, module in model.named_modules():
        kind = type(module).__name__
        if next(module.parameters(), None) is None or related(name, names):
            continue
        if _NOT_SOFTMAX.match(kind) and not isinstance(module, PreTrainedModel):
            other.append(name)
        elif "Attention" in kind and not _NOT_MIXING.search(kind):
            missed.append(name)
    other = [name for name in other if not any(o.startswith(f"{name}.") for o in other)]  # the innermost
    return [name for name in missed if not related(name, other)], other


def refuse_unreached(model: nn.Module, missed: list[str], other: list[str]) -> None:
    """Say what is missing where no attention of a model can be seen."""
    name = type(model).__name__
    if missed:
        kinds = sorted({type(model.get_submodule(n)).__name__ for n in missed})
        raise UnreachableAttention(
            f"{name}: {', '.join(kinds)} does not call transformers' AttentionInterface, nor torch's softmax or "
            f"scaled_dot_product_attention; if it has weights, say how to read them: see regard.adapters.register"
        )
    kinds = sorted({type(model.get_submodule(n)).__name__ for n in other})
    why = f": {', '.join(kinds)} has no weights over keys" if kinds else " that Regard knows"
    raise UnreachableAttention(f"{name} holds no attention module{why}")


def blocks(model: nn.Module, sites: Mapping[nn.Module, Site]) -> dict[nn.Module, nn.Module]:
    """The layer around each site (the module at the first number of its path), and its first site."""
    found: dict[nn.Module, nn.Module] = {}
    root = getattr(model, "_orig_mod", model)
    for module, site in sites.items():
        path = re.match(r"(.*?\.)?\d+(?=\.)", site.name)
        if path is not None:  # a head that pools what the layers give is none of them
            found.setdefault(root.get_submodule(path[0]), module)
    if not found:
        names = ", ".join(site.name for site in sites.values())
        raise UnreachableAttention(f"{names} lies in no numbered layer, so its hidden states cannot be changed")
    return found


def feed_forwards(model: nn.Module, sites: Mapping[nn.Module, Site]) -> dict[nn.Module, nn.Module]:
    """The feed-forward module of each layer, its one child of several matrices beside attention, and its first site."""
    found: dict[nn.Module, nn.Module] = {}
    for block, module in blocks(model, sites).items():
        beside = [c for c in block.children() if not any(m in sites for m in c.modules())]
        several = [c for c in beside if sum(p.ndim > 1 for p in c.parameters()) > 1]
        if len(several) != 1:
            raise UnreachableAttention(
                f"the layer around {sites[module].name} has {len(several)} modules that could be its "
                f"feed-forward network, so `mlp` cannot see it; change what the layer gives with `hidden` instead"
            )
        found[several[0]] = module
    return found


def downs(model: nn.Module, sites: Mapping[nn.Module, Site]) -> dict[nn.Module, nn.Module]:
    """The linear map that each layer's feed-forward network ends with, and the layer's first site."""
    found: dict[nn.Module, nn.Module] = {}
    for block, module in blocks(model, sites).items():
        if getattr(block, "chunk_size_feed_forward", 0):
            raise UnreachableAttention(
                f"the feed-forward network beside {sites[module].name} runs on chunks of a sequence, so its neurons "
                f"cannot be told by position; set chunk_size_feed_forward=0 in the configuration"
            )
        beside = [c for c in block.children() if not any(m in sites for m in c.modules())]
        several = [maps for c in beside if len(maps := list(_maps(c))) > 1]
        maps = several[0] if len(several) == 1 else [m for c in beside for m in _maps(c)]  # BERT: one map a module
        *ups, (down, neurons, width) = maps or [(block, 0, 0)]
        if not ups or any((i, o) not in ((width, neurons), (width, 2 * neurons)) for _, i, o in ups):
            raise UnreachableAttention(
                f"the layer around {sites[module].name} has no feed-forward network of linear maps to its "
                f"neurons and one back, so `neurons` cannot see them; change what it gives with `mlp` instead"
            )
        found[down] = module
    return found


def _maps(module: nn.Module) -> Iterator[tuple[nn.Module, int, int]]:
    """Its linear maps, also of other libraries, in order, each with how many numbers it takes and gives."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # of transformers' Conv1D
        taken, given = (getattr(module, name, None) for name in names)
        if isinstance(taken, int) and isinstance(given, int):
            yield module, taken, given
            return
    for child in module.children():
        yield from _maps(child)


def calls_interface(module: nn.Module) -> bool:
    """Whether it looks its attention function up the way transformers' modules do."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)


def _decodes(model: nn.Module) -> bool:
    """Whether this is a language model that reads from left to right, by its configuration."""
    config = getattr(getattr(model, "_orig_mod", model), "config", None)
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_decoder", True):
        return False
    return getattr(config, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _stack(template: str, prefix: str, causal: bool) -> str:
    parts = [p for p in template.partition("*")[0].split(".") if p]
    if parts and parts[0] == prefix:
        parts = parts[1:]
    parts = [p for p in parts if p not in _GENERIC]
    return parts[0] if parts else ("language_model" if causal else "encoder")


def links(model: nn.Module, name: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """The way to a module: what holds what, by which name, from the outermost on."""
    found, holder = [], getattr(model, "_orig_mod", model)
    for part in name.split(".") if name else ():
        inner = holder.get_submodule(part)
        found.append((holder, part, inner))
        holder = inner
    return found


def plain_stacks(model: nn.Module, found: dict[nn.Module, Site]) -> dict[str, nn.Module]:
    """The modules inside a model, by name, that run the layers of a stack and are no model of transformers."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for site in found.values():
        stacks[site.stack].append(site.name)
    plain, root = {}, getattr(model, "_orig_mod", model)
    for names in stacks.values():
        # Up to where their paths part, or, of one layer, to its number:
        levels = zip(*(name.split(".") for name in names))
        parts = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
        if len(names) == 1:
            parts = parts[: next((i for i, part in enumerate(parts) if part.isdecimal()), 0)]
        while parts and type(root.get_submodule(".".join(parts))).forward is nn.Module.forward:  # a list
            parts.pop()
        if parts and not isinstance(module := root.get_submodule(".".join(parts)), PreTrainedModel):
            plain[".".join(parts)] = module
    return {name: module for name, module in plain.items() if module not in found and module is not root}


def _shared_layers(members: list[tuple[str, nn.Module]], names: dict[nn.Module, list[str]]) -> list[tuple[int, ...]]:
    """The layers that each module is by its other names too, as where a list holds one layer several times."""
    alike = [[n for n in names[module] if n != name and _template(n) == _template(name)] for name, module in members]
    first, others = [name for name, _ in members], [n for known in alike for n in known]
    numbers = dict(zip([*first, *others], _layers([*first, *others])))
    if [numbers[name] for name in first] != _layers(first):  # these names do not tell
        return [()] * len(members)
    return [tuple(sorted(numbers[n] for n in known)) for known in alike]


def _all_names(
    module: nn.Module, name: str = "", within: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """All modules, each by all of its names."""
    yield name, module
    for part, inner in module._modules.items():
        if inner is not None and inner is not module and not any(inner is m for m in within):
            yield from _all_names(inner, f"{name}.{part}" if name else part, (*within, module))


def _template(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _layers(names: list[str]) -> list[int]:
    """The first number in each name where that tells them apart (layer 3 stays 3), otherwise their order."""
    first = [re.search(r"(?:^|\.)(\d+)(?=\.|$)", name) for name in names]
    numbers = [int(m[1]) for m in first if m]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))
