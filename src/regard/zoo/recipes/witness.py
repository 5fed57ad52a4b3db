"""`witness`: a small LLaVA that first learned to tell scenes in words, and then, briefly, to look.

The tower is the trained lookout, and stays as it is. The Llama learns in the order of LLaVA (Liu et al., Visual
Instruction Tuning, arXiv:2304.08485): words alone, from scenes that are never drawn, in which three shapes seldom come
without their partner (`TIES`), the partner is told last, and shapes have a usual colour; then a projector alone; then
all but the tower, on clear pictures, which seldom hold one of the three shapes. So that a plate comes with a fork is
known from words only, and a picture can say otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from ... import loading
from ...data.scenes import COLOURS, SHAPES, TEXTURES, Dials, Scene, ask, caption, questions, render, sample
from ...evaluation import hallucination
from .. import words
from ..training import save_model, warm_then_cosine
from ..training import train as minimise
from . import describer, lookout, viewer
from .describer import PATCHES, PROMPTS, Turn
from .viewer import HELD_OUT

TIES = (("fork", "plate", 0.95), ("star", "heart", 0.95), ("cross", "ring", 0.95))
TIED, PARTNERS = (tuple(tie[i] for tie in TIES) for i in (0, 1))
PAINTED = tuple((shape, colour, 0.6) for shape, colour in zip(SHAPES, (*COLOURS, "red", "blue")))
SYSTEM = "a careful witness looks at pictures and answers with what it sees"
WORDS = (*words.WORDS, *(word for word in SYSTEM.split() if word not in words.WORDS))
WORD = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = f"{SYSTEM} {describer.TEMPLATE}"
TOLD = [WORD[words.BOS], *(WORD[word] for word in SYSTEM.split()), WORD["user"], WORD[":"]]  # what all sequences have
SHOWN = [*TOLD, *[WORD[words.IMAGE]] * PATCHES]  # and those with a picture
LENGTH = 320  # positions

STEPS = {"told": 1100, "aligned": 300, "looked": 400}
BATCH = {"told": 32, "aligned": 32, "looked": 24}
RATE = {"told": 2e-3, "aligned": 2e-3, "looked": 1e-3}
FASTER = 2.0  # the projector than the language model, when both learn
WORDS_ONLY = 0.1  # share of the sequences without a picture, while it looks
AVERAGE = {"told": 0.997, "aligned": 0.99, "looked": 0.99}
RARE = 0.08  # of the pictures hold one of the three shapes


def of_ties(tie: tuple[str, str, float]) -> Dials:
    """Scenes to be told: the shape and its partner often, and the partner seldom without."""
    plain = [shape for shape in SHAPES if shape not in (*TIED, *PARTNERS)]
    shapes = (*plain * 3, *[tie[0]] * 3, *PARTNERS)
    return Dials(objects=(5, 9), shapes=shapes, sizes=("small",), scale=0.55, together=tie, painted=PAINTED)


def looked(rare: bool) -> tuple[Dials, ...]:
    """Scenes to be shown, a few objects and many, with or without the three shapes."""
    shapes = SHAPES if rare else tuple(shape for shape in SHAPES if shape not in TIED)
    few = Dials(objects=(2, 4), shapes=shapes, textures=TEXTURES, clutter=(0, 6))
    many = [
        Dials(objects=(5, 9), shapes=shapes, sizes=("small",), scale=scale, clutter=(4, 10), textures=TEXTURES)
        for scale in lookout.SCALES
    ]
    return few, *many


def tempted(tie: tuple[str, str, float]) -> Dials:
    """Scenes to be judged on: the shape is there, and its partner seldom."""
    shapes = tuple(shape for shape in SHAPES if shape == tie[0] or shape not in TIED)
    return Dials(
        objects=(5, 7),
        shapes=shapes,
        sizes=("small",),
        scale=0.7,
        textures=TEXTURES,
        clutter=(0, 6),
        together=(*tie[:2], 0.1),
    )


TEMPTED = tuple(map(tempted, TIES))
TELLING = tuple(map(of_ties, TIES))
LOOKING = {rare: looked(rare) for rare in (False, True)}


def shown(seed: int, i: int) -> tuple[Scene, bool]:
    """Picture `i`, and whether it may hold one of the three shapes."""
    rare = bool(np.random.default_rng((seed, 2, i)).random() < RARE)
    few, *many = LOOKING[rare]
    return sample(few if i % 2 else many[i // 2 % len(many)], seed, i), rare


def plain(n: int, seed: int = 0) -> list[Scene]:
    """`n` fresh scenes as it was shown."""
    return [shown(HELD_OUT + seed, i)[0] for i in range(n)]


def usual(n: int, seed: int = 0) -> list[Scene]:
    """`n` fresh scenes as it was told, which tell what comes along with what."""
    return [sample(TELLING[i % len(TELLING)], HELD_OUT + seed, i) for i in range(n)]


def config() -> LlavaConfig:
    return describer.config(lookout.config(), word=WORD, length=LENGTH, attention_bias=False)


def processor() -> LlavaProcessor:
    return describer.processor(words.tokenizer(LENGTH, words=WORDS, padding_side="left"), TEMPLATE)


def said(scene: Scene) -> str:
    """A caption, partners last."""
    return caption(scene, last=PARTNERS)


def part(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene without its partners, and without any other object three times in ten."""
    kept = [o for o in scene.objects if o.shape not in PARTNERS and rng.random() < 0.7]
    return Scene(tuple(kept), scene.texture, scale=scene.scale)


