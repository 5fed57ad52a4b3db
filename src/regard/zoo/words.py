"""The word-level tokenizer of the models that read or write about scenes."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..data.scenes import VOCABULARY

PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unknown|>", "<image>")
PROMPT = ("describe", "in", "this", "picture", "user", "assistant", ":")  # beside the words of scenes: those of a chat
WORDS = (*SPECIAL, *VOCABULARY, *PROMPT)


def tokenizer(
    length: int, *, words: Sequence[str] = WORDS, bos: bool = True, eos: bool = False, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """Words of captions, questions and answers as tokens, numbered as in `words`; capitals do not count.

    length: of the longest sequence that the model takes. words: `WORDS`, and more behind them. bos, eos: whether
    `<|bos|>` is put before a text, and `<|eos|>` after it.

    >>> tokenizer(16)("is there a red fork?").tokens()
    ['<|bos|>', '▁is', '▁there', '▁a', '▁red', '▁fork', '?']
    """
    spelled = {"▁" + word if word.isalpha() else word: i for i, word in enumerate(words)}  # ▁: after a space
    made = Tokenizer(models.WordLevel(spelled, unk_token=UNKNOWN))
    spaces = [(r"\s+", " "), (r"\s(?=[^\w\s])", "")]  # one between words, none before a sign
    made.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Strip(), *(normalizers.Replace(Regex(a), b) for a, b in spaces)]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single=" ".join([BOS] * bos + ["$A"] + [EOS] * eos), special_tokens=[(t, WORDS.index(t)) for t in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=length,
        padding_side=padding_side,
    )
