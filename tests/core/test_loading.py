"""Folders of models that are broken end as one error, which names the file and the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.cli import app


@pytest.fixture
def copy(folders, tmp_path):
    def made(kind: str = "gpt2", **changed: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(folders[kind], folder)
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
        return folder

    return made


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(regard.UnknownModel) as caught:
        regard.load(folder)
    done = CliRunner().invoke(app, ["look", str(folder), "-t", "it was", "-o", str(folder.parent / "out")])
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)  # no traceback
    for message in (str(caught.value), done.stderr):
        for part in (str(folder), *said):
            assert part in message.replace("\n", " "), message
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_weights_cut_short(copy, left):
    file = copy() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(file.parent, "model.safetensors is damaged", "get it again")


@pytest.mark.parametrize("config", ["null", "[]", "5", "", "{", '"text"', "[" * 100_000])
def test_configurations_that_are_none(copy, config):
    folder = copy()
    (folder / "config.json").write_text(config)
    refused(folder, "config.json", "get it again")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"n_head": 0}, "config.json"),
        ({"n_head": -1}, "config.json: n_head is -1"),
        ({"n_head": "four"}, "config.json"),
        ({"n_head": None}, "config.json"),
        ({"n_embd": 48}, "config.json"),
        ({"vocab_size": None}, "config.json"),
        ({"architectures": ["GPT2Tokenizer"]}, "GPT2Tokenizer, which is no model"),
        ({"architectures": ["AutoModel"]}, "AutoModel, which is no model"),
        ({"architectures": 5}, "must list names"),
        ({"architectures": [5]}, "must list names"),
        ({"architectures": "GPT2LMHeadModel"}, "must list names"),
        ({"model_type": "no-such-type"}, "no-such-type"),
        ({"model_type": 5}, "config.json"),
        ({"model_type": None}, "config.json"),
    ],
)
def test_configurations_that_no_model_has(copy, changed, why):
    refused(copy(**changed), why)


def test_pickles_alone(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights")
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "only pytorch_model.bin, which may run code", "safetensors")


def test_a_part_of_the_weights_is_missing(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.safetensors.index.json names model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')
    refused(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("held", ["{", "[]", "{}", '{"model": 5}'])
def test_a_tokenizer_that_cannot_be_read(copy, name, held):
    folder = copy()
    (folder / name).write_text(held)
    if name == "tokenizer_config.json" and held == "{}":
        regard.load(folder)  # says nothing, which is no harm
    else:
        refused(folder, name)


def test_without_a_tokenizer_the_model_loads_and_commands_say_so(copy):
    folder = copy()
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer_config.json", "cannot be read")
    for file in folder.glob("*token*"):
        file.unlink()
    assert regard.load(folder).processor is None
    done = CliRunner().invoke(app, ["look", str(folder), "-t", "it was", "-o", str(folder.parent / "out")])
    assert done.exit_code == 2
    assert "has no tokenizer" in done.stderr


def test_a_picture_processor_that_cannot_be_read(copy):
    folder = copy("vit")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    refused(folder, "preprocessor_config.json")


@pytest.fixture
def asked(monkeypatch):
    """The names that go on to transformers, and so to the hub."""
    import transformers

    names: list[str] = []

    def ask(name: str, **_: object) -> None:
        names.append(name)
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask)
    return names


@pytest.mark.parametrize(
    ("name", "meant"), [("readr", "reader"), ("Reader", "reader"), ("veiwer", "viewer"), ("describer ", "describer")]
)
def test_a_mistyped_zoo_model_is_told_without_asking_the_hub(asked, tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    refused(Path(name), f"did you mean {meant}", "hub id")
    assert not asked


@pytest.mark.parametrize("name", ["gpt2", "t5-small", "bert-base-cased", "owner/readr", "reader/reader"])
def test_hub_ids_are_asked_for(asked, name):
    with pytest.raises(regard.UnknownModel, match="no network"):
        regard.load(name)
    assert asked == [name]


def test_what_the_cache_holds_is_no_mistake(asked, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/readr/config.json")
    with pytest.raises(regard.UnknownModel, match="no network"):
        regard.load("readr")
    assert asked == ["readr"]


def test_a_folder_with_a_name_near_a_zoo_model(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["gpt2"], tmp_path / "readers")
    monkeypatch.chdir(tmp_path)
    assert regard.load("readers").model.config.model_type == "gpt2"
