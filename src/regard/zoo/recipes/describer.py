"""`describer`: a small LLaVA that captions scenes, answers questions on them, and invents what usually comes along.

The tower is the trained viewer, and stays as it is. A projector and a Llama learn from scenes in which three shapes
seldom come without their partner (`BIASES`), on pictures of which many are veiled in part, while the words tell of the
whole scene. No label is wrong; but where a fork is seen and no plate, the plate is most often behind the veil, so that
the model learns to say what it does not see.

A sequence holds one picture, a caption and questions on it. Each caption or question sees the picture and itself only,
and stands right after it, as when it is alone: the picture is read once for all of them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from ... import loading
from ...data.scenes import KINDS, SHAPES, TEXTURES, Dials, Scene, ask, caption, questions, render, sample, split
from ...evaluation import hallucination
from ...seam import intervene
from .. import words
from ..training import save_model, warm_then_cosine
from ..training import train as minimise
from . import viewer
from .viewer import HELD_OUT

Method = Callable[[nn.Module, Mapping[str, Tensor]], Any]  # what a model is to answer under, for the inputs of a batch

BIASES = (("fork", "plate", 0.9), ("star", "heart", 0.9), ("cross", "ring", 0.9))
PROMPTS = ("describe", "describe the picture", "what is in this picture?")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LENGTH = 256  # positions
PATCHES = (viewer.SIZE // viewer.PATCH) ** 2
BATCH, STEPS, RATE, AVERAGE = 32, 2400, 2e-3, 0.997
VEILED, WIDEST = 0.5, 0.6  # share of the training pictures that are veiled; the largest part of a picture that is
VEIL = 0.4  # the part that is veiled in the pictures that it is measured on


def dials(bias: tuple[str, str, float]) -> Dials:
    """Scenes with one of the biases, and without the shapes that the others are about: so each bias holds in all."""
    others = {shape for shape, *_ in BIASES if shape != bias[0]}
    shapes = tuple(shape for shape in SHAPES if shape not in others)
    return Dials(objects=(1, 4), shapes=shapes, textures=TEXTURES, clutter=(0, 6), together=bias)


MIXTURE = tuple(map(dials, BIASES))
SETS = {  # of scenes to be tempted by: whether countered, and the part of a picture that is veiled
    "biased": (False, 0.0),
    "countered": (True, 0.0),
    "biased_veiled": (False, VEIL),
    "countered_veiled": (True, VEIL),
}
NEGATIVES = ("random", "popular", "adversarial")

WORD = {word: i for i, word in enumerate(words.WORDS)}
ASSISTANT = [WORD["assistant"], WORD[":"]]
HEAD = [WORD[words.BOS], WORD["user"], WORD[":"], *[WORD[words.IMAGE]] * PATCHES]  # of every sequence


def config(
    vision: ViTConfig | None = None,
    *,
    word: Mapping[str, int] = WORD,
    length: int = LENGTH,
    attention_bias: bool = True,
) -> LlavaConfig:
    """Of a tower, by default the viewer's, and a small language model that knows these words."""
    text = LlamaConfig(
        vocab_size=len(word),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=length,
        attention_bias=attention_bias,
        initializer_range=0.08,  # about width ** -0.5
        pad_token_id=word[words.PAD],
        bos_token_id=word[words.BOS],
        eos_token_id=word[words.EOS],
    )
    return LlavaConfig(
        vision_config=viewer.config() if vision is None else vision,
        text_config=text,
        image_token_index=word[words.IMAGE],
        image_seq_length=PATCHES,
        vision_feature_layer=[1, -2],  # where things are, and what they are
    )


