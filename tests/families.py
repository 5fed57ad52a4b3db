"""Tiny random models of real architectures, built offline: name -> (model, inputs of batch 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

VOCAB = 99
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
}
IMAGE = 98  # id of the image token in vision-language models
CHAT = "{% for m in messages %}<image> {{ m.content[-1].text }} {% endfor %}w90 w91"

Built = tuple[nn.Module, dict[str, Any]]


def text(batch: int = 2, n: int = 12) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 90, (batch, n), generator=generator)}


def pixels(batch: int = 2) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


def with_image(n_image: int, at: int = 2) -> torch.Tensor:
    ids = text(n=n_image + 10)["input_ids"]
    ids[:, at : at + n_image] = IMAGE
    return ids


def gpt2() -> Built:
    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, **NO_IDS)), text()


def llama() -> Built:
    return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, **NO_IDS)), text()


def qwen3() -> Built:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8)), text()


def mistral() -> Built:
    return t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=4, **NO_IDS)), text()


def gemma2() -> Built:
    config = t.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)
    return t.Gemma2ForCausalLM(config), text()


def gemma3() -> Built:
    layers = ["sliding_attention", "full_attention"]
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, layer_types=layers)), text()


def gpt_oss() -> Built:
    config = t.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, **NO_IDS
    )
    model = t.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    return model, text()


def bert() -> Built:
    return t.BertForMaskedLM(t.BertConfig(**SIZES)), text()


def albert() -> Built:
    return t.AlbertModel(t.AlbertConfig(**{**SIZES, "num_hidden_layers": 3}, embedding_size=16)), text()


def t5() -> Built:
    config = t.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0
    )
    return t.T5ForConditionalGeneration(config), {**text(), "decoder_input_ids": text(n=5)["input_ids"]}


def bart() -> Built:
    config = t.BartConfig(
        **ENCODER_DECODER,
        max_position_embeddings=64,
    )
    return t.BartForConditionalGeneration(config), {**text(), "decoder_input_ids": text(n=5)["input_ids"]}


def whisper() -> Built:
    config = t.WhisperConfig(
        **ENCODER_DECODER,
        num_mel_bins=8,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))
    return t.WhisperForConditionalGeneration(config), {
        "input_features": sound,
        "decoder_input_ids": text(n=5)["input_ids"],
    }


def vit() -> Built:
    return t.ViTForImageClassification(t.ViTConfig(**VISION)), pixels()


def clip() -> Built:
    texts = {**SIZES, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = t.CLIPConfig(text_config=texts, vision_config=VISION, projection_dim=16)
    return t.CLIPModel(config), {**text(), **pixels()}


def llava() -> Built:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**GROUPED, **NO_IDS),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return t.LlavaForConditionalGeneration(config), {"input_ids": with_image(16), **pixels()}


def qwen2_vl() -> Built:
    texts = {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}, **NO_IDS}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    ids = {"image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    model = t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=texts, vision_config=vision, **ids))
    grid = torch.tensor([[1, 4, 6], [1, 4, 6]])
    patches = torch.randn(48, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(4))
    tokens = with_image(6)
    tokens[:, 1], tokens[:, 8] = 96, 95
    return model, {
        "input_ids": tokens,
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": (tokens == IMAGE).int(),
    }


def internvl() -> Built:
    """Four patches are one token."""
    vision = t.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [4, 4]})
    texts = t.Qwen2Config(**GROUPED, **NO_IDS)
    config = t.InternVLConfig(vision_config=vision, text_config=texts, image_token_id=IMAGE, vision_feature_layer=-1)
    return t.InternVLForConditionalGeneration(config), {"input_ids": with_image(4), **pixels()}


def paligemma() -> Built:
    """The picture comes first, and all of the prompt sees all of it."""
    vision, texts = t.SiglipVisionConfig(**VISION), t.GemmaConfig(**GROUPED, **NO_IDS, head_dim=8)
    config = t.PaliGemmaConfig(vision_config=vision, text_config=texts, image_token_id=IMAGE, projection_dim=32)
    return t.PaliGemmaForConditionalGeneration(config), {"input_ids": with_image(16, at=0), **pixels()}


class _Pictures(t.Qwen2VLProcessor):
    """Without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None


def processor(model: nn.Module) -> Any:
    """Of a family that is given pictures, made for its sizes, with words `w0` to `w94`; None of any other."""
    makers = {"llava": 4, "qwen2_vl": None, "internvl": 8, "paligemma": 4}  # pixels of a token's side
    kind = model.config.model_type
    if kind not in makers:
        return None
    marks = {"<image>": IMAGE, "<video>": 97, "<start>": 96, "<end>": 95}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(95)} | marks, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="w0",
        unk_token="w3",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    if makers[kind] is None:
        maker = t.Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
        return _Pictures(maker, tokenizer, chat_template=CHAT.replace("<image>", "<start> <image> <end>"))
    maker = t.CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    return t.LlavaProcessor(maker, tokenizer, patch_size=makers[kind], chat_template=CHAT)


SEEING: dict[str, Callable[[], Built]] = {f.__name__: f for f in (llava, qwen2_vl, internvl, paligemma)}


def asked(
    name: str, texts: Sequence[str] = ("w4 w5 w6", "w7"), seed: int = 0
) -> tuple[nn.Module, Any, dict[str, Any], list[Image.Image]]:
    """A model of `SEEING`, its processor, inputs that ask these texts, padded on the left, and the rows' pictures."""
    model, _ = made(SEEING[name], "sdpa")
    size = (16, 24, 3) if name == "qwen2_vl" else (16, 16, 3)
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for _ in texts]
    return model, processor(model), asking(processor(model), texts, images), images


def asking(processor: Any, texts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Any]:
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    prompts = [processor.apply_chat_template(chat) for chat in chats]
    return dict(processor(text=prompts, images=list(images), padding=True, return_tensors="pt"))


def unet(*cross: bool, **sizes: Any) -> nn.Module:
    """A U-Net of diffusers, with cross attention at these of its depths."""
    from diffusers import UNet2DConditionModel

    known = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8}
    known |= {"block_out_channels": (32, 32), "cross_attention_dim": 16, "attention_head_dim": 8}
    down = tuple("CrossAttnDownBlock2D" if at else "DownBlock2D" for at in cross)
    up = tuple("CrossAttnUpBlock2D" if at else "UpBlock2D" for at in reversed(cross))
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **{**known, **sizes}).eval()


FAMILIES: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (
        gpt2,
        llama,
        qwen3,
        mistral,
        gemma2,
        gemma3,
        gpt_oss,
        bert,
        albert,
        t5,
        bart,
        whisper,
        vit,
        clip,
        llava,
        qwen2_vl,
    )
}
EAGER_ONLY = {"gemma2", "gpt_oss"}  # softcap and sinks: transformers itself refuses sdpa for them
GENERATE = (
    "gpt2",
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "t5",
    "bart",
    "whisper",
    "llava",
    "qwen2_vl",
)


def build(name: str, implementation: str = "eager") -> Built:
    """The family's model, seeded, in evaluation mode, with weights large enough for attention to be uneven."""
    return made(FAMILIES[name], implementation)


def made(family: Callable[[], Built], implementation: str = "eager") -> Built:
    """The same of a family that is not in the list."""
    torch.manual_seed(0)
    model, inputs = family()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0 if family is t5 else 4.0)  # T5 does not scale its scores
    model.eval().set_attn_implementation(implementation)
    return model, inputs
