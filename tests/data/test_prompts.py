"""Prompts: the telling words are where they are said to be, and corruption touches nothing else."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regard.data import prompts
from regard.data.prompts import prompt as module

TASKS = {
    "ioi": prompts.ioi,
    "ioi S2": lambda n, **k: prompts.ioi(n, corruption="S2", **k),
    "ioi swap": lambda n, **k: prompts.ioi(n, corruption="swap", **k),
    "greater_than": prompts.greater_than,
    "docstring": prompts.docstring,
    "docstring definition": lambda n, **k: prompts.docstring(n, corruption="definition", **k),
    "docstring docstring": lambda n, **k: prompts.docstring(n, corruption="docstring", **k),
    "coloured_objects": prompts.coloured_objects,
    "induction": prompts.induction,
    "passkey": prompts.passkey,
}
CHANGED = {
    "ioi": {"IO", "S1", "S2"},
    "ioi S2": {"S2"},
    "ioi swap": {"S2"},
    "greater_than": {"YY"},
    "docstring": {"A_def", "B_def", "C_def", "A_doc", "B_doc"},
    "docstring definition": {"A_def", "B_def", "C_def"},
    "docstring docstring": {"A_doc", "B_doc"},
    "coloured_objects": {"QUERY"},
    "induction": {"A1"},
    "passkey": {"KEY", "KEY_AGAIN"},
}


def at(prompt, name):
    return prompt.words[prompt.positions[name]]


@pytest.mark.parametrize("task", TASKS)
def test_corruption_changes_exactly_the_named_words(task):
    for prompt in TASKS[task](40, seed=3):
        assert set(prompt.changed) == {prompt.positions[name] for name in CHANGED[task]}
        assert len(prompt.corrupted) == len(prompt.words)
        assert prompt.text == "".join(prompt.words)
        assert prompt.positions["END"] == len(prompt.words) - 1
        assert prompt.answer not in prompt.distractors


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_depends_on_its_seed_and_index_only(task):
    many = TASKS[task](12, seed=5)
    assert TASKS[task](3, seed=5) == many[:3]
    assert many != TASKS[task](12, seed=6)
    assert len({p.text for p in many}) == 12


def test_ioi_names_who_is_who():
    for order in ("ABBA", "BABA"):
        for p in prompts.ioi(30, order=order):
            assert at(p, "IO") == p.answer
            assert at(p, "S1") == at(p, "S2") == p.distractors[0] != p.answer
            assert p.words.count(p.answer) == 1
            assert p.words.count(p.distractors[0]) == 2
            assert (p.positions["IO"] < p.positions["S1"]) == (order == "ABBA")
            assert p.positions["S1+1"] == p.positions["S1"] + 1
            people = [p.corrupted[p.positions[name]] for name in ("IO", "S1", "S2")]
            assert len(set(people)) == 3
            assert not set(people) & {p.answer, p.distractors[0]}
    swapped = prompts.ioi(1, corruption="swap")[0]
    assert swapped.corrupted[swapped.positions["S2"]] == swapped.answer


def test_ioi_by_hand():
    (p,) = prompts.ioi(1, template="[FIRST], with [SECOND]: [S2] told", order="BABA", names=["A", "B", "C", "D", "E"])
    s, io = p.words[0], p.words[3].strip()
    assert p.words == (s, ",", " with", f" {io}", ":", f" {s}", " told")
    assert p.positions == {"S1": 0, "S1+1": 1, "IO": 3, "S2": 5, "END": 6}


def test_later_years_are_the_answers():
    for p in prompts.greater_than(40):
        yy = int(at(p, "YY"))
        assert [int(a) for a in p.answers] == list(range(yy + 1, 100))
        assert [int(d) for d in p.distractors] == list(range(yy + 1))
        assert at(p, "XX1") == at(p, "XX2")
        assert p.corrupted[p.positions["YY"]] == "01"
    assert p.text.endswith(f"the year{at(p, 'XX1')}")


def test_the_docstring_goes_through_the_arguments_in_order():
    for p in prompts.docstring(30):
        assert (at(p, "A_doc"), at(p, "B_doc"), p.answer) == (at(p, "A_def"), at(p, "B_def"), at(p, "C_def"))
        assert p.text.startswith("def ")
        assert p.text.endswith(":param")
        compile(p.text + f'{p.answer}: it\n    """\n', "docstring", "exec")  # it is Python


def test_the_colour_is_that_of_the_thing_asked_for():
    for example in (True, False):
        for p in prompts.coloured_objects(30, example=example):
            assert at(p, "OBJ") == at(p, "QUERY")
            assert at(p, "COL") == p.answer
            assert p.positions["OBJ"] == p.positions["COL"] + 1
            other = p.corrupted[p.positions["QUERY"]]
            (k,) = (k for k in "123" if at(p, f"OBJ{k}") == other)
            assert at(p, f"COL{k}") == p.distractors[0]
            assert p.text.count("Q:") == 1 + example


