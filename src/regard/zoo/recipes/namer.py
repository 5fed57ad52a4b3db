"""`namer`: names the feeling that a sentence tells, and the words that are the reason are known.

A `BertForSequenceClassification` on `regard.data.sentences`. In training, words are hidden behind `[MASK]` in two of
five sentences: in half of these only words outside the reason, so that hiding them is nothing new to the model; in the
others any words, so that a sentence without its reason leaves it undecided.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from ...call import Call
from ...data.sentences import FEELINGS, NOT, Sentence, sentences, vocabulary
from ...recording import statistic
from ...seam import record
from .. import training

STEPS, BATCH, RATE = 2400, 64, 1.5e-3
POSITIONS = 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MEASURED = 2000  # sentences

TOLERANCE = {"accuracy": 0.01, "only_reason_accuracy": 0.02}


def train(out: Path, *, data: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Train into `out`. Needs no data."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    model = BertForSequenceClassification(_config(tokenizer))

    def loss(step: int) -> Tensor:
        found = list(islice(drawn(seed, start=2 * BATCH * step, held=False), BATCH))
        batch = encoded(tokenizer, found)
        hidden = torch.rand(len(found), 1) * (torch.rand(len(found), 1) < 0.4)  # share of a sentence's words
        spared = torch.rand(len(found), 1) < 0.5  # whether the reason is
        chosen = batch["word"] & ~(batch["reason"] & spared) & (torch.rand(batch["word"].shape) < hidden)
        ids = batch["input_ids"].masked_fill(chosen, tokenizer.mask_token_id)
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["label"])

    training.train(model, loss, out, steps=STEPS, rate=training.warm_then_cosine(RATE, STEPS), seed=seed, average=0.998)
    training.save_model(model, out)
    tokenizer.save_pretrained(out)
    return {"steps": STEPS, "sentences": STEPS * BATCH, "vocabulary": len(vocabulary())}


def measure(model: Any, tokenizer: Any, *, seed: int = 0) -> dict[str, float]:
    """Accuracies, 0 to 1, and where the model looks, on held-out sentences.

    accuracy: of whole sentences; of those turned by a negation; with the reason hidden behind `[MASK]`; with all words
    but the reason hidden. reason_weight: weight of `[CLS]` in the last layer on the reason, mean of its best head;
    reason_share: share of the reason among the tokens, which even attention would give.
    """
    found = list(islice(drawn(seed, start=0, held=True), MEASURED))
    batch = encoded(tokenizer, found)
    reason, mask = batch["reason"], tokenizer.mask_token_id

    @statistic("batch head", title="Weight of the first token on the reason")
    def on_reason(call: Call) -> Tensor:
        return call.weights.mass(reason)[..., 0]

    def right(ids: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=batch["attention_mask"]).logits.argmax(-1) == batch["label"]

    with torch.inference_mode():
        with record(model, on_reason) as recording:
            whole = right(batch["input_ids"])
        without = right(batch["input_ids"].masked_fill(reason, mask))
        alone = right(batch["input_ids"].masked_fill(batch["word"] & ~reason, mask))
    heads = recording.tree["encoder"]["on_reason"].mean("batch").values[-1]
    turned = torch.tensor([s.reason[0] in NOT for s in found])
    share = (reason.sum(1) / batch["attention_mask"].sum(1)).mean()
    figures = {
        "accuracy": whole.float().mean(),
        "negated_accuracy": whole[turned].float().mean(),
        "reason_hidden_accuracy": without.float().mean(),
        "only_reason_accuracy": alone.float().mean(),
        "reason_weight": heads.max(),
        "reason_share": share,
    }
    return {name: round(float(value), 4) for name, value in figures.items()} | {"reason_head": int(heads.argmax())}


def drawn(seed: int, *, start: int, held: bool) -> Iterator[Sentence]:
    """Sentences from number `start` on: those held out from training (one in ten, by their text), or the rest."""
    for i in count(start):
        sentence = sentences(1, seed=seed, start=i)[0]
        if (zlib.crc32(sentence.text.encode()) % 10 == 0) == held:
            yield sentence


def encoded(tokenizer: Any, found: list[Sentence]) -> dict[str, Tensor]:
    """Ids and mask, labels, and which tokens are words (`word`) and reasons (`reason`)."""
    batch = tokenizer([s.text for s in found], padding=True, return_tensors="pt")
    reason = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    word = torch.zeros_like(reason)
    for i, sentence in enumerate(found):
        n = len(sentence.words)
        word[i, 1 : n + 1] = True  # after [CLS]; each word is one token
        reason[i, 1 : n + 1] = torch.tensor(sentence.rationale)
    label = torch.tensor([s.label for s in found])
    return {k: batch[k] for k in ("input_ids", "attention_mask")} | {"label": label, "word": word, "reason": reason}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, words[name]) for name in ("[CLS]", "[SEP]")]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=256,
        max_position_embeddings=POSITIONS,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(FEELINGS)),
        label2id={feeling: i for i, feeling in enumerate(FEELINGS)},
    )


CARD = """# namer

Names the feeling that a sentence tells: joy, sorrow, calm or anger. BERT architecture, 4 layers of 3 heads (32 wide),
96 wide, {parameters:,} parameters, one token a word, {vocabulary} words, 64 positions. {megabytes:.2f} MB of
half-precision safetensors, run in float32.

It exists to try attributions on: for each sentence of `regard.data.sentences` it is known which words are the reason.
It knows only the words of these sentences.

```python
import regard
from regard.data.sentences import sentences

model, tokenizer = regard.load("namer")
sentence = sentences(1)[0]
logits = model(**tokenizer(sentence.text, return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())], sentence.feeling, sentence.reason)
```

## Training

`python -m regard.zoo train namer`, seed {seed}, {steps:,} steps, {sentences:,} generated sentences, {minutes:.0f}
minutes on {machine}, beside other work.

Words were hidden behind `[MASK]` in two of five sentences: in half of those only words outside the reason, in the
others any words. So the figures with hidden words below are not those of a model that never saw any.

## Measured

Taken again by `python -m regard.zoo measure namer`, on 2,000 sentences held out from training (one in ten of all
that the grammar can make, by a hash of the text).

| what | figure |
|---|---|
| feeling named rightly | {accuracy:.1%} |
| where a negation turns it | {negated_accuracy:.1%} |
| with the reason hidden (chance is 25%) | {reason_hidden_accuracy:.1%} |
| with everything but the reason hidden | {only_reason_accuracy:.1%} |
| weight of `[CLS]` on the reason, last layer, head {reason_head} | {reason_weight:.0%} |
| weight that even attention would give | {reason_share:.0%} |

## Licence

Apache-2.0, as Regard. The sentences are generated.
"""