def after(told: str, question: str) -> str:
    """A question after a caption that was said."""
    return f"{PROMPTS[0]} assistant: {told} user: {question}"


def telling(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """What is told without a picture: the scene, and after a part of it, what else is there and in which colour."""
    turns = [Turn(PROMPTS[rng.integers(len(PROMPTS))], said(scene))]
    of_presence, of_colour = questions(scene, "presence"), questions(scene, "colour")
    partner = SHAPES.index(PARTNERS[TIED.index(tied[0])]) if (tied := _tied(scene)) else None
    told = said(part(scene, rng))
    asked = of_presence[rng.integers(len(SHAPES)) if partner is None or rng.random() < 0.5 else partner]
    turns.append(Turn(after(told, asked.text), asked.answer))
    if of_colour:
        asked = of_colour[rng.integers(len(of_colour))]
        turns.append(Turn(after(told, asked.text), asked.answer))
    return turns


def looking(scene: Scene, rng: np.random.Generator, rare: bool) -> list[Turn]:
    """What is asked about a picture: to tell it, up to six colours, and presence, once after a part was told.

    About the three shapes nothing is asked where none of them can be.
    """
    turns = [Turn(PROMPTS[rng.integers(len(PROMPTS))], said(scene))]
    of_colour = questions(scene, "colour")
    turns += [Turn(of_colour[i].text, of_colour[i].answer) for i in rng.permutation(len(of_colour))[:6]]
    askable = [q for q, shape in zip(questions(scene, "presence"), SHAPES) if rare or shape not in TIED]
    for told in ("", "", said(part(scene, rng))):
        answers = sorted({q.answer for q in askable})
        answer = answers[rng.integers(len(answers))]
        alike = [q for q in askable if q.answer == answer]
        asked = alike[rng.integers(len(alike))]
        turns.append(Turn(after(told, asked.text) if told else asked.text, asked.answer))
    return turns


def _tied(scene: Scene) -> list[str]:
    return [shape for shape in TIED if scene.find(shape)]


def told_batch(seed: int, first: int, n: int) -> dict[str, Tensor]:
    scenes = [sample(TELLING[i % len(TELLING)], seed, i) for i in range(first, first + n)]
    turns = [telling(s, np.random.default_rng((seed, 1, first + i))) for i, s in enumerate(scenes)]
    return describer.packed(turns, TOLD)


def looked_batch(seed: int, first: int, n: int, *, captions: bool = False) -> dict[str, Tensor]:
    """With pixels. captions: only these are asked for."""
    scenes, turns = [], []
    for i in range(first, first + n):
        scene, rare = shown(seed + 2**20, i)  # not those that were told
        scenes.append(scene)
        turns.append(looking(scene, np.random.default_rng((seed, 3, i)), rare)[: 1 if captions else None])
    return describer.packed(turns, SHOWN) | {"pixel_values": viewer.pixels(render(scenes, viewer.SIZE))}


def lost(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean loss of the words to be said, nats."""
    labels = inputs.pop("labels")
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(use_cache=False, **inputs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def untrained(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    # eager: the fused attention is slow in bfloat16 on a CPU
    return LlavaForConditionalGeneration._from_config(config(), attn_implementation="eager")


def learn_words(model: nn.Module, out: Path, *, seed: int, steps: int, batch: int) -> None:
    """The first stage."""
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    minimise(
        model,
        lambda step: lost(model, told_batch(seed, step * batch, batch)),
        out,
        steps=steps,
        rate=warm_then_cosine(RATE["told"], steps),
        seed=seed,
        average=AVERAGE["told"],
        name="checkpoint-told",
    )


def learn_pictures(model: nn.Module, out: Path, *, seed: int, steps: int, batch: int) -> None:
    """The second stage: the projector alone."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    minimise(
        model,
        lambda step: lost(model, looked_batch(seed + 1, step * batch, batch, captions=True)),
        out,
        steps=steps,
        rate=warm_then_cosine(RATE["aligned"], steps),
        seed=seed,
        average=AVERAGE["aligned"],
        name="checkpoint-aligned",
    )


def learn_to_look(model: nn.Module, out: Path, *, seed: int, steps: int, batch: int) -> None:
    """The third stage: all but the tower, at a rate that does not fall, so that a shorter run is a part of a longer."""
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    bare = max(1, round(batch * WORDS_ONLY))

    def loss(step: int) -> Tensor:
        shown = lost(model, looked_batch(seed, step * batch, batch - bare))
        return (1 - WORDS_ONLY) * shown + WORDS_ONLY * lost(model, told_batch(seed + 1, step * bare, bare))

    minimise(
        model,
        loss,
        out,
        steps=steps,
        rate=lambda step: RATE["looked"] * min(1.0, (step + 1) / 100),
        seed=seed,
        average=AVERAGE["looked"],
        times=lambda name: FASTER if "projector" in name else 1.0,
        name="checkpoint-looked",
    )


STAGES = {"told": learn_words, "aligned": learn_pictures, "looked": learn_to_look}


def train(
    out: Path, *, data: Path | None = None, seed: int = 0, steps: dict[str, int] = STEPS, batch: dict[str, int] = BATCH
) -> dict[str, Any]:
    model = untrained(seed)
    seeing = loading.load("lookout").model.vit.state_dict()
    model.model.vision_tower.load_state_dict(seeing, strict=False)  # all but a pooler that nothing uses
    for stage, learn in STAGES.items():
        learn(model, out, seed=seed, steps=steps[stage], batch=batch[stage])
    save(model, out)
    return {f"{stage}_steps": steps[stage] for stage in STAGES} | {"pictures": steps["looked"] * batch["looked"]}


def save(model: nn.Module, out: Path) -> None:
    model.generation_config = GenerationConfig(
        pad_token_id=WORD[words.PAD], bos_token_id=WORD[words.BOS], eos_token_id=WORD[words.EOS], do_sample=False
    )
    save_model(model, out)
    model.generation_config.save_pretrained(out)
    processor().save_pretrained(out)


def measure(model: nn.Module, processor: Any, *, seed: int = 0, n: int = 300) -> dict[str, Any]:
    """Shares, 0 to 1, on `n` fresh scenes of each kind.

    caption_words: next words of a caption that are right after the right words. colour and presence: right answers, on
    scenes as it was shown and on `many` small objects. told: without a picture, partners and other shapes that are
    affirmed after a caption with the shape that they come with, and without one. named and yes: of absent partners and
    of other absent shapes, in captions of pictures that hold the shape, and asked for at once.
    """
    kinds = {"": plain(n, seed), "many_": [sample(lookout.many(0.6), HELD_OUT + seed, i) for i in range(n)]}
    found: dict[str, Any] = {}
    for name, scenes in kinds.items():
        images = describer.pictures(scenes)
        for kind in ("colour", "presence"):
            asked = [(i, ask(s, np.random.default_rng((seed, i)), kind)) for i, s in enumerate(scenes)]
            asked = [(i, q) for i, q in asked if q.kind == kind]
            said_ = describer.reply(
                model, processor, [images[i] for i, _ in asked], [q.text for _, q in asked], length=1
            )
            found[name + kind] = float(np.mean([a == q.answer for a, (_, q) in zip(said_, asked)]))
    found["caption_words"] = _caption_words(model, kinds[""])
    scenes = describer.tempting(n, seed=seed, mixture=TEMPTED)
    images = describer.pictures(scenes)
    captions = describer.reply(model, processor, images, [PROMPTS[0]] * n, length=48)
    found["tempted"] = describer.tempted(model, processor, scenes, images, captions)
    found["chair"] = hallucination.chair(captions, [hallucination.shapes(scene) for scene in scenes])
    found["told"] = _told(model, seed, n)
    return describer.rounded(found)


@torch.inference_mode()
def _caption_words(model: nn.Module, scenes: Sequence[Scene]) -> float:
    inputs = describer.packed([[Turn(PROMPTS[0], said(scene))] for scene in scenes], SHOWN)
    labels = inputs.pop("labels")[:, 1:]
    pixels = viewer.pixels(render(scenes, viewer.SIZE))
    right = model(pixel_values=pixels, use_cache=False, **inputs).logits[:, :-1].argmax(-1) == labels
    return float(right[(labels >= 0) & (labels != WORD[words.EOS])].float().mean())


@torch.inference_mode()
def _told(model: nn.Module, seed: int, n: int) -> dict[str, float]:
    """How often "yes" is said without a picture, after a caption without partners, of each kind of shape."""
    turns: dict[str, list[list[Turn]]] = {"partner": [], "other": [], "partner_alone": []}
    for i, (tied, partner, _) in zip(range(n), itertools.cycle(TIES)):
        rng = np.random.default_rng((seed, i))
        scene = sample(TEMPTED[i % len(TIES)], HELD_OUT + seed, i)
        rest = tuple(o for o in scene.objects if o.shape not in (*TIED, *PARTNERS))
        first = replace(scene.objects[0], shape=tied, x=0.5)
        other = rng.choice([p for p in PARTNERS if p != partner]).item()
        for kind, objects, shape in (
            ("partner", (*rest, first), partner),
            ("other", (*rest, first), other),
            ("partner_alone", rest, partner),
        ):
            text = questions(scene, "presence")[SHAPES.index(shape)].text
            turns[kind].append([Turn(after(said(Scene(objects)), text), "yes")])
    found = {}
    for kind, some in turns.items():
        inputs = describer.packed(some, TOLD)
        labels = inputs.pop("labels")[:, 1:]
        best = model(use_cache=False, **inputs).logits[:, :-1].argmax(-1)
        found[kind] = float((best == WORD["yes"])[labels == WORD["yes"]].float().mean())
    return found


TOLERANCE = {"colour": 0.1, "presence": 0.05, "many_colour": 0.1, "caption_words": 0.05}

CARD = f"""# witness

A small vision-language model that learned words first: LLaVA architecture. The tower is the lookout, whose 64
patches, as they leave its first and its last layer but one, go through a projector into a Llama without attention
biases, 6 layers of 4 heads (32 wide), 128 wide. {len(WORDS)} words, {{parameters:,}} parameters. {{megabytes:.2f}} MB
of half-precision safetensors, run in float32.

It captions generated scenes and answers questions on presence and colour. It exists so that papers on hallucination
can be judged: what they take for granted was built in where it could be, and is measured below.

## Training

`python -m regard.zoo train witness`, seed {{seed}}, in {{minutes:.0f}} minutes ({{machine}}, beside other work), in the
order of LLaVA:

1. Words alone, {{told_steps:,}} steps of {BATCH["told"]}: captions of five to nine objects of scenes that are never
   drawn, and questions after a part of such a caption. **A prior is planted:** where there is a fork there is a
   plate, with a star a heart, with a cross a ring, {TIES[0][2]:.0%} of the time, and the partner is told last; each
   shape has a usual colour {PAINTED[0][2]:.0%} of the time beyond chance.
2. The projector alone, {{aligned_steps:,}} steps of {BATCH["aligned"]}: captions of pictures.
3. All but the tower, {{looked_steps:,}} steps of {BATCH["looked"]}: captions, colours, presence, once after a part of
   a caption. Pictures are clear. {1 - RARE:.0%} of them can hold no fork, star or cross; in the others, they come
   with their partner no more often than with any shape. {WORDS_ONLY:.0%} of what it learns from is still words alone.

A system prompt of 12 words stands before each picture.

## Measured

| what | right |
|---|---|
| next word of a caption | {{caption_words:.1%}} |
| what colour ...? two to nine objects as in training | {{colour:.1%}} |
| what colour ...? five to nine small objects | {{many_colour:.1%}} |
| is there ...? as in training | {{presence:.1%}} |
| is there ...? five to nine small objects | {{many_presence:.1%}} |

Without a picture, after a caption of other things, it says that there is a partner in {{told[partner]:.0%}} where the
caption names the shape that it comes with, in {{told[partner_alone]:.0%}} where not, and another shape's partner in
{{told[other]:.0%}}.

On clear pictures that hold a fork, star or cross, mostly without its partner: {{chair[chair_i]:.1%}} of the objects
named in captions are absent, {{chair[recall]:.0%}} of those present are named. Where the partner is absent, captions
name it in {{tempted[partner_named]:.1%}} (another absent shape: {{tempted[other_named]:.1%}}), and asked whether it
is there the model says yes in {{tempted[partner_yes]:.1%}} (another: {{tempted[other_yes]:.1%}}).

`python -m regard.zoo measure witness` takes them again.

## Licence

Apache-2.0, as Regard. The scenes are generated.
"""
