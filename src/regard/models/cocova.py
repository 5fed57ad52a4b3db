"""A chain of thoughts in vectors between prompt and answer, of which each reads the image tokens that the last picked.

Ma et al., CoCoVa: Chain of Continuous Vision-Language Thought for Latent Space Reasoning (arXiv:2511.02360). A latent
Q-Former runs K rounds with the same weights. In each, the thought picks image tokens, attends to them and to the text,
and is updated by a gate; the K thoughts stand in the language model's input after the prompt, in place of a written
chain. Contrast with picture and text, and a denoiser of the picture's latent, tie thoughts to both.

No code was found, and only summaries of the text were at hand: that a thought starts from the mean of the prompt's
states, that kept values are multiplied by the sigmoid of their scores, the form of gate and update, and the weights of
the losses are our reading. Deviations: a fixed number of rounds, without the early stop; the stages of training and
low-rank adapters are left to who trains.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ..objectives._contrast import both_ways


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of a `LatentQFormer`."""

    dim: int  # of thoughts, image tokens and text states
    rounds: int = 4  # 0: none, and the language model answers at once
    thoughts: int = 1  # vectors a round
    keep: int = 16  # image tokens that a round reads
    heads: int = 4


class Thoughts(NamedTuple):
    """What each round came to, and the image tokens that it read."""

    states: Tensor  # [batch, round, thought, dim]
    selected: Tensor  # the highest score first [batch, round, token]


