"""The listener that ships does what its card says; its training resumes where it stopped."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.io import wavfile
from typer.testing import CliRunner

import regard
from regard import zoo
from regard.cli import app
from regard.evaluation.word_error import word_error_rate
from regard.zoo.recipes import listener

DATA = os.environ.get("REGARD_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="REGARD_DATA names no folder with the spoken digits")


def tone(seconds: float, rate: int = 8000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_what_was_measured_is_good_enough():
    card = zoo.measured("listener")["abilities"]
    assert card["held_speakers_word_error"] < 0.15
    assert card["held_takes_word_error"] < 0.02
    assert card["alignment"] > 3 * card["alignment_even"]


@needs_data
def test_it_hears_digits_and_looks_at_them():
    card = zoo.measured("listener")["abilities"]
    model, processor = zoo.load("listener")
    strings, rng = listener.Strings(Path(str(DATA)), speakers="takes"), np.random.default_rng(77)
    found = [strings.draw(rng, changed=False) for _ in range(40)]
    said, heard = [s.text for s in found], listener.transcribe(model, processor, found)
    assert word_error_rate(said, heard) < card["held_takes_word_error"] + 0.08
    looks = listener._alignment(model, processor, found)
    assert looks["alignment"] > 0.8 * card["alignment"]
    assert looks["alignment"] > 3 * looks["alignment_even"]


@needs_data
def test_what_is_held_out_is():
    split = {name: listener.Strings(Path(str(DATA)), speakers=name) for name in ("known", "takes", "held")}
    assert split["held"].speakers == sorted(listener.HELD_SPEAKERS)
    assert split["known"].speakers == split["takes"].speakers
    assert not set(split["known"].speakers) & set(listener.HELD_SPEAKERS)
    sizes = {name: sum(map(len, strings.clips.values())) for name, strings in split.items()}
    assert sizes == {"known": 400, "takes": 80, "held": 240}


def test_a_model_from_the_zoo_generates():
    model, processor = regard.load("listener")
    assert type(model).__name__ == "WhisperForConditionalGeneration"
    assert type(processor).__name__ == "WhisperProcessor"
    assert model.dtype == torch.float32
    features = processor([tone(2, 16_000)] * 2, sampling_rate=16_000, return_tensors="pt").input_features
    assert features.shape == (2, listener.MELS, 2 * listener.POSITIONS)
    with torch.inference_mode(), regard.record(model, "rows", processor=processor) as recording:
        ids = model.generate(features, max_new_tokens=4, min_new_tokens=4)
    assert ids.shape == (2, 4)
    cross = recording.tree["decoder_cross"]
    assert cross["rows"].dims == ("batch", "layer", "head", "query", "key")
    assert cross["rows"].shape[:3] + cross["rows"].shape[4:] == (2, 2, listener.HEADS, listener.POSITIONS)
    assert torch.allclose(torch.tensor(cross["rows"].sum("key").values), torch.tensor(1.0), atol=1e-4)
    assert list(cross["key_token"].values[1, :3]) == ["0.00 s", "0.04 s", "0.08 s"]
    assert cross["key_token"].values[0, -1] == "3.96 s"


def test_words_are_single_tokens():
    _, processor = regard.load("listener")
    tokenizer = processor.tokenizer
    ids = tokenizer(" ".join(listener.DIGITS))["input_ids"]
    start, plain = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    assert ids == [start, plain, *range(10), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == " ".join(listener.DIGITS)


def test_what_the_decoder_is_to_write():
    _, processor = regard.load("listener")
    silence = np.zeros(1, np.float32)
    found = [listener.Spoken(silence, [3, 0], [(0.1, 0.5), (1, 1.2)]), listener.Spoken(silence, [7], [(2.0, 2.2)])]
    plain, end = processor.tokenizer.convert_tokens_to_ids(["<|notimestamps|>", "<|endoftext|>"])
    labels = listener._labels(processor.tokenizer, found)
    assert labels.tolist() == [[plain, 3, 0, end, *[-100] * 4], [plain, 7, end, *[-100] * 5]]
    digit, place = listener._spoken_at(found)
    assert digit[0].tolist() == [*[-100] * 2, *[3] * 10, *[-100] * 13, *[0] * 5, *[-100] * 70]
    assert place[0].unique(return_counts=True)[1].tolist() == [85, 10, 5]
    assert place[1].max() == 0


def test_look(tmp_path):
    wavfile.write(tmp_path / "tone.wav", 8000, tone(1.5))
    arguments = ["look", "listener", "--audio", str(tmp_path / "tone.wav"), "--generate", "3"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    tree = regard.open(tmp_path / "out" / "recording.zarr").tree
    assert set(tree.children) == {"encoder", "decoder", "decoder_cross"}
    assert list(tree["decoder_cross"]["key_token"].values[0, 10:12]) == ["0.40 s", "0.44 s"]
    assert set(tree["decoder_cross"]["key_role"].values[0]) == {"frame"}
    assert list(tree["decoder"]["query_role"].values[0, :2]) == ["bos", "special"]


@pytest.mark.parametrize(
    ("model", "seconds", "arguments", "message"),
    [
        ("listener", None, [], "give it a sound, a WAV file, with --audio"),
        ("listener", None, ["--text", "one"], "give it a sound, a WAV file, with --audio"),
        ("listener", 1, ["--text", "one"], "listens only"),
        ("listener", 5, [], "lasts 5.0 s, but listener listens to 4 s at once"),
        ("namer", 1, [], "takes input_ids, and no sound"),
    ],
)
def test_look_says_what_is_wrong(tmp_path, model, seconds, arguments, message):
    if seconds:
        wavfile.write(tmp_path / "tone.wav", 8000, tone(seconds))
        arguments = [*arguments, "--audio", str(tmp_path / "tone.wav")]
    done = CliRunner().invoke(app, ["look", model, *arguments, "--out", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def clips(folder: Path) -> Path:
    """Tones as clips of digits, by one speaker in training and one held out."""
    home = folder / "audio_fsdd"
    home.mkdir(parents=True)
    with zipfile.ZipFile(home / "recordings.zip", "w") as archive:
        for speaker, take in (("ann", 0), ("ann", 11), ("theo", 0)):
            for digit in range(10):
                written = io.BytesIO()
                samples = np.sin(np.arange(2400) * (0.2 + 0.1 * digit + 0.01 * take))
                wavfile.write(written, 8000, (samples * 2**14).astype("i2"))
                archive.writestr(f"{digit}_{speaker}_{take}.wav", written.getvalue())
    return folder


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    data = clips(tmp_path / "data")
    for name, value in {"STEPS": 4, "BATCH": 2, "WIDTH": 64, "HEADS": 2}.items():
        monkeypatch.setattr(listener, name, value)
    monkeypatch.setattr("regard.zoo.training.CHECKPOINT", 2)
    listener.train(tmp_path / "whole", data=data, seed=0)
    vary, calls = listener._varied, []

    def stopping(features):
        calls.append(features)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return vary(features)

    monkeypatch.setattr(listener, "_varied", stopping)
    with pytest.raises(KeyboardInterrupt):
        listener.train(tmp_path / "stopped", data=data, seed=0)
    monkeypatch.setattr(listener, "_varied", vary)
    listener.train(tmp_path / "stopped", data=data, seed=0)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    monkeypatch.setattr(listener, "MEASURED", 3)
    found = listener.measure(*regard.load(tmp_path / "whole"), data=data)
    assert set(listener.TOLERANCE) <= set(found)
    with pytest.raises(ValueError, match="REGARD_DATA"):
        listener.train(tmp_path / "none")


def test_a_string_is_where_it_says(tmp_path):
    strings = listener.Strings(clips(tmp_path), speakers="held")
    assert strings.speakers == ["theo"]
    for i in range(20):
        drawn = strings.draw(np.random.default_rng(i), changed=False)
        assert drawn.sound.shape == (listener.SECONDS * listener.RATE,)
        assert 1 <= len(drawn.digits) == len(drawn.intervals) <= listener.LONGEST
        assert drawn.text.split() == [listener.DIGITS[d] for d in drawn.digits]
        loud = np.zeros(len(drawn.sound), bool)
        for a, b in drawn.intervals:
            loud[round(a * listener.RATE) : round(b * listener.RATE)] = True
        assert np.square(drawn.sound[loud]).mean() > 100 * np.square(drawn.sound[~loud]).mean()
        assert all(b <= a for (_, b), (a, _) in zip(drawn.intervals, drawn.intervals[1:]))


def test_even_attention_is_aligned_by_its_share(tmp_path):
    strings = listener.Strings(clips(tmp_path), speakers="held")
    found = [strings.draw(np.random.default_rng(i), changed=False) for i in range(8)]
    model, processor = regard.load("listener")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.q_proj.weight.zero_()
            layer.encoder_attn.q_proj.bias.zero_()
    looks = listener._alignment(model, processor, found)
    seconds = [b - a for string in found for a, b in string.intervals]
    assert looks["alignment_even"] == pytest.approx(np.mean(seconds) / listener.SECONDS, abs=1e-4)
    assert looks["alignment"] == pytest.approx(looks["alignment_even"], abs=2e-4)
