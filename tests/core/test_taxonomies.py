"""Taxonomies of surveys are whole, can be browsed, and are judged by more than themselves."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from regard import catalog
from regard.atlas import STAGES, TAXONOMY
from regard.claims.surveys import attention_survey
from regard.claims.surveys.perception_cognition_survey import risk_ratio
from regard.cli import app
from regard.mechanisms import Cost, mechanism, operators

SURVEYS = ("attention-survey", "human-attention-survey", "perception-cognition-survey", "sink-survey", "head-survey")
EMPTY = {"expression-preparation"}  # of which no paper here is but the survey itself


def run(*arguments):
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "300"})


@pytest.mark.parametrize("survey", SURVEYS)
def test_a_taxonomy_is_whole(survey):
    """Every tag has a meaning and a paper, every paper that is placed is there, and none is placed twice."""
    assert catalog.row(survey).room == "surveys"
    for heading, tagging in catalog.taxonomies()[survey].items():
        for tag, keys in tagging.items():
            assert tag in catalog.tags(), (heading, tag)
            assert set(keys) <= set(catalog.rows()), (heading, tag)
            assert len(keys) == len(set(keys)), (heading, tag)
            found = [row.key for row in catalog.taxonomy(survey)[heading][tag]]
            assert bool(found) == (tag not in EMPTY), (heading, tag)
            assert set(keys) <= set(found), (heading, tag)
            assert survey not in found
    for row in catalog.rows().values():
        assert len(row.tags) == len(set(row.tags)), row.key


@pytest.mark.parametrize(
    ("survey", "headings", "belongs"),
    [
        ("attention-survey", ["number of sequences"], lambda row: row.room == "mechanisms"),
        ("attention-survey", ["levels of abstraction"], lambda row: row.room == "mechanisms"),
        ("attention-survey", ["positions"], lambda row: row.room == "mechanisms"),
        ("human-attention-survey", None, lambda row: row.room == "gaze" and row.key != "brain-encoder"),
        (
            "perception-cognition-survey",
            ["layers"],
            lambda row: "vision-language" in row.tags and "survey" not in row.tags,
        ),
    ],
)
def test_papers_of_a_field_are_placed(survey, headings, belongs):
    taxonomy = catalog.taxonomy(survey)
    tags = {tag for heading in headings or taxonomy for tag in taxonomy[heading]}
    field = [row for row in catalog.rows().values() if belongs(row)]
    assert len(field) >= 7
    assert [row.key for row in field if not tags & set(row.tags)] == []


def test_the_tag_below_a_layer_is_of_that_layer():
    taxonomy = catalog.taxonomy("perception-cognition-survey")
    for layer in ("perception", "cognition"):
        for tag, rows in taxonomy[layer].items():
            assert [row.key for row in rows if f"{layer}-layer" not in row.tags] == [], tag


def test_a_paper_is_tagged_by_its_row_and_by_where_it_is_placed():
    tags = catalog.row("halonet").tags
    assert tags[:3] == ("vision", "window", "convolution")  # its own, first
    assert {"self-attention", "local-positions"} <= set(tags)
    assert "halonet" in [row.key for row in catalog.tagged("window", "local-positions")]
    assert {row.key for row in catalog.taxonomy("human-attention-survey")["scanpath prediction"]["scanpath"]} >= {
        "tpp-gaze",  # by its row
        "humanoid-search",  # placed
    }


def test_what_has_no_taxonomy_is_refused_by_name():
    with pytest.raises(KeyError, match=r"no taxonomy of 'attention-surveys' \(did you mean attention-survey"):
        catalog.taxonomy("attention-surveys")
    with pytest.raises(KeyError, match="no taxonomy of 'halonet'; there are those of attention-survey"):
        catalog.taxonomy("halonet")


def test_a_taxonomy_can_be_browsed():
    listed = run("papers", "--tag", "local-positions", "--tag", "self-attention").output
    assert "halonet" in listed
    assert "moba" not in listed
    shown = run("papers", "show", "human-attention-survey").output
    assert "medicine: no paper here" in shown
    count = len(catalog.taxonomy("human-attention-survey")["data sets and benchmarks"]["gaze-data"])
    assert f"gaze-data ({count})" in shown
    assert "positions:" not in run("papers", "show", "halonet").output


def test_a_tag_says_what_it_means_whose_it_is_and_which_heads_are_of_it():
    listed = run("papers", "--tag", "latent-reasoning").output
    assert f"latent-reasoning: {catalog.tags()['latent-reasoning']}" in listed
    assert "stages of thinking, of head-survey" in listed
    assert "heads: induction, suppression" in listed
    both = run("papers", "--tag", "sinks", "--tag", "training").output
    assert "sinks: tokens that gather" in both
    assert "training: losses" in both
    assert "heads: sink:" in both
    every = run("papers", "tags").output
    assert "previous token, positional" in every


def test_heads_are_those_of_the_atlas_and_of_their_stage():
    kinds = tomllib.loads((Path(catalog.__file__).parent / "catalog" / "tags.toml").read_text())["heads"]
    assert list(kinds) == list(TAXONOMY)
    stages = {stage.replace(" ", "-") for stage in STAGES}
    for kind, of in kinds.items():
        assert set(of) <= set(catalog.tags()), kind
        assert [tag for tag in of if tag in stages] == [TAXONOMY[kind].stage.replace(" ", "-")] * bool(
            TAXONOMY[kind].stage
        ), kind
    assert catalog.heads("sinks") == ["sink"]
    assert catalog.heads("audio") == []


def odd(name, *tags):
    return attention_survey.disagreements(attention_survey.behaviour(name, operators()[name]), set(tags))


def test_tags_are_held_against_what_an_operator_does():
    assert odd("halonet", "self-attention", "local-positions") == []
    assert odd("halonet", "self-attention", "hard-positions") == ["is local"]
    assert odd("halonet", "distinctive", "local-positions") == ["takes self-attention"]
    assert odd("moba", "self-attention", "soft-positions") == ["is hard"]
    assert odd("routing", "self-attention", "distinctive", "hard-positions") == []
    assert odd("memory_efficient", "self-attention", "distinctive", "local-positions") == ["is soft"]
    wrong = odd("lightning_2", "self-attention", "soft-positions", "multi-dimension")
    assert wrong == ["has the same weight for other features"]


def weights(query, key, *, causal, mask, scale):
    scores = query @ key.mT
    return scores.masked_fill(scores < scores.median(-1, keepdim=True).values, float("-inf")).softmax(-1)


def test_gradients_of_what_was_not_chosen_and_weights_of_features_are_seen():
    """An operator that chooses by content, but lets gradients pass to every key, and scales features by their place."""

    @mechanism("full", mask="keys", weights=weights, cost=lambda *_, **__: Cost(0, 0))
    def leaking(query, key, value, *, causal=False, mask=None, scale=None):
        soft = (query @ key.mT).softmax(-1)
        chosen = weights(query, key, causal=causal, mask=mask, scale=scale)
        through = chosen + soft - soft.detach()
        return through @ (value * torch.arange(1, value.shape[-1] + 1, dtype=value.dtype))

    done = attention_survey.behaviour("leaking", leaking)
    assert done == {"sequences": {"self-attention"}, "positions": "hard", "leaks": True, "features": True}
    assert attention_survey.disagreements(done, {"self-attention", "hard-positions"}) == [
        "has a gradient for keys not chosen",
        "has other weights for other features",
    ]


def test_risk_ratio_by_hand():
    """Alone, 3 of 4 wrong against 2 of 4."""
    stratum = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    exposed = np.array([1, 1, 0, 1, 1, 0, 0, 0], bool)
    wrong = np.array([1, 0, 1, 1, 1, 1, 0, 0], bool)
    assert risk_ratio(wrong, exposed) == pytest.approx(1.5)
    # Stratum 0: 1 wrong of 2 exposed, 1 of 1 not, n = 3; stratum 1: 2 of 2, 1 of 3, n = 5.
    assert risk_ratio(wrong, exposed, stratum) == pytest.approx((1 * 1 / 3 + 2 * 3 / 5) / (1 * 2 / 3 + 1 * 2 / 5))
    assert np.isnan(risk_ratio(exposed, exposed))
