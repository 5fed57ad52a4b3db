"""The head's classes and weights, slots of each kind, and the losses."""

import torch

from regard.models.concept_centric import ConceptHead, ConceptSlots, explanation_loss, sparsity_loss

from .. import Case, Source

SOURCE = Source("authors", "jyhong0304/concept_centric_transformers, ctc/model_utils.py and loss.py")
SLOTS = {
    "slot_mu": "mean",
    "slot_log_sigma": "log_deviation",
    "norm_feature": "norm_inputs",
    "project_q": "query",
    "project_k": "key",
    "project_v": "value",
}
READ = {"q": "query", "kv": "key_value", "proj": "output"}


def _slots(case: Case, start: str) -> dict[str, torch.Tensor]:
    return _named({n.removeprefix(start): v for n, v in case.weights.items() if n.startswith(start)}, SLOTS)


def _named(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in state.items():
        module, dot, rest = name.partition(".")
        found[names.get(module, module) + dot + rest] = value
    return found


def compare(case: Case):
    settings, weights, tokens = case.settings, case.weights, case["tokens"]
    dim, concepts, rounds = tokens.shape[-1], settings["concepts"], settings["rounds"]
    sizes = {"spatial_concepts": settings["spatial_concepts"], "heads": settings["heads"]}
    head = ConceptHead(dim, settings["classes"], concepts, rounds=settings["model_rounds"], **sizes).eval()
    state = {f"slots.{name}": value for name, value in _slots(case, "model.concept_slot_attention.").items()}
    for theirs, ours in (("concept_tranformer", "read"), ("spatial_concept_tranformer", "spatial_read")):
        start = f"model.{theirs}."
        part = {n.removeprefix(start): v for n, v in weights.items() if n.startswith(start)}
        state |= {f"{ours}.{name}": value for name, value in _named(part, READ).items()}
    state["places"] = weights["model.concept_slot_pos"].view(concepts, dim)
    state["spatial_concepts"] = weights["model.spatial_concepts"][0]
    head.load_state_dict(state)
    found = head(case["cls"], tokens, noise=case["noise"])
    made = {}
    for kind, start in (("sa", "slot."), ("qsa", "query_slot."), ("isa", "implicit_slot.")):
        slots = ConceptSlots(dim, concepts, kind=kind, rounds=rounds)
        slots.load_state_dict(_slots(case, start))
        made[kind] = slots(tokens, **({"noise": case["noise"]} if kind == "sa" else {"start": case["start"]}))
    spatial = case["spatial_target"].where(case["spatial_target"] >= 0, torch.nan)
    target = case["target"].where(case["target"] >= 0, torch.nan)
    return {
        "logits": found.logits,
        "concept_attention": found.concepts[:, None],
        "spatial_attention": found.spatial,
        "slots": made["sa"][0],
        "slot_attention": made["sa"][1].mT,
        "query_slots": made["qsa"][0],
        "query_slot_attention": made["qsa"][1],
        "implicit_slots": made["isa"][0],
        "concept_cost": explanation_loss(found.concepts, target),
        "spatial_cost": explanation_loss(found.spatial, spatial),
        "sparsity": sparsity_loss(found.concepts) + sparsity_loss(found.spatial),
    }
