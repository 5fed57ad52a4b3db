"""Sound from WAV files: any width, rate and number of channels, and clear errors for the rest."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.io import wavfile

from regard.cli import sound


def test_whole_numbers_and_floats_are_the_same_sound(tmp_path):
    wave = np.array([0, 0.5, -0.5, -1, 0.25])
    kinds = {
        "u1": np.round(wave * 128 + 128).astype("u1"),
        "i2": (wave * 2**15).astype("i2"),
        "i4": (wave * 2**31).astype("i4"),
        "f4": wave.astype("f4"),
        "f8": wave,
    }
    for kind, samples in kinds.items():
        wavfile.write(tmp_path / f"{kind}.wav", 8000, samples)
        read = sound.read(tmp_path / f"{kind}.wav")
        assert read.rate == 8000
        assert read.wave.dtype == np.float32
        assert read.wave.tolist() == wave.tolist(), kind
        assert read.seconds == 5 / 8000


def test_channels_are_mixed(tmp_path):
    wavfile.write(tmp_path / "stereo.wav", 8000, np.array([[2**14, 0], [-(2**14), -(2**14)]], "i2"))
    assert sound.read(tmp_path / "stereo.wav").wave.tolist() == [0.25, -0.5]


def test_a_tone_stays_itself_at_another_rate():
    for rate in (8000, 44_100, 48_000):
        tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
        at = sound.Sound(tone, rate).at(16_000)
        assert len(at) == 16_000
        assert at.dtype == np.float32
        wanted = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
        assert np.abs(at - wanted)[800:-800].max() < 0.01
    high = np.sin(2 * np.pi * 15_000 * np.arange(48_000) / 48_000).astype(np.float32)
    assert np.abs(sound.Sound(high, 48_000).at(16_000))[800:-800].max() < 0.01  # what 16 kHz cannot hold is gone
    same = sound.Sound(tone, 48_000)
    assert same.at(48_000) is tone


def test_bad_files_are_named(tmp_path, monkeypatch):
    wavfile.write(tmp_path / "empty.wav", 8000, np.array([], "i2"))
    wavfile.write(tmp_path / "nan.wav", 8000, np.array([0, np.nan], "f4"))
    wavfile.write(tmp_path / "whole.wav", 8000, np.zeros(100, "i2"))
    (tmp_path / "text.wav").write_text("no sound at all")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "whole.wav").read_bytes()[:30])
    for name, message in (
        ("empty.wav", "holds no sound"),
        ("nan.wav", "not finite"),
        ("text.wav", "not a WAV file that can be read"),
        ("cut.wav", "not a WAV file that can be read"),
        ("nowhere.wav", "No such file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            sound.read(tmp_path / name)
        assert name in str(caught.value)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(ValueError, match=r"pip install"):
        sound.read(tmp_path / "whole.wav").at(16_000)
