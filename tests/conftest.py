"""Models on disk, as users have them: folders with weights and a tokenizer or processor."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import interpreter  # noqa: F401
import pytest
import torch
import transformers as t
from families import GROUPED, IMAGE, NO_IDS, SIZES, VISION, VOCAB
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

# Each process of xdist is told the width of the terminal, which a console would keep whatever a test asks for.
os.environ.pop("COLUMNS", None)

# A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM = "/usr/bin/chromium"
SENTENCE = (
    "<pad> <s> </s> <unk> it was the best of times , worst age wisdom a picture what is in this ? user : assistant"
)
WORDS = SENTENCE.split()
CHAT = "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}assistant :"  # noqa: E501


def words(*, image: bool = False, chat: bool = False) -> t.PreTrainedTokenizerFast:
    """A word-level tokenizer that fits the tiny models."""
    vocabulary = {w: i for i, w in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), VOCAB - 1)}
    vocabulary |= {"<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    extra = {"extra_special_tokens": {"image_token": "<image>"}} if image else {}
    fast = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **extra
    )
    fast.chat_template = CHAT if chat else None
    return fast


def saved(folder: Path, model: torch.nn.Module, processor: object) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """kind -> folder: gpt2, bert, t5, vit, llava, rwkv."""
    torch.manual_seed(0)
    at = tmp_path_factory.mktemp("models")
    pictures = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    gpt2 = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, **NO_IDS))
    bert = t.BertForMaskedLM(t.BertConfig(**SIZES, max_position_embeddings=64))
    t5 = t.T5ForConditionalGeneration(
        t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0)
    )
    vit = t.ViTForImageClassification(t.ViTConfig(**VISION))
    llava = t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION),
            text_config=t.LlamaConfig(**GROUPED, **NO_IDS),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
    )
    seeing = t.LlavaProcessor(
        pictures,
        words(image=True),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    rwkv = t.RwkvForCausalLM(t.RwkvConfig(hidden_size=32, num_hidden_layers=2, context_length=64, vocab_size=VOCAB))
    return {
        "gpt2": saved(at / "gpt2", gpt2, words(chat=True)),
        "bert": saved(at / "bert", bert, words()),
        "t5": saved(at / "t5", t5, words()),
        "vit": saved(at / "vit", vit, t.ViTImageProcessorPil(size={"height": 16, "width": 16})),
        "llava": saved(at / "llava", llava, seeing),
        "rwkv": saved(at / "rwkv", rwkv, words()),
    }


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "square.png"
    image = Image.new("RGB", (40, 32), "white")
    image.paste("red", (20, 8, 32, 20))
    image.save(path)
    return path


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"needs {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