@given(st.integers(2, 20), st.integers(0, 5), st.data())
@settings(deadline=None, max_examples=40)
def test_induction_copies(length, seed, data):
    last = data.draw(st.none() | st.integers(0, length - 2))
    (p,) = prompts.induction(1, seed=seed, words=range(40), length=length, at=last)
    assert at(p, "A1") == at(p, "END")
    assert at(p, "B1") == p.answer
    assert p.positions["B1"] == p.positions["A1"] + 1
    assert p.positions["END"] == p.positions["A1"] + length
    assert len(set(p.words[:length])) == length
    assert p.corrupted.count(p.corrupted[p.positions["A1"]]) == 1
    if last is not None:
        assert p.positions["A1"] == last


def test_the_pass_key_lies_at_its_depth():
    for depth in (0.0, 0.5, 1.0):
        (p,) = prompts.passkey(1, sentences=10, depth=depth)
        before = p.text[: p.text.index("The pass key is")]
        assert before.count(".") == 2 + 10 * depth
        assert at(p, "KEY") == at(p, "KEY_AGAIN") == p.answer
        assert p.corrupted[p.positions["KEY"]] == p.distractors[0]
    (odd,) = prompts.passkey(1, keys=["a-b", "c d"])
    assert at(odd, "KEY") == odd.answer  # a key is one piece, whatever is in it


def test_regression_is_linear():
    r = prompts.regression(5, dim=4, examples=7, seed=2)
    assert r.x.shape == (5, 7, 4)
    torch.testing.assert_close(r.y, torch.einsum("ned,nd->ne", r.x, r.weights))
    torch.testing.assert_close(r.corrupted_y, torch.einsum("ned,nd->ne", r.x, r.corrupted_weights))
    solved = torch.linalg.lstsq(r.x[:, :-1], r.y[:, :-1, None]).solution[..., 0]
    torch.testing.assert_close(solved, r.weights, rtol=1e-3, atol=1e-3)
    tokens = r.sequence()
    assert tokens.shape == (5, 13, 4)
    assert torch.equal(tokens[:, 0::2], r.x)
    assert torch.equal(tokens[:, 1::2, 0], r.y[:, :-1])
    assert not tokens[:, 1::2, 1:].any()
    assert torch.equal(r.sequence(corrupted=True)[:, 1::2, 0], r.corrupted_y[:, :-1])
    assert torch.equal(prompts.regression(2, dim=4, examples=7, seed=2).x, r.x[:2])


def test_inputs_and_weights_are_standard_normal():
    r = prompts.regression(400, dim=5, examples=10)
    for values in (r.x.flatten(0, 1), r.weights, r.corrupted_weights):
        n = len(values)
        assert values.mean(0).abs().max() < 4.5 / n**0.5
        assert (values.T.cov() - torch.eye(5)).abs().max() < 6.5 / n**0.5  # the variance's own deviation is sqrt(2 / n)
    assert abs(torch.corrcoef(torch.stack([r.weights.flatten(), r.corrupted_weights.flatten()]))[0, 1]) < 0.1


def test_noise_and_sparsity_of_regression():
    r = prompts.regression(200, dim=6, examples=20, noise=0.5, nonzero=2)
    assert ((r.weights != 0).sum(-1) == 2).all()
    left = r.y - torch.einsum("ned,nd->ne", r.x, r.weights)
    assert left.std() == pytest.approx(0.5, rel=0.05)
    with pytest.raises(ValueError, match="nonzero lies between 1 and dim = 8"):
        prompts.regression(1, nonzero=9)


# Tokens

COMMON = "the of and to in he was it his that with her as for had you not be on at extraordinarily"


