"""Any configuration of transformers, made small: same kinds of layers, same ratios, a thousandth of the weights.

Widths are divided by one number throughout, so that what must be a multiple of, or equal to, something else still is;
numbers of heads and of key heads stay. Of the layers, the first of each kind stay.
"""

from __future__ import annotations

import re
from functools import reduce
from typing import Any

from .recipes import OVERRIDES

VOCAB = 320
FIRST_ID = 200  # special tokens beyond the small vocabulary are numbered from here
KEEP = 2  # layers, at least

_LAYERS = re.compile(
    r"^(?!num_feat_extract)(?!num_stages)(?!num_negatives)(num_(hidden_)?layers|n_layers?|depth|num_blocks|num_encoder_blocks|(\w+_)?num_(\w+_)?layers|(en|de)coder_layers"
    r"|\w+_depth|num_(\w+_)?blocks|layers|resampler_depth|encoder_num_layers|qformer_layers)$"
)
_VOCAB = re.compile(r"^(\w+_)?vocab_size(_\w+)?$|^n_(vocab|token)s?$|^(image|audio|text)_vocab_size$")
_WIDTH = re.compile(
    r"^(d_\w+|n_embd|n_inner|dim|dim_head|\w*hidden_(size|dim|channels)s?|\w*hidden_sizes|\w*(embed|embedding|emb)_(dim|size|dims)"
    r"|(\w+_)?ffn_dim\w*|\w*intermediate_(size|dim)|\w*projection_(dim|size)|(\w+_)?head_dim|\w*d_head|(\w+_)?channels"
    r"|inner_dim|mlp_dim|mlp_hidden_size|\w*lora_rank|\w*_output_channels|out_hidden_size|\w*output_(dim|size)"
    r"|\w*latent_(dim|size)|codebook_dim|text_dim|vision_dim|rotary_dim|attention_dim|lru_width|pooler_output_size"
    r"|qk_channels|v_channels|\w+_(out|in)_dim|\w*bottleneck\w*|cond_dim|state_size|num_filters"
    r"|dims|\w*conv_dim|filter_size|sinusoidal_dim|hidden_size_per_\w+|index_head_dim|\w+_embed_dim_\w+|key_dim|value_dim"
    r"|upsample_groups|adapter_\w+_(size|dim)|adapter_out_dim|conv_output_size|upsample_initial_channel|query_pre_attn_scalar|qk_(nope|rope)_head_dim|v_head_dim|embed_dim_per_stage|classifier_dim|\w+_hidden_size_\w+)$"
)
_FEW = {
    re.compile(r"^(num|n)_(local_|routed_|sparse_)?experts$|^moe_num_experts$|^num_routed_experts$"): 4,
    re.compile(r"experts_per_tok|^moe_(topk|k)$|^top_k(_experts)?$|^num_experts_per_token$|^router_top_k$"): 2,
    re.compile(r"^(n_group|topk_group|num_expert_group)$"): 1,
    re.compile(r"^(max_position_embeddings|n_positions|max_positions|max_seq_len|n_ctx)$"): 512,
    re.compile(r"^(max_source_positions|max_length|max_speech_positions)$"): 64,
    re.compile(r"^(num_queries|num_query_tokens|num_object_queries|resampler_n_latents|num_latents)$"): 8,
    re.compile(r"^(max_2d_position_embeddings)$"): 128,
    re.compile(r"^(codebook_size|num_embeddings|codevector_dim)$"): 64,
}
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks")
_DERIVED = {"stage_names", "_attn_implementation", "transformers_version", "dtype"}
# Three-part rotary embeddings, whose parts have a default in code that fits the full width only:
_MROPE = re.compile(r"vl|glm4v|glm46v|omni|glm_image|glmga|glm_ocr|qwen3_5|qwen4|cosmos3|muse|jev")
_INDEX_LISTS = re.compile(
    r"ind(ex|ic)es$|_idx$|return_idx$|_layers_ids$|insert_layer_id|feature_layers?$|intermediate_layer"
)


def shrink(config_class: type, factor: int) -> Any:
    """A small configuration of this class, its widths divided by `factor`."""
    return config_class.from_dict(_dictionary(config_class, config_class(), factor, {}))


def _dictionary(config_class: type, config: Any, factor: int, ids: dict[int, int]) -> dict[str, Any]:
    given = config.to_dict()
    n = None if _staged(given) else _first(given, *_COUNTS)
    kept = _kept_layers(given, n)
    small: dict[str, Any] = {}
    for key, value in given.items():
        if key in _DERIVED:
            continue
        part = getattr(config, key, None) if isinstance(value, dict) else None
        if hasattr(part, "to_dict"):
            small[key] = _dictionary(type(part), part, factor, ids)
        elif key == "per_layer_config" and value:
            layers = {int(i): v for i, v in value.items()}
            small[key] = {
                new: {k: _value(k, v, factor, ids, n, kept, given) for k, v in layers[old].items()}
                for new, old in enumerate(kept)
                if old in layers
            }
        else:
            small[key] = _value(key, value, factor, ids, n, kept, given)
    if n is not None and isinstance(given.get("out_indices"), (list, tuple)):
        small.pop("out_features", None)
        small["out_indices"] = list(range(1, 1 + len(given["out_indices"])))
    _fill(small)
    for path, value in OVERRIDES.get(given.get("model_type", ""), {}).items():
        *parts, key = path.split(".")
        reduce(lambda part, name: part[name], parts, small)[key] = value
    return small


