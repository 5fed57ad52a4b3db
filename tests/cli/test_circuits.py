"""`regard circuits`: methods from the catalog, tasks and files, and what is written."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import transformers as t
from typer.testing import CliRunner

from regard import zoo
from regard.circuits.notice import semantic_pairs
from regard.cli import app, circuits, drawn
from regard.data.prompts import ioi
from regard.data.scenes import Object, Scene, render

NAMES = ("graph.svg", "faithfulness.svg", "patching.svg", "circuit.json")


def run(*arguments):
    return CliRunner().invoke(app, ["circuits", *map(str, arguments)], env={"COLUMNS": "200"})


def test_methods_are_those_that_a_task_has_enough_for():
    found = circuits.methods()
    assert {"sixteen_heads", "cd_t", "causal_head_gating", "discrete_sae", "circuit_reuse"} <= set(found)
    assert not {"maps", "attention_sae", "attention_decomposition"} & set(found)  # of pairs, of texts; no scores


@pytest.mark.parametrize("method", ["circuit_reuse", None])
def test_the_readers_heads_that_name_the_indirect_object(tmp_path, method):
    chosen = () if method is None else ("--method", method)
    result = run("reader", "--task", "ioi", "-n", 4, "--heads", 3, "--out", tmp_path, *chosen)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "circuit.json").read_text())
    assert [1, 1] in told["circuit"]  # which patching shows to do it
    assert (told["method"], told["prompts"], told["right"]) == (method or "patching", 4, 1.0)
    size, ours, random = (told["faithfulness"][name] for name in ("size", "circuit", "random"))
    assert (size[0], size[-1]) == (0, 48)
    assert (ours[0], ours[-1]) == pytest.approx((0, 1), abs=1e-6)
    assert ours[2] > 0.5 > max(random[2])  # two heads
    assert told["patching"]["position"][-1] == "END"
    effects = dict(zip(told["patching"]["head"], told["patching"]["effect"]))
    assert max(effects["1.1"]) == effects["1.1"][-1] > 0.3
    assert {"start": "1.1", "end": "answer"}.items() <= told["edges"][0].items()
    for name in NAMES[:3]:
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")
    assert f"{told['score']['clean']:.2f}" in result.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random decoders with the reader's tokenizer: name -> folder."""
    _, tokenizer = zoo.load("reader")
    vocabulary, made = len(tokenizer), {}
    none = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for name, model in {
        "gpt2": t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=vocabulary, **none)),
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=vocabulary, **none)),
        "neox": t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes, vocab_size=vocabulary, **none)),
    }.items():
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def row(prompt, **changes):
    texts = {"clean": prompt.text, "corrupted": prompt.corrupted_text}
    return {**texts, "answer": prompt.answer, "wrong": prompt.distractors[0], **changes}


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", "sixteen_heads"), ("llama", "cd_t"), ("neox", "circuit_reuse")]
)
def test_prompts_of_a_file_on_any_decoder(folders, tmp_path, family, method):
    prompts = lines(tmp_path / "asked.jsonl", *(row(prompt) for prompt in ioi(3, seed=1)))
    result = run(folders[family], "--task", prompts, "--method", method, "--heads", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out" / "circuit.json").read_text())
    assert (told["prompts"], told["method"]) == (3, method)
    assert told["patching"]["position"][-1] == "-1"  # without names, tokens count from the end
    assert len(told["heads"]) == 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three questions on scenes whose colour changes, as pictures and a file."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = [
        Scene((Object(shape, "red", "large", 0.3, 0.5), Object(other, "blue", "large", 0.75, 0.5)))
        for shape, other in (("square", "plate"), ("heart", "diamond"), ("circle", "triangle"))
    ]
    rows = []
    for i, pair in enumerate(semantic_pairs(scenes, "presence", seed=1)):
        for scene, name in ((pair.scene, f"{i}.png"), (pair.other_scene, f"{i}-other.png")):
            render(scene).image().save(folder / name)
        texts = {"clean": pair.text, "answer": pair.answer, "wrong": pair.wrong}
        rows.append({**texts, "image": f"{i}.png", "corrupted_image": f"{i}-other.png"})
    return lines(folder / "asked.jsonl", *rows), rows


