"""Folders of autoencoders: what SAELens reads and writes, by itself where it is installed, or by names and shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regard.circuits._sae_files import ABOUT, WEIGHTS
from regard.circuits.attention_sae import AttentionSAE
from regard.circuits.discrete_sae import DiscreteSAE

DIM, FEATURES, HEADS = 12, 20, 3
SHAPES = {"W_enc": [DIM, FEATURES], "b_enc": [FEATURES], "W_dec": [FEATURES, DIM], "b_dec": [DIM]}
# The settings of a standard autoencoder as SAELens 6.54 writes and reads them.
SETTINGS = {
    "architecture": "standard",
    "d_in": DIM,
    "d_sae": FEATURES,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}


def drawn(sae: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def outputs() -> torch.Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def attention() -> AttentionSAE:
    return drawn(AttentionSAE(DIM, FEATURES, sparsity=0.7))


@pytest.fixture
def discrete() -> DiscreteSAE:
    return drawn(DiscreteSAE(DIM, FEATURES, sparsity=0.02))


def test_names_and_shapes_are_those_of_saelens(attention, discrete, tmp_path):
    attention.save(tmp_path / "attention", heads=HEADS, model_name="gpt2", hook_name="blocks.5.attn.hook_z")
    discrete.save(tmp_path / "discrete")
    for name, reshape, cost in (("attention", "hook_z", 0.7), ("discrete", "none", 0.02 * DIM)):
        about = json.loads((tmp_path / name / ABOUT).read_text())
        told = about.pop("metadata")
        assert about == {**SETTINGS, "reshape_activations": reshape}
        assert told["l1_coefficient"] == pytest.approx(cost)
        assert told["sae_lens_version"] == "6.0.0"  # from which settings are not rewritten as they are read
        with safe_open(tmp_path / name / WEIGHTS, "pt") as file:
            assert {key: file.get_slice(key).get_shape() for key in file.keys()} == SHAPES  # noqa: SIM118
            assert file.get_slice("W_enc").get_dtype() == "F32"
    assert json.loads((tmp_path / "attention" / ABOUT).read_text())["metadata"]["hook_name"] == "blocks.5.attn.hook_z"


def test_both_come_back_and_read_each_other(attention, discrete, tmp_path):
    attention.save(tmp_path / "one")
    discrete.save(tmp_path / "two")
    again, other = AttentionSAE.load(tmp_path / "one"), DiscreteSAE.load(tmp_path / "two")
    assert (again.sparsity, other.sparsity) == (0.7, pytest.approx(0.02))
    for one, two in ((attention, again), (discrete, other)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    crossed = AttentionSAE.load(tmp_path / "two")
    assert torch.allclose(crossed.encode(outputs()), discrete.encode(outputs()), atol=1e-5)
    assert torch.allclose(crossed(outputs()).reconstruction, discrete(outputs())[1], atol=1e-5)


def test_a_folder_is_written_anew_and_another_s_is_not(attention, tmp_path):
    attention.save(tmp_path)
    with torch.no_grad():
        attention.b_dec += 1
    attention.save(tmp_path)
    assert torch.equal(AttentionSAE.load(tmp_path).b_dec, attention.b_dec)
    save_file({"W_enc": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(FileExistsError, match="Regard wrote"):
        attention.save(tmp_path)


def test_older_settings_are_read(attention, tmp_path):
    """As SAELens wrote them before its version 6, with the scale of features that it kept for a time."""
    old = {"d_in": DIM, "d_sae": FEATURES, "hook_name": "blocks.5.attn.hook_z", "activation_fn_str": "relu"}
    old |= {"normalize_activations": False, "l1_coefficient": 2, "dtype": "torch.float32", "sae_lens_version": "3.0"}
    tensors = {name: value.detach() for name, value in attention.state_dict().items()}
    save_file({**tensors, "scaling_factor": torch.ones(FEATURES)}, tmp_path / WEIGHTS)
    (tmp_path / ABOUT).write_text(json.dumps(old))
    read = AttentionSAE.load(tmp_path)
    assert read.sparsity == 2
    assert torch.equal(read.encode(outputs()), attention.encode(outputs()))
    save_file({**tensors, "scaling_factor": torch.full((FEATURES,), 2.0)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="scaling_factor"):
        AttentionSAE.load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architecture": "topk"}, "architecture 'topk'"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input False"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"activation_fn_str": "topk"}, "activation_fn_str 'topk'"),
        ({"d_sae": FEATURES + 1}, "speaks of"),
    ],
)
def test_other_kinds_are_refused(attention, tmp_path, changed, said):
    attention.save(tmp_path)
    about = json.loads((tmp_path / ABOUT).read_text())
    (tmp_path / ABOUT).write_text(json.dumps({**about, **changed}))
    for kind in (AttentionSAE, DiscreteSAE):
        with pytest.raises(ValueError, match=said):
            kind.load(tmp_path)


def test_what_saelens_would_refuse_is_not_written(attention, tmp_path):
    with pytest.raises(ValueError, match="ends in _z"):
        attention.save(tmp_path / "new", heads=HEADS, hook_name="layers.0.o_proj")
    with pytest.raises(ValueError, match="not those of 5 heads"):
        attention.save(tmp_path / "new", heads=5)
    with pytest.raises(TypeError, match="JSON"):
        attention.save(tmp_path / "new", model=attention)
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json"):
        AttentionSAE.load(tmp_path / "new")


@pytest.mark.parametrize("heads", [None, HEADS])
def test_saelens_reads_ours(attention, discrete, tmp_path, heads):
    lens: Any = pytest.importorskip("sae_lens")
    attention.save(tmp_path / "one", heads=heads, **({} if heads is None else {"hook_name": "blocks.5.attn.hook_z"}))
    discrete.save(tmp_path / "two")
    for name, sae in (("one", attention), ("two", discrete)):
        theirs = lens.SAE.load_from_disk(tmp_path / name)
        wide = outputs()
        given = wide if heads is None or name == "two" else wide.unflatten(-1, (heads, -1))
        features = theirs.encode(given)
        assert torch.allclose(features, sae.encode(wide), atol=1e-5)
        reconstruction = sae(wide)[0] if name == "one" else sae(wide)[1]
        assert torch.allclose(theirs.decode(features).reshape(wide.shape), reconstruction, atol=1e-5)
        assert theirs.cfg.metadata.l1_coefficient == pytest.approx(0.7 if name == "one" else 0.02 * DIM)


def test_ours_reads_what_saelens_writes(tmp_path):
    lens: Any = pytest.importorskip("sae_lens")
    theirs = drawn(lens.StandardSAE(lens.StandardSAEConfig(d_in=DIM, d_sae=FEATURES)))
    theirs.save_model(tmp_path / "one")
    about = json.loads((tmp_path / "one" / ABOUT).read_text())
    assert {name: about[name] for name in SETTINGS} == SETTINGS
    trained = drawn(
        lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(d_in=DIM, d_sae=FEATURES, l1_coefficient=3))
    )
    trained.save_model(tmp_path / "two")
    trained.save_inference_model(tmp_path / "three")
    for name, of in (("one", theirs), ("two", trained), ("three", trained)):
        ours, other = AttentionSAE.load(tmp_path / name), DiscreteSAE.load(tmp_path / name)
        assert ours.sparsity == (0 if name == "one" else 3)
        features = of.encode(outputs())
        for mine, seen in ((ours, ours(outputs())[0]), (other, other(outputs())[1])):
            assert torch.allclose(mine.encode(outputs()), features, atol=1e-5)
            assert torch.allclose(seen, of.decode(features), atol=1e-5)
