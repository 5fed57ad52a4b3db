"""The two rules of learning; the paper has no code."""

from regard.studies.pavlovian import pavlovian

from .. import Case, Source

SOURCE = Source(
    "reimplementation", "fla-org/flash-linear-attention, naive_recurrent_linear_attn and delta_rule_recurrence"
)


def compare(case: Case):
    given, rate = (case["key"], case["value"], case["query"]), case.settings["rate"]
    return {f"recalled_{rule}": pavlovian(*given, rule=rule, rate=rate) for rule in ("hebbian", "delta")}