@pytest.mark.parametrize("method", ["notice", None])
def test_pairs_of_pictures_of_a_file(pictures, tmp_path, method):
    chosen = () if method is None else ("--method", method)
    result = run("describer", "--task", pictures[0], "--heads", 3, "--out", tmp_path, *chosen)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "circuit.json").read_text())
    assert (told["prompts"], told["right"], told["method"]) == (3, 1.0, method or "patching")
    assert len(told["heads"]) == 24  # of the language model, not of the tower
    assert told["score"]["clean"] > 0 > told["score"]["corrupted"]
    ours, random = (told["faithfulness"][name] for name in ("circuit", "random"))
    assert (ours[0], ours[-1]) == pytest.approx((0, 1), abs=1e-5)
    assert len(random[0]) == 5


def test_bad_pictures_are_named(pictures, folders, tmp_path):
    path, rows = pictures
    bare = {key: value for key, value in rows[0].items() if "image" not in key}
    for changed, message in (
        ([rows[0], {**bare, "corrupted": bare["clean"]}], "line 2: no picture, and other lines have some"),
        ([{**rows[0], "corrupted": "what colour is the square?"}], "line 1: clean has"),
        ([{**rows[0], "image": "absent.png"}], "absent.png"),
        ([{**rows[0], "wrong": "yes"}], "begin with the same token"),
        ([{**rows[0], "image": 3}], "with the texts clean, corrupted, answer, wrong, image, corrupted_image"),
        ([{**rows[0], "corrupted_image": rows[0]["image"]}], "nothing to find"),
    ):
        result = run("describer", "--task", lines(path.parent / "bad.jsonl", *changed), "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output.replace("\n", " ")
    result = run(folders["gpt2"], "--task", path, "--out", tmp_path / "out")
    assert "reads text only" in result.output


def test_bad_input_is_named(folders, tmp_path):
    good = row(ioi(1)[0])
    for given, message in (
        (("--task", "nothing"), "neither ioi, greater_than, docstring, induction nor a file"),
        (("--method", "maps"), "there are"),
        (("--task", lines(tmp_path / "a.jsonl", {**good, "answer": 3})), "line 1: an object with the texts clean"),
        (("--task", lines(tmp_path / "b.jsonl", good, {**good, "corrupted": "Too short"})), "line 2: "),
        (("--task", lines(tmp_path / "c.jsonl", {**good, "wrong": good["answer"]})), "line 1: "),
        (("--task", lines(tmp_path / "d.jsonl", {**good, "corrupted": good["clean"]})), "nothing to find"),
    ):
        result = run(folders["gpt2"], *given, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.output.replace("\n", " ")
    (tmp_path / "e.jsonl").write_text("{not json\n")
    assert "line 1: not JSON" in run(folders["gpt2"], "--task", tmp_path / "e.jsonl", "--out", tmp_path / "out").output
    (tmp_path / "f.jsonl").write_bytes(b"\xff\xfe")
    told = run(folders["gpt2"], "--task", tmp_path / "f.jsonl", "--out", tmp_path / "out").output.replace("\n", "")
    assert "f.jsonl is not UTF-8 text (byte 0)" in told
    assert "does not say which token comes next" in run("viewer", "--out", tmp_path / "out").output
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_wrong_is_said_to_be(folders, tmp_path):
    good = {"clean": " ".join(ioi(1, seed=0)[0].words), "corrupted": " ".join(ioi(1, seed=0)[0].corrupted)}
    one, other = (
        lines(tmp_path / "a.jsonl", {**good, "answer": " a", "wrong": " b"}),
        lines(tmp_path / "b.jsonl", {**good, "answer": " b", "wrong": " a"}),
    )
    said = [
        run(folders["gpt2"], "--task", task, "--heads", 1, "--out", tmp_path / "out").output for task in (one, other)
    ]
    assert ["wrong on most" in output for output in said] in ([True, False], [False, True])
    assert all("1 prompt, " in output for output in said)


def test_an_edge_passes_no_node_that_it_is_not_of():
    """Straight where it can be, aside where a node stands in between."""
    assert drawn._bend((0, 0), (100, 0), [(50, 60)]) == (50, 0)
    start, end, between = np.array([0.0, 0.0]), np.array([0.0, 180.0]), (0.0, 90.0)
    middle = np.array(drawn._bend(tuple(start), tuple(end), [between]))
    t = np.linspace(0, 1, 200)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    assert np.hypot(*(curve - between).T).min() > 17
