"""Answers about the talker whom a listener follows: neural signals say which kind of voice, and nothing else.

Jiang et al., AAD-LLM: Neural Attention-Driven Auditory Scene Understanding (arXiv:2502.16794). Voices fall into a few
kinds by K-means of speaker vectors. A recurrent decoder reads the kind of the attended voice from a recording; that
kind's centroid goes, as one token, ahead of both separated streams into a language model, which writes first what kinds
the streams are and which is attended, then the answer. The language model learns with true kinds, without recordings;
the decoder learns by itself.

No code was at hand but a README. Ours: sizes; the language model is a small Llama and the ear a small Whisper encoder
of transformers, trained from scratch (Qwen2-Audio with LoRA in the paper); streams come separated (Mamba-TasNet in the
paper), and the mixture itself is no further input. Where both talkers are of one kind the token cannot tell them apart.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..extras import needs


class VoiceKinds(nn.Module):
    """Kinds of voices, each with a centroid. [kind, dim]

    >>> import torch
    >>> from regard.models.aad import VoiceKinds
    >>> kinds = VoiceKinds(torch.tensor([[0.0], [4.0]]))
    >>> kinds.kind(torch.tensor([[1.0], [3.5]])).tolist()
    [0, 1]
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        fits = centroids.ndim == 2 and centroids.numel() and centroids.is_floating_point()
        if not fits or not centroids.isfinite().all():
            raise ValueError(
                f"VoiceKinds: centroids are finite numbers [kind, dim], one or more; got {centroids.dtype} "
                f"{list(centroids.shape)}"
            )
        self.register_buffer("centroids", centroids)

    @classmethod
    def fit(cls, vectors: Tensor, *, kinds: int = 8, seed: int = 0) -> VoiceKinds:
        """By K-means of speaker vectors [voice, dim]. Needs scikit-learn.

        ValueError for fewer voices than kinds, and for vectors that are not finite.
        """
        with needs("aad", "claims"):
            from sklearn.cluster import KMeans
        if vectors.ndim != 2 or not vectors.isfinite().all():
            raise ValueError(f"VoiceKinds: vectors are finite numbers [voice, dim]; got {list(vectors.shape)}")
        if not 1 <= kinds <= len(vectors):
            raise ValueError(f"VoiceKinds: as many kinds as there are voices at most; got {kinds} of {len(vectors)}")
        given = vectors.detach().cpu().float().numpy()
        found = KMeans(n_clusters=kinds, n_init=5, random_state=seed).fit(given)  # type: ignore[arg-type]
        centroids = torch.from_numpy(found.cluster_centers_).to(vectors.device)
        return cls(centroids.to(vectors.dtype) if vectors.is_floating_point() else centroids)

    def kind(self, vectors: Tensor) -> Tensor:
        """The nearest centroid. [..., dim] -> [...]; ValueError for vectors that are of no kind, being not finite."""
        if not vectors.ndim or vectors.shape[-1] != self.centroids.shape[1] or not vectors.isfinite().all():
            raise ValueError(
                f"VoiceKinds: vectors are finite numbers [..., {self.centroids.shape[1]}]; got {list(vectors.shape)}"
            )
        flat = vectors.reshape(-1, vectors.shape[-1])
        return torch.cdist(flat.float(), self.centroids.float()).argmin(-1).view(vectors.shape[:-1])


class IntentionDecoder(nn.Module):
    """Which kind of voice is attended, from a recording. [batch, time, electrode] -> [batch, kind]

    A bidirectional LSTM; the mean of its states over time is read. window: the fewest samples that it takes.
    ValueError for a shorter recording, and one that is not finite, which would be taken for the first kind.

    >>> import torch
    >>> from regard.models.aad import IntentionDecoder
    >>> IntentionDecoder(24, 8)(torch.randn(2, 96, 24)).shape
    torch.Size([2, 8])
    """

    def __init__(self, electrodes: int, kinds: int, *, hidden: int = 64, window: int = 32) -> None:
        super().__init__()
        self.window, self.electrodes = window, electrodes
        self.lstm = nn.LSTM(electrodes, hidden, batch_first=True, bidirectional=True)
        self.read = nn.Linear(2 * hidden, kinds)

    def forward(self, recording: Tensor) -> Tensor:
        if recording.ndim != 3 or recording.shape[-1] != self.electrodes or recording.shape[1] < self.window:
            raise ValueError(
                f"IntentionDecoder: a recording is [batch, time, {self.electrodes}] of {self.window} samples or more; "
                f"got {list(recording.shape)}"
            )
        if not recording.isfinite().all():
            raise ValueError("IntentionDecoder: a recording holds values that are not finite; cut them out first")
        return self.read(self.lstm(recording)[0].mean(1))