def byte_level(merges=(), **options):
    """A byte-level tokenizer with one token a byte, but for the given merged strings (Ġ is a blank)."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = []
    for word in merges:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                pairs.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def test_words_are_found_among_tokens():
    template = "[FIRST] and [SECOND] met. [S2] saw"
    names = ["Ann", "Bob", "Eve", "Ian", "Una"]
    for merges in ([f"Ġ{n[0]}" for n in names], [f"Ġ{n}" for n in names] + names + ["Ġand", "Ġmet", "Ġsaw"]):
        tokenizer = byte_level(merges)
        for p in prompts.ioi(20, template=template, names=names):
            e = prompts.encode(p, tokenizer)
            for ids, words in ((e.ids, p.words), (e.corrupted, p.corrupted)):
                for name, index in p.positions.items():
                    said = tokenizer.decode([ids[t] for t in e.positions[name]])
                    assert said.strip() == words[index].strip()
            assert p.answer.startswith(tokenizer.decode(e.answers))
            if len(merges) > 5:
                assert {len(tokens) for tokens in e.positions.values()} == {1}
                assert e.positions["END"] == (len(e.ids) - 1,)
                assert tokenizer.decode(e.answers) == p.answer
                assert tokenizer.decode(e.distractors) == p.distractors[0]


def test_years_need_a_tokenizer_that_parts_them():
    p = prompts.greater_than(1, seed=4)[0]
    yy, century = at(p, "YY"), at(p, "XX1").strip()
    two = byte_level([f"Ġ{c}" for c in range(11, 18)] + [f"{y:02}" for y in range(100)])
    e = prompts.encode(p, two)
    assert two.decode([e.ids[t] for t in e.positions["YY"]]) == yy
    assert len(e.answers) == 99 - int(yy)
    assert two.decode(e.distractors) == "".join(p.distractors)
    with pytest.raises(ValueError, match="joins"):
        prompts.encode(p, byte_level([f"Ġ{century}{yy}"]))
    with pytest.raises(ValueError, match="same token"):
        prompts.encode(p, byte_level())  # digits by themselves do not tell 40 from 49


def test_unfair_comparisons_are_refused():
    p = prompts.induction(1, words=["aa", "bb", "ccc"], length=2, at=0)[0]
    with pytest.raises(ValueError, match="fall into tokens differently"):
        for seed in range(10):
            prompts.encode(prompts.induction(1, seed=seed, words=["aa", "bb", "ccc"], length=2)[0], byte_level())
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        prompts.encode(p, slow)


def test_a_first_token_shifts_all_positions():
    from regard.loading import load

    _, tokenizer = load("reader")
    common = prompts.single(COMMON.split(), tokenizer)
    assert 12 < len(common) < len(COMMON.split())
    p = prompts.induction(1, words=common, length=8, at=3)[0]
    e = prompts.encode(p, tokenizer)
    assert e.ids[0] == tokenizer.bos_token_id
    assert e.positions == {"A1": (4,), "B1": (5,), "END": (12,)}
    assert e.ids[4] == e.ids[12] != e.corrupted[4]
    assert e.ids[5] == e.answers[0]
    assert not set(e.answers) & set(e.distractors)


def test_one_id_a_word():
    made = prompts.induction(4, words=range(10, 30), length=6, at=2)
    b = prompts.batch(made, int)
    rows = torch.arange(4)
    assert b.ids.shape == b.corrupted.shape == (4, 9)
    assert torch.equal(b.ids[rows, b.positions["A1"]], b.ids[rows, b.positions["END"]])
    assert torch.equal(b.ids[rows, b.positions["B1"]], b.answers[:, 0])
    assert ((b.ids != b.corrupted).nonzero()[:, 1] == 2).all()
    years = prompts.batch(prompts.greater_than(5), prompts.vocabulary(prompts.greater_than(5)))
    assert (years.answers == -1).any()  # as many as the longest row
    words = prompts.vocabulary(made)
    assert list(words)[:2] == ["<pad>", "<bos>"]
    assert sorted(words.values()) == list(range(len(words)))


def test_batches_say_what_is_wrong():
    with pytest.raises(ValueError, match="the vocabulary lacks a word"):
        prompts.batch(prompts.ioi(1), {})
    with pytest.raises(ValueError, match="group them"):
        prompts.batch(prompts.induction(9, words=range(50)), int)


def test_prompts_that_do_not_fit_together_are_refused():
    good = {
        "task": "t",
        "words": ("a", " b"),
        "corrupted": ("c", " b"),
        "answers": (" d",),
        "distractors": (),
        "positions": {"A": 0, "END": 1},
    }
    prompts.Prompt(**good)
    for change, message in (
        ({"corrupted": ("c",)}, "2 words but 1 corrupted"),
        ({"positions": {"A": 2}}, "positions A lie outside"),
        ({"positions": {"END": 1}}, "without a name"),
        ({"distractors": (" d",)}, "distractor too"),
        ({"answers": ()}, "at least one answer"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts.Prompt(**good | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts.ioi(1, corruption="XYZ"), "no corruption 'XYZ'; choose from ABC, S2, swap"),
        (lambda: prompts.ioi(1, order="AABB"), "no order 'AABB'"),
        (lambda: prompts.ioi(1, names=["A", "B"]), "5 different ones are needed, but there are only 2"),
        (lambda: prompts.docstring(1, corruption="all"), "choose from definition, docstring, both"),
        (lambda: prompts.greater_than(1, centuries=[7]), "two digits"),
        (lambda: prompts.induction(1, length=1), "needs a follower"),
        (lambda: prompts.induction(1, length=4, at=3), "0 to length - 2 = 2"),
        (lambda: prompts.passkey(1, depth=2), "depth lies between 0 and 1"),
        (lambda: prompts.passkey(1, keys=["a"]), "two keys"),
        (lambda: prompts.ioi(1, seed=-1), "count from 0"),
    ],
)
def test_knobs_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_in_docstrings():
    failed, run = doctest.testmod(module)
    assert not failed
    assert run