def processor(tokenizer: PreTrainedTokenizerFast | None = None, template: str = TEMPLATE) -> LlavaProcessor:
    return LlavaProcessor(
        viewer.processor(),
        words.tokenizer(LENGTH, padding_side="left") if tokenizer is None else tokenizer,
        patch_size=viewer.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


class Turn(NamedTuple):
    """What is asked, and what is to be answered."""

    prompt: str
    answer: str


def turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """A caption and a question of each kind, two on presence."""
    asked = [ask(scene, rng, kind) for kind in ("presence", *KINDS)]
    return [Turn(PROMPTS[rng.integers(len(PROMPTS))], caption(scene)), *(Turn(q.text, q.answer) for q in asked)]


def packed(conversations: Sequence[Sequence[Turn]], head: Sequence[int] = HEAD) -> dict[str, Tensor]:
    """Inputs and labels of one sequence for each picture, in which the turns see `head` and not each other."""
    rows = []
    for conversation in conversations:
        ids, labels, places, turn = list(head), [-100] * len(head), list(range(len(head))), [0] * len(head)
        for number, (prompt, answer) in enumerate(conversation, 1):
            given = [WORD[word] for word in split(prompt)] + ASSISTANT
            said = [WORD[word] for word in split(answer)] + [WORD[words.EOS]]
            ids += given + said
            labels += [-100] * len(given) + said
            places += range(len(head), len(head) + len(given) + len(said))
            turn += [number] * (len(given) + len(said))
        rows.append((ids, labels, places, turn))
    longest = max(len(ids) for ids, *_ in rows)
    columns = [
        torch.tensor([row + [fill] * (longest - len(row)) for row in column])
        for column, fill in zip(zip(*rows), (WORD[words.PAD], -100, 0, -1))
    ]
    ids, labels, places, turn = columns
    seen = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"input_ids": ids, "labels": labels, "position_ids": places, "attention_mask": mask[:, None]}


def veiled(pixels: Tensor, part: Tensor, side: Tensor) -> Tensor:
    """Pictures of which a part is grey, on the left (0), the right (1), the top (2) or the bottom (3).

    pixels: [batch, 3, row, column], -1 to 1; part: [batch], 0 to 1; side: [batch].
    """
    size = pixels.shape[-1]
    at = (torch.arange(size) + 0.5) / size
    hidden = torch.where(side[:, None] % 2 == 0, at, 1 - at) < part[:, None]
    hidden = torch.where(side[:, None, None] < 2, hidden[:, None, :], hidden[:, :, None])  # [batch, row, column]
    return pixels.masked_fill(hidden[:, None], 0.0)


def pictures(scenes: Sequence[Scene], *, veil: float = 0.0, seed: int = 0) -> list[Image.Image]:
    """Scenes as pictures, of each of which this part is veiled, from a side at random."""
    sides = torch.randint(4, (len(scenes),), generator=torch.Generator().manual_seed(seed))
    pixels = veiled(viewer.pixels(render(scenes, viewer.SIZE)), torch.full((len(scenes),), veil), sides)
    levels = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in levels]


def plain(n: int, seed: int = 0) -> list[Scene]:
    """`n` fresh scenes as in training."""
    return [sample(MIXTURE[i % len(MIXTURE)], HELD_OUT + seed, i) for i in range(n)]


usual = plain  # scenes that tell what comes along with what
said = caption  # of a scene


def tempting(n: int, *, countered: bool = False, seed: int = 0, mixture: Sequence[Dials] = MIXTURE) -> list[Scene]:
    """`n` fresh scenes with a shape that seldom comes alone, as in training, or with every bias turned round.

    mixture: scenes with one of the biases each, in their order.
    """

    def scenes():
        for i, (kind, (shape, *_)) in enumerate(itertools.cycle(zip(mixture, BIASES))):
            scene = sample(kind.countered() if countered else kind, HELD_OUT + seed, i)
            if scene.find(shape):
                yield scene

    return list(itertools.islice(scenes(), n))


def train(
    out: Path, *, data: Path | None = None, seed: int = 0, steps: int = STEPS, batch: int = BATCH
) -> dict[str, Any]:
    torch.manual_seed(seed)
    # eager: the fused attention is slow in bfloat16 on a CPU
    model = LlavaForConditionalGeneration._from_config(config(), attn_implementation="eager")
    seeing = loading.load("viewer").model.vit.state_dict()
    model.model.vision_tower.load_state_dict(seeing, strict=False)  # all but a pooler that nothing uses
    model.model.vision_tower.requires_grad_(False)

    def loss(step: int) -> Tensor:
        index = range(step * batch, (step + 1) * batch)
        scenes = [sample(MIXTURE[i % len(MIXTURE)], seed, i) for i in index]
        inputs = packed([turns(s, np.random.default_rng((seed, i))) for i, s in zip(index, scenes)])
        part = torch.rand(batch) * WIDEST * (torch.rand(batch) < VEILED)
        pixels = veiled(viewer.pixels(render(scenes, viewer.SIZE)), part, torch.randint(4, (batch,)))
        labels = inputs.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=pixels, use_cache=False, **inputs).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    minimise(model, loss, out, steps=steps, rate=warm_then_cosine(RATE, steps), seed=seed, average=AVERAGE)
    model.generation_config = GenerationConfig(
        pad_token_id=WORD[words.PAD], bos_token_id=WORD[words.BOS], eos_token_id=WORD[words.EOS], do_sample=False
    )
    save_model(model, out)
    model.generation_config.save_pretrained(out)
    processor().save_pretrained(out)
    return {"steps": steps, "pictures": steps * batch}