class AttendedAnswerer(nn.Module):
    """Writes words about two streams, after a token that says which kind of voice is meant.

    bands, frames: of a stream's spectrogram, frames even; voice: length of a kind's centroid; words: how many ids;
    width, layers, heads: of both the ear and the language model, an even number of channels a head.
    `regard.record` sees the layers of the language model and of the ear.

    >>> import torch
    >>> from regard.models.aad import AttendedAnswerer
    >>> answerer = AttendedAnswerer(bands=20, frames=24, voice=6, words=30)
    >>> answerer(torch.randn(2, 2, 20, 24), torch.randn(2, 6), torch.ones(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 30])
    """

    def __init__(
        self,
        *,
        bands: int,
        frames: int,
        voice: int,
        words: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if frames < 2 or frames % 2:
            raise ValueError(f"AttendedAnswerer: the ear takes an even number of frames, 2 or more; got {frames}")
        if heads < 1 or width < 1 or width % (2 * heads):
            raise ValueError(f"AttendedAnswerer: heads have an even number of channels; got {width} for {heads} heads")
        ear = WhisperConfig(
            num_mel_bins=bands,
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=heads,
            encoder_ffn_dim=2 * width,
            max_source_positions=frames // 2,
            dropout=0.0,
        )
        language = LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            initializer_range=width**-0.5 / 2,
        )
        self.stream, self.voice, self.words = (bands, frames), voice, words
        self.ear, self.language = WhisperEncoder(ear), LlamaForCausalLM(language)
        self.speaker, self.place = nn.Linear(voice, width), nn.Embedding(2, width)

    def forward(self, streams: Tensor, intention: Tensor, words: Tensor) -> Tensor:
        """What comes after each word. [batch, token, word]

        streams: [batch, 2, band, frame], in any order; intention: the centroid of the attended kind [batch, voice];
        words: ids of the question, the chain and the answer so far [batch, token], one or more. One row or more.
        """
        if streams.ndim != 4 or not len(streams) or tuple(streams.shape[1:]) != (2, *self.stream):
            raise ValueError(
                f"AttendedAnswerer: takes two talkers, streams [batch, 2, {self.stream[0]}, {self.stream[1]}] of one "
                f"row or more; got {list(streams.shape)}"
            )
        rows = len(streams)
        if intention.shape != (rows, self.voice) or words.ndim != 2 or len(words) != rows or not words.shape[1]:
            raise ValueError(
                f"AttendedAnswerer: each of {rows} rows has an intention of {self.voice}, and words, one or more; got "
                f"{list(intention.shape)} and {list(words.shape)}"
            )
        if not 0 <= int(words.min()) <= int(words.max()) < self.words:
            raise ValueError(f"AttendedAnswerer: ids of words are 0 to {self.words - 1}; got {words.tolist()}")
        heard = self.ear(streams.flatten(0, 1)).last_hidden_state.unflatten(0, (-1, 2))
        heard = (heard + self.place.weight[:, None]).flatten(1, 2)
        said = self.language.get_input_embeddings()(words)
        tokens = torch.cat([self.speaker(intention)[:, None], heard, said], 1)
        return self.language(inputs_embeds=tokens).logits[:, -words.shape[1] :]

    def loss(self, streams: Tensor, intention: Tensor, words: Tensor, *, prompt: int) -> Tensor:
        """Cross entropy of the words after the first `prompt`, the question: of chain and answer. Scalar"""
        if not 1 <= prompt < words.shape[1]:
            raise ValueError(f"AttendedAnswerer: a prompt leaves one of {words.shape[1]} words or more; got {prompt}")
        logits = self(streams, intention, words[:, :-1])[:, prompt - 1 :]
        return F.cross_entropy(logits.mT, words[:, prompt:])

    @torch.no_grad()
    def write(self, streams: Tensor, intention: Tensor, prompt: Tensor, length: int) -> Tensor:
        """The likeliest words after a prompt [batch, token], one by one. [batch, length]"""
        words = prompt
        for _ in range(length):
            words = torch.cat([words, self(streams, intention, words)[:, -1:].argmax(-1)], 1)
        return words[:, prompt.shape[1] :]


class Aad(nn.Module, PyTorchModelHubMixin):
    """All parts. What is read from a recording reaches the answer as one of a few centroids.

    kinds: how many; electrodes: of a recording; sizes: those of `AttendedAnswerer`. Kinds are those of
    `kinds.centroids`, to be set from `VoiceKinds.fit`.

    >>> import torch
    >>> from regard.models.aad import aad
    >>> model = aad(kinds=4, electrodes=24, bands=20, frames=24, voice=6, words=30).eval()
    >>> recording, streams = torch.randn(1, 96, 24), torch.randn(1, 2, 20, 24)
    >>> model.write(streams, recording, torch.ones(1, 1, dtype=torch.long), 3).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        *,
        electrodes: int,
        bands: int,
        frames: int,
        voice: int,
        words: int,
        kinds: int = 8,
        hidden: int = 64,
        window: int = 32,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.kinds = VoiceKinds(torch.zeros(kinds, voice))
        self.decoder = IntentionDecoder(electrodes, kinds, hidden=hidden, window=window)
        sizes = {"bands": bands, "frames": frames, "voice": voice, "words": words}
        self.answerer = AttendedAnswerer(**sizes, width=width, layers=layers, heads=heads)

    def attend(self, recording: Tensor) -> Tensor:
        """The centroid of the likeliest kind; no gradient passes. [batch, time, electrode] -> [batch, voice]

        ValueError where there are more or fewer centroids than kinds that the decoder knows.
        """
        if len(self.kinds.centroids) != self.decoder.read.out_features:
            raise ValueError(
                f"Aad: the decoder knows {self.decoder.read.out_features} kinds, and there are "
                f"{len(self.kinds.centroids)} centroids; fit as many, or make it with kinds={len(self.kinds.centroids)}"
            )
        return self.kinds.centroids[self.decoder(recording).argmax(-1)]

    def forward(self, streams: Tensor, recording: Tensor, words: Tensor) -> Tensor:
        """As `AttendedAnswerer`, with what the recording says. [batch, token, word]"""
        return self.answerer(streams, self.attend(recording), words)

    def write(self, streams: Tensor, recording: Tensor, prompt: Tensor, length: int) -> Tensor:
        """As `AttendedAnswerer.write`, with what the recording says. [batch, length]"""
        return self.answerer.write(streams, self.attend(recording), prompt, length)


def aad(**sizes: Any) -> Aad:
    """An untrained `Aad` of these sizes."""
    return Aad(**sizes)