def select(scores: Tensor, keep: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `keep` tokens that score highest for any thought, and the sigmoid of their scores. [batch, token] twice

    scores: [batch, thought, token]; mask: boolean [batch, token], False where a row is filled up. Gradients reach the
    scores by the sigmoid alone. ValueError where a row has fewer tokens.

    >>> import torch
    >>> from regard.models.cocova import select
    >>> select(torch.tensor([[[0.0, 3.0, -1.0], [2.0, 1.0, -1.0]]]), 2)
    (tensor([[1, 0]]), tensor([[0.9526, 0.8808]]))
    """
    least = scores.shape[-1] if mask is None else min([*mask.sum(1).tolist(), scores.shape[-1]])
    if not 1 <= keep <= least:
        raise ValueError(f"select: keep is 1 up to the number of image tokens, {least}; got {keep}")
    best = scores.amax(1)
    if mask is not None:
        best = best.masked_fill(~mask, -torch.inf)
    values, indices = best.topk(keep, dim=-1)
    return indices, values.sigmoid()


class LatentQFormer(nn.Module, PyTorchModelHubMixin):
    """Rounds of picking image tokens, looking at these and at the text, and updating the thought by a gate.

    `regard.record` sees three stacks, each round as a layer: the thoughts among each other, on the image tokens that
    were picked, the highest score first, and on the text.

    >>> import torch
    >>> from regard.models.cocova import LatentConfig, LatentQFormer
    >>> former = LatentQFormer(LatentConfig(dim=16, rounds=3, keep=4))
    >>> found = former(torch.randn(2, 9, 16), torch.randn(2, 5, 16))
    >>> found.states.shape, found.selected.shape
    (torch.Size([2, 3, 1, 16]), torch.Size([2, 3, 4]))
    """

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = c = config
        if min(c.dim, c.thoughts, c.keep, c.heads) < 1 or c.rounds < 0 or c.dim % c.heads:
            raise ValueError(f"LatentQFormer: sizes are 1 or more, rounds 0 or more, heads divide dim; got {c}")
        self.queries, self.start = nn.Parameter(0.02 * torch.randn(c.thoughts, c.dim)), nn.Linear(c.dim, c.dim)
        self.ask, self.offer = nn.Linear(c.dim, c.dim, bias=False), nn.Linear(c.dim, c.dim, bias=False)
        self.among, self.on_image, self.on_text = (
            nn.MultiheadAttention(c.dim, c.heads, batch_first=True) for _ in range(3)
        )
        self.on_image.is_cross_attention = self.on_text.is_cross_attention = True  # type: ignore[assignment]
        self.norm, self.norm_found = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.gate = nn.Linear(3 * c.dim, c.dim)
        self.mlp = nn.Sequential(nn.Linear(c.dim, 4 * c.dim), nn.GELU(), nn.Linear(4 * c.dim, c.dim))

    def forward(
        self, image: Tensor, text: Tensor, *, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Thoughts:
        """image [batch, token, dim], text [batch, token, dim]; masks: boolean [batch, token], False for filling.

        ValueError for other shapes, and where a row has fewer image tokens than are kept, or no text.
        """
        c = self.config
        given = {"image": (image, image_mask), "text": (text, text_mask)}
        for name, (x, mask) in given.items():
            if x.ndim != 3 or x.shape[-1] != c.dim or len(x) != len(image):
                raise ValueError(f"LatentQFormer: {name} is [batch, token, {c.dim}]; got {list(x.shape)}")
            if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
                raise ValueError(f"LatentQFormer: a mask of {name} is boolean {list(x.shape[:2])}")
        if not text.shape[1] or (text_mask is not None and not text_mask.any(1).all()):
            raise ValueError("LatentQFormer: each row has a word of text or more")
        if image_mask is not None:
            image = image.masked_fill(~image_mask[..., None], 0.0)  # a weight of 0 does not stop a NaN
        if text_mask is not None:
            text = text.masked_fill(~text_mask[..., None], 0.0)
        there = image.new_ones(text.shape[:2]) if text_mask is None else text_mask.to(text)
        mean = (text * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        thought = self.queries + self.start(mean)[:, None]
        hidden = None if text_mask is None else ~text_mask
        states, selected, offered = [], [], self.offer(image)
        for _ in range(c.rounds):
            scores = self.ask(thought) @ offered.mT * c.dim**-0.5
            indices, factors = select(scores, c.keep, image_mask)
            selected.append(indices)
            picked = image.gather(1, indices[..., None].expand(-1, -1, c.dim))
            asked = self.norm(thought + self.among(thought, thought, thought)[0])
            seen = self.on_image(asked, picked, picked * factors[..., None])[0]
            read = self.on_text(asked, text, text, key_padding_mask=hidden)[0]
            gate = self.gate(torch.cat([thought, seen, read], -1)).sigmoid()
            thought = gated(thought, self.mlp(self.norm_found(seen + read)), gate)
            states.append(thought)
        if not states:
            return Thoughts(image.new_empty(len(image), 0, c.thoughts, c.dim), offered.new_empty(len(image), 0, c.keep))
        return Thoughts(torch.stack(states, 1), torch.stack(selected, 1))


def gated(old: Tensor, new: Tensor, gate: Tensor) -> Tensor:
    """The share `gate` of what was, the rest of what is new; elementwise.

    >>> import torch
    >>> from regard.models.cocova import gated
    >>> gated(torch.tensor(2.0), torch.tensor(0.0), torch.tensor(0.75))
    tensor(1.5000)
    """
    return gate * old + (1 - gate) * new


class Reasoned(NamedTuple):
    """Logits of each word of the answer, and of one more, and the thoughts before them."""

    logits: Tensor  # [batch, answer + 1, word]
    thoughts: Thoughts


class CoCoVa(nn.Module):
    """A language model of transformers whose prompt is followed by thoughts, and these by the answer.

    language: a causal one, such as LlamaForCausalLM, or a LLaVA, of which its decoder and head are used; config: its
    dim is the model's. The thoughts read the last hidden states of the prompt's words, and image tokens as they enter.
    Keep it by `state_dict`.
    """

    def __init__(self, language: Any, config: LatentConfig) -> None:
        super().__init__()
        if not hasattr(language, "lm_head") or not hasattr(language, "model"):
            raise TypeError(
                f"CoCoVa: takes a causal language model with `model` and `lm_head`; got {type(language).__name__}"
            )
        width = language.config.get_text_config().hidden_size
        if width != config.dim:
            raise ValueError(f"CoCoVa: thoughts are as wide as the language model, {width}; got {config.dim}")
        self.language, self.former = language, LatentQFormer(config)
        self.read = nn.Linear(config.dim, config.dim)

    def forward(
        self, embeds: Tensor, image: Tensor, answers: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Reasoned:
        """embeds: of the prompt [batch, token, dim]; image: boolean [batch, token], True for image tokens; answers: ids
        [batch, answer]; mask: boolean [batch, token], False for padding, which is on the left.

        Position i of the logits is to say word i of the answer. ValueError where a row ends in padding.
        """
        thoughts, after, mask, cache, first = self._prompted(embeds, image, mask)
        told = after if answers is None else torch.cat([after, self.language.get_input_embeddings()(answers)], 1)
        if not told.shape[1]:
            return Reasoned(first, thoughts)
        logits = self.language.lm_head(self._decoded(told, mask, cache).last_hidden_state)
        return Reasoned(torch.cat([first, logits], 1)[:, after.shape[1] :], thoughts)

    @torch.no_grad()
    def answer(self, embeds: Tensor, image: Tensor, words: int, *, mask: Tensor | None = None) -> Tensor:
        """The likeliest words one after another, after the thoughts. [batch, word]"""
        _, told, mask, cache, logits = self._prompted(embeds, image, mask)
        said: list[Tensor] = []
        while len(said) < words:
            if told.shape[1]:
                logits = self.language.lm_head(self._decoded(told, mask, cache).last_hidden_state[:, -1:])
                mask = F.pad(mask, (0, told.shape[1]), value=True)
            said.append(logits.argmax(-1))
            told = self.language.get_input_embeddings()(said[-1])
        return torch.cat(said, 1) if said else image.new_empty(len(image), 0, dtype=torch.long)

    def _prompted(
        self, embeds: Tensor, image: Tensor, mask: Tensor | None
    ) -> tuple[Thoughts, Tensor, Tensor, Any, Tensor]:
        """Thoughts, these as embeddings [batch, token, dim], the mask, the cache, and logits of the last word."""
        mask = torch.ones_like(image) if mask is None else mask
        if not (image.shape == mask.shape == embeds.shape[:2]) or {image.dtype, mask.dtype} != {torch.bool}:
            raise ValueError(
                f"CoCoVa: image and mask are boolean {list(embeds.shape[:2])}; got {image.dtype} {list(image.shape)}, "
                f"{mask.dtype} {list(mask.shape)}"
            )
        if not mask[:, -1].all():
            raise ValueError("CoCoVa: prompts are padded on the left, as the answer comes next; a row ends in padding")
        found = self._decoded(embeds, mask, None)
        if found.past_key_values is None:
            raise ValueError(
                "CoCoVa: the language model keeps no cache, which thoughts and answer are read with; switch activation "
                "checkpointing off"
            )
        hidden = found.last_hidden_state
        seen, seen_mask = _gathered(embeds, image & mask)
        words, words_mask = _gathered(hidden, ~image & mask)
        thoughts = self.former(seen, words, image_mask=seen_mask, text_mask=words_mask)
        return (
            thoughts,
            self.read(thoughts.states.flatten(1, 2)),
            mask,
            found.past_key_values,
            self.language.lm_head(hidden[:, -1:]),
        )

    def _decoded(self, embeds: Tensor, mask: Tensor, cache: Any) -> Any:
        """mask: of the prompt, or, with a cache, of what is in it. [batch, token]"""
        mask = mask if cache is None else F.pad(mask, (0, embeds.shape[1]), value=True)
        decoder = getattr(self.language.model, "language_model", self.language.model)
        return decoder(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1)[:, -embeds.shape[1] :].clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )


def _gathered(states: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Those states alone, first come first, filled up to the most of a row, and which are there."""
    order = (~where).long().argsort(dim=1, stable=True)[:, : int(where.sum(1).max()) if len(where) else 0]
    return states.gather(1, order[..., None].expand(-1, -1, states.shape[-1])), where.gather(1, order)


def prompt(llava: LlavaForConditionalGeneration, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of a LLaVA's prompt with its pictures in place, and which are of pictures: what `CoCoVa` takes.

    ValueError where the prompt has another number of image tokens than the pictures.
    """
    model, place = cast(Any, llava.model), input_ids == llava.config.image_token_id
    found = model.get_image_features(pixel_values=pixel_values, return_dict=True)
    features = torch.cat(list(found.pooler_output))
    if int(place.sum()) != len(features):
        raise ValueError(f"cocova: {int(place.sum())} image tokens for {len(features)} of the pictures")
    embeds = model.get_input_embeddings()(input_ids)
    return embeds.masked_scatter(place[..., None], features.to(embeds)), place


def thought_contrast(thoughts: Tensor, image: Tensor, text: Tensor, *, temperature: float = 0.07) -> Tensor:
    """How badly the mean thought finds its own picture, and its own text, in the batch, and these find it; 0 or more.

    thoughts: [batch, round, thought, dim]; image, text: an embedding of each row [batch, dim]. The mean of both
    InfoNCE losses, each of both directions; by cosines. ValueError below two rows.
    """
    if len(thoughts) < 2 or temperature <= 0:
        raise ValueError(f"thought_contrast: two rows or more, temperature above 0; got {len(thoughts)}, {temperature}")
    own_shape = (len(thoughts), thoughts.shape[-1])
    if thoughts.ndim != 4 or 0 in thoughts.shape or not image.shape == text.shape == own_shape:
        raise ValueError(
            f"thought_contrast: thoughts [batch, round, thought, dim], of a round or more, image, text [batch, dim]; "
            f"got {list(thoughts.shape)}, {list(image.shape)} and {list(text.shape)}"
        )
    mean, *others = (F.normalize(x, dim=-1) for x in (thoughts.mean((1, 2)), image, text))
    return torch.stack([both_ways(mean @ other.mT / temperature) for other in others]).mean()


class ThoughtDiffusion(nn.Module):
    """A small denoiser of a picture's latent, told the last thought: its loss falls as the thought holds the picture.

    latent: numbers of a picture's latent; steps: of noise, by the linear schedule of DDPM.
    """

    alphas: Tensor

    def __init__(self, dim: int, latent: int, *, hidden: int = 256, steps: int = 1000) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"ThoughtDiffusion: steps are 1 or more, got {steps}")
        self.net = nn.Sequential(nn.Linear(latent + dim + 1, hidden), nn.GELU(), nn.Linear(hidden, latent))
        self.register_buffer("alphas", (1 - torch.linspace(1e-4, 0.02, steps)).cumprod(0), persistent=False)

    def forward(self, thoughts: Tensor, latents: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the noise. thoughts [batch, round, thought, dim], latents [batch, latent]"""
        if not thoughts.shape[1]:
            raise ValueError("ThoughtDiffusion: there is no thought, as there was no round")
        step = torch.randint(len(self.alphas), (len(latents),), generator=generator, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        share = self.alphas[step, None].to(latents)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        told = torch.cat([noisy, thoughts[:, -1].mean(1), (step[:, None] / len(self.alphas)).to(noisy)], -1)
        return F.mse_loss(self.net(told), noise)


def cocova(llava: LlavaForConditionalGeneration, **sizes: Any) -> CoCoVa:
    """This LLaVA's language model, followed by an untrained latent Q-Former; `prompt` makes what it takes.

    sizes: fields of `LatentConfig` but `dim`, which is the model's. TypeError for other models.
    """
    if not isinstance(llava, LlavaForConditionalGeneration):
        raise TypeError(f"cocova: takes a LlavaForConditionalGeneration; got {type(llava).__name__}")
    return CoCoVa(llava, LatentConfig(cast(Any, llava.config).text_config.hidden_size, **sizes))