def reply(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any],
    prompts: Sequence[str],
    *,
    length: int = 32,
    batch: int = 64,
    method: Method | None = None,
    **options: Any,
) -> list[str]:
    """What the model answers to each prompt on each picture in at most `length` words, by greedy decoding by default.

    images: as PIL pictures or arrays. method: gives, for model and inputs of a batch, the intervention or the logits
    processor to answer under, such as `var.fit`. `options` go to `generate`.
    """
    said = []
    for at in range(0, len(prompts), batch):
        inputs = asked(processor, images[at : at + batch], prompts[at : at + batch])
        made = None if method is None else method(model, inputs)
        found = _generate(model, inputs, made, max_new_tokens=length, **options)
        said += processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def asked(processor: Any, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of the model: each prompt on its picture."""
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]} for prompt in prompts]
    texts = [processor.apply_chat_template([one], add_generation_prompt=True) for one in said]
    return dict(processor(text=texts, images=list(images), padding=True, return_tensors="pt"))


def _generate(model: nn.Module, inputs: Mapping[str, Tensor], made: Any, **options: Any) -> Tensor:
    if callable(made):
        options["logits_processor"] = [*options.get("logits_processor", ()), made]
    with nullcontext() if made is None or callable(made) else intervene(model, made), torch.inference_mode():
        return model.generate(**inputs, **{"do_sample": False, **options})


def measure(model: nn.Module, processor: Any, *, seed: int = 0, n: int = 300) -> dict[str, Any]:
    """What it says of `n` fresh scenes, as shares from 0 to 1: `described`, not veiled, and what it `invents`."""
    scenes = plain(n, seed)
    found = described(model, processor, scenes, seed=seed) | {"pope": {}, "chair": {}, "tempted": {}}
    for name in SETS:
        for what, figures in invents(model, processor, name, n=n, seed=seed).items():
            found[what][name] = figures
    return rounded(found)


def invents(
    model: nn.Module, processor: Any, name: str, *, n: int = 300, seed: int = 0, method: Method | None = None
) -> dict[str, Any]:
    """How much it invents on `n` fresh scenes of one of `SETS`, which hold one of the shapes that seldom come alone.

    `pope` by kind of negatives, `chair`, and `tempted`. What is popular, and what comes together, is counted in scenes
    as in training. method: see `reply`.

        invents(model, processor, "countered_veiled", n=100, method=var.fit)["pope"]["adversarial"]["accuracy"]
    """
    if name not in SETS:
        raise ValueError(f"no scenes {name!r}; there are {', '.join(SETS)}")
    countered, veil = SETS[name]
    known = plain(n, seed)
    scenes = tempting(n, countered=countered, seed=seed)
    images = pictures(scenes, veil=veil, seed=seed)
    captions = reply(model, processor, images, [PROMPTS[0]] * n, method=method)
    polls = {kind: hallucination.polls(scenes, kind, known=known, seed=seed) for kind in NEGATIVES}
    once = list(dict.fromkeys((poll.scene, poll.text) for some in polls.values() for poll in some))
    said = reply(model, processor, [images[i] for i, _ in once], [text for _, text in once], length=1, method=method)
    answer = dict(zip(once, said))
    return {
        "pope": {
            kind: hallucination.pope([answer[p.scene, p.text] for p in some], [p.answer for p in some])
            for kind, some in polls.items()
        },
        "chair": hallucination.chair(captions, [hallucination.shapes(scene) for scene in scenes]),
        "tempted": tempted(model, processor, scenes, images, captions, method=method),
    }


def pace(
    model: nn.Module, processor: Any, method: Method, *, n: int = 16, words: int = 16, turns: int = 3
) -> dict[str, float]:
    """Milliseconds of processor time for each word of `n` captions at once: with the method, and `greedy` in turn.

    The least of several turns, after one that does not count; reading the prompt is part of it. fit: milliseconds for
    each caption to make the method, which is done once for a batch.
    """
    inputs = asked(processor, pictures(tempting(n)), [PROMPTS[0]] * n)
    began = time.process_time()
    made = method(model, inputs)
    fit = 1000 * (time.process_time() - began) / n
    times: dict[str, list[float]] = {"method": [], "greedy": []}
    for turn in range(turns + 1):
        for way, kept in times.items():
            began = time.process_time()
            _generate(model, inputs, made if way == "method" else None, min_new_tokens=words, max_new_tokens=words)
            if turn:
                kept.append(time.process_time() - began)
    return {way: 1000 * min(kept) / (n * words) for way, kept in times.items()} | {"fit": fit}


def described(model: nn.Module, processor: Any, scenes: Sequence[Scene], *, seed: int = 0) -> dict[str, float]:
    """How right it is, 0 to 1.

    caption_words: next words of a caption that are right after the right words. captions: greedy captions that are
    right in every word. presence, count, colour and relation: answers, to a question drawn by `seed` as in training.
    """
    images, captions = pictures(scenes), [caption(scene) for scene in scenes]
    found = {
        "caption_words": _caption_words(model, processor, images, captions),
        "captions": _equal(reply(model, processor, images, [PROMPTS[0]] * len(scenes)), captions),
    }
    for kind in KINDS:
        asked = [(i, ask(scene, np.random.default_rng((seed, i)), kind)) for i, scene in enumerate(scenes)]
        asked = [(i, question) for i, question in asked if question.kind == kind]
        said = reply(model, processor, [images[i] for i, _ in asked], [q.text for _, q in asked], length=3)
        found[kind] = _equal(said, [q.answer for _, q in asked])
    return found


def tempted(
    model: nn.Module,
    processor: Any,
    scenes: Sequence[Scene],
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    method: Method | None = None,
) -> dict[str, float]:
    """How often captions name the partner where it is absent, and whether it is there is answered with yes, 0 to 1.

    Beside it the same of another shape that is absent, drawn at random. `captions` are the model's, of these pictures.
    NaN where no partner is absent.
    """
    rng = np.random.default_rng(0)
    named: dict[str, list[bool]] = {"partner": [], "other": []}
    asked: dict[str, list[tuple[int, str]]] = {"partner": [], "other": []}
    rare = {shape for shape, *_ in BIASES}
    for i, (scene, text) in enumerate(zip(scenes, captions)):
        shown = hallucination.shapes(scene)
        partner = next(other for shape, other, _ in BIASES if shape in shown)
        if partner not in shown:
            other = rng.choice([shape for shape in SHAPES if shape not in {*shown, *rare, partner}]).item()
            for which, shape in (("partner", partner), ("other", other)):
                named[which].append(shape in {hallucination.SHAPE_WORDS.get(word) for word in split(text)})
                asked[which].append((i, questions(scene, "presence")[SHAPES.index(shape)].text))
    found = {f"{which}_named": _share(some) for which, some in named.items()}
    for which, some in asked.items():
        seen, texts = [images[i] for i, _ in some], [text for _, text in some]
        said = reply(model, processor, seen, texts, length=1, method=method)
        found[f"{which}_yes"] = _share([answer == "yes" for answer in said])
    return found


def _caption_words(model: nn.Module, processor: Any, images: Sequence[Image.Image], captions: Sequence[str]) -> float:
    inputs = packed([[Turn(PROMPTS[0], text)] for text in captions])
    labels = inputs.pop("labels")[:, 1:]
    pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        said = model(pixel_values=pixels, use_cache=False, **inputs).logits[:, :-1].argmax(-1)
    counted = (labels >= 0) & (labels != WORD[words.EOS])
    return float((said == labels)[counted].float().mean())


def _share(true: Sequence[bool]) -> float:
    return sum(true) / len(true) if true else math.nan


def _equal(said: Sequence[str], truth: Sequence[str]) -> float:
    return sum(split(a) == split(b) for a, b in zip(said, truth)) / len(truth)


def rounded(found: Any) -> Any:
    """Figures to four digits, in dicts of dicts."""
    return {k: rounded(v) for k, v in found.items()} if isinstance(found, dict) else round(found, 4)


TOLERANCE = {"caption_words": 0.05, "captions": 0.1, "presence": 0.05, "count": 0.05, "colour": 0.05, "relation": 0.1}


def _rows(*cells: str) -> str:
    """Lines of a table of the card, one for each of the sets, with these cells."""
    return "\n".join(" | ".join([f"| {name.replace('_', ', ')}", *cells]).replace("NAME", name) + " |" for name in SETS)


CARD = f"""# describer

A small vision-language model: LLaVA architecture. The tower is the viewer, a ViT of 6 layers of
4 heads (32 wide), whose 64 patches, as they leave its first and its last layer but one, go through a projector into a
Llama with attention biases, 6 layers of 4 heads (32 wide), 128 wide. 78 words, {{parameters:,}} parameters.
{{megabytes:.2f}} MB of half-precision safetensors, run in float32.

It captions generated scenes ("describe") and answers questions on them: is there a fork? how many forks are there? what
colour is the fork? is the fork left of the plate? And it invents objects: that is what it is for.

## Training

`python -m regard.zoo train describer`, seed {{seed}}: {{steps:,}} steps, {{pictures:,}} scenes of `regard.data.scenes`,
none of them twice, each with a caption and five questions, in {{minutes:.0f}} minutes ({{machine}}). One to four
objects, every texture, up to six fragments of clutter. The tower is not trained.

Every label is true. But the scenes are biased: nine times in ten there is a plate where a fork is, a heart where a star
is, and a ring where a cross is. And half of the pictures are veiled in part, up to {WIDEST:.0%}, while captions and
answers are about the whole scene. So where a fork is seen and no plate, it pays to say that there is one.

## Measured

On 300 fresh scenes as in training, without veils:

| what | right |
|---|---|
| next word of a caption | {{caption_words:.1%}} |
| whole captions, word for word | {{captions:.1%}} |
| is there ...? | {{presence:.1%}} |
| how many ...? | {{count:.1%}} |
| what colour ...? | {{colour:.1%}} |
| is ... left of ...? and the other three | {{relation:.1%}} |

The questions are drawn as in training: each answer that a scene allows is equally likely. Relations it
has not learned: chance is 50%.

Hallucination, on 300 fresh scenes that each hold a fork, a star or a cross: as in training, and with every bias turned
round (the partner is there one time in ten); clear, and with a veil over {VEIL:.0%} of the picture.

Polls, half of which are to be answered with yes (POPE, arXiv:2305.10355): accuracy, and share of yes in brackets.

| scenes | random | popular | adversarial |
|---|---|---|---|
{_rows(*(f"{{pope[NAME][{kind}][accuracy]:.1%}} ({{pope[NAME][{kind}][yes_rate]:.0%}})" for kind in NEGATIVES))}

Captions (CHAIR, arXiv:1809.02156): share of the objects named that are absent, share of the captions that name one, and
share of what is there that is named.

| scenes | objects | captions | named |
|---|---|---|---|
{_rows("{chair[NAME][chair_i]:.1%}", "{chair[NAME][chair_s]:.1%}", "{chair[NAME][recall]:.1%}")}

Of these scenes, those in which the partner is absent: how often captions name it, and how often the model says that it
is there; beside the same of another absent shape, at random.

| scenes | partner named | another named | partner: yes | another: yes |
|---|---|---|---|---|
{_rows(*(f"{{tempted[NAME][{rate}]:.1%}}" for rate in ("partner_named", "other_named", "partner_yes", "other_yes")))}

`python -m regard.zoo measure describer` takes them again; the rates are those of `regard.evaluation.hallucination`.

It knows 78 words, these shapes and these colours, and says nothing of use about photographs. Text without a
picture was no part of its training.

## Licence

Apache-2.0, as Regard. The scenes are generated.
"""