def _fill(small: dict[str, Any]) -> None:
    """Values that are None by default and that models need; and what one part must be for another."""
    hidden, heads = small.get("hidden_size"), small.get("num_attention_heads")
    if "head_dim" in small and small["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int):
        small["head_dim"] = hidden // heads
    _even_heads(small)
    for key in [k for k, v in small.items() if v is None]:
        if key == "num_key_value_heads" and heads is not None:
            small[key] = heads
        elif _VOCAB.match(key) and key == "vocab_size":
            small[key] = VOCAB
        else:
            most = next((most for names, most in _FEW.items() if names.search(key) and most <= 4), None)
            if most is not None:
                small[key] = most
    rope = small.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope and _MROPE.search(small.get("model_type", "")):
        width = small.get("head_dim") or (hidden // heads if isinstance(hidden, int) and heads else 0)
        half = int(width * (rope.get("partial_rotary_factor") or 1.0)) // 2
        if half:
            rope["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    text = small.get("text_config")
    for name in ("vision_config", "audio_config"):
        part = small.get(name)
        if isinstance(part, dict) and isinstance(text, dict) and isinstance(text.get("hidden_size"), int):
            names = {"out_hidden_size", "output_dim"} | ({"hidden_size"} if "embed_dim" in part else set())
            for key in names & set(part):
                if isinstance(part[key], int):
                    part[key] = text["hidden_size"]


def _even_heads(small: dict[str, Any]) -> None:
    """Fewer heads where a head would be too narrow for rotary embeddings in two directions."""
    for wide, many in (
        ("hidden_size", "num_attention_heads"),
        ("hidden_size", "num_heads"),
        ("embed_dim", "num_heads"),
    ):
        width, heads = small.get(wide), small.get(many)
        if (wide == "hidden_size" and "embed_dim" in small) or "head_dim" in small:
            continue
        same = small.get("num_key_value_heads") in (None, heads)
        if isinstance(width, int) and isinstance(heads, int) and same and (width % heads or width // heads % 4):
            small[many] = max((h for h in range(1, heads + 1) if width % (4 * h) == 0), default=heads)
            if "num_key_value_heads" in small:
                small["num_key_value_heads"] = small[many]


def _staged(given: dict[str, Any]) -> bool:
    return isinstance(given.get("depths"), (list, tuple))


def _first(given: dict[str, Any], *names: str) -> int | None:
    return next((given[name] for name in names if isinstance(given.get(name), int) and given[name] > 0), None)


def _kept_layers(given: dict[str, Any], n: int | None) -> list[int]:
    """The first layer of each kind; `KEEP` at least, and as many as a backbone gives out."""
    indices = given.get("out_indices")
    least = max(KEEP, len(indices)) if isinstance(indices, (list, tuple)) else KEEP
    if n is None:
        return list(range(least))
    lists = [v for v in given.values() if isinstance(v, (list, tuple)) and len(v) == n and n > 2]
    kinds: dict[str, int] = {}
    for i in range(n):
        kinds.setdefault(str([v[i] for v in lists]), i)
    kept = sorted(kinds.values())[:8]
    rest = (i for i in range(n) if i not in kept)
    while len(kept) < min(least, n):
        kept.append(next(rest))
    return sorted(kept)


def _value(
    key: str, value: Any, factor: int, ids: dict[int, int], n: int | None, kept: list[int], given: dict[str, Any]
) -> Any:
    def again(item: Any) -> Any:
        return _value(key, item, factor, ids, n, kept, given)

    if key == "mrope_section":
        return value if value is None else _sections(value, factor)
    if isinstance(value, dict) and key not in ("id2label", "label2id"):
        return {k: _value(str(k), v, factor, ids, n, kept, given) for k, v in value.items()}
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if _staged(given) and key.startswith("out_"):
        return value
    if _INDEX_LISTS.search(key) and isinstance(value, (list, tuple)):
        return sorted({i if i < len(kept) else len(kept) - 1 for i in value})
    if isinstance(value, (list, tuple)) and n is not None and len(value) == n and n > 2:
        return [
            again(value[i]) if isinstance(value[i], int) and not isinstance(value[i], bool) else value[i] for i in kept
        ]
    if key.endswith(("_token_id", "_token_index", "_token_ids", "_start_id", "_end_id", "_id")):
        if isinstance(value, int) and value >= FIRST_ID:
            return ids.setdefault(value, FIRST_ID + len(ids))
        return [again(v) for v in value] if isinstance(value, (list, tuple)) else value
    if _VOCAB.match(key) and isinstance(value, int):
        return min(value, VOCAB)
    if key == "image_size" and (isinstance(value, int) or len(value) == 2):
        return _image(value, given.get("patch_size"), _staged(given) or given.get("num_encoder_blocks"))
    if key == "depths" and isinstance(value, (list, tuple)):
        return [min(v, KEEP) for v in value]
    if _LAYERS.match(key) and isinstance(value, int):
        return len(kept) if value == n else min(value, KEEP)
    for names, most in _FEW.items():
        if names.search(key) and isinstance(value, int):
            return min(value, most)
    if _WIDTH.match(key):
        if isinstance(value, int):
            return value // factor if value >= 2 * factor and value % factor == 0 else value
        if isinstance(value, (list, tuple)):
            return [again(v) for v in value]
    return value


def _sections(sections: list[int], factor: int) -> list[int]:
    """Parts of half a head's width: divided, and still summing to it."""
    total, parts = sum(sections) // factor, [s // factor for s in sections]
    for i in range(total - sum(parts)):
        parts[i % len(parts)] += 1
    return parts


def _image(size: Any, patch: Any, stages: Any) -> Any:
    if isinstance(size, (list, tuple)):
        return [_image(s, patch, stages) for s in size]
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    least = 64 if stages or not isinstance(patch, int) else 4 * patch
    if isinstance(patch, int):
        least += -least % patch
    return min(size, least)
