"""What single architectures need beyond the general rules, by `model_type`: values of small configurations, whose
parts are named by paths, and inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .inputs import Maker

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
_LAST = {**_RESNET, "out_features": ["stage4"]}
_DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
_SERIES = {"prediction_length": 8, "context_length": 16, "num_time_features": 1, "feature_size": 10}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE = {"image_token_index": 199}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": _IMAGE,
    "blt": {"encoder_hash_byte_group_vocab": 500, "num_hidden_layers": 2},
    "chameleon": {"vocabulary_map": {"<image>": 199}},
    "clvp": {"text_config.use_rotary_embedding": False, "speech_config.use_rotary_embedding": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [4, 2, 2]}}},
    "conditional_detr": {**_DETR, "backbone_config": _LAST},
    "dab-detr": {**_DETR, "backbone_config": _LAST},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_vision": {
        "encoder_config.hidden_size": 112,
        "encoder_config.num_attention_heads": 7,
        "encoder_config.num_key_value_heads": 7,
    },
    "deformable_detr": {**_DETR, "backbone_config": _RESNET},
    "depth_pro": {"patch_size": 32, **{f"{part}_model_config.image_size": 32 for part in ("image", "patch", "fov")}},
    "detr": {**_DETR, "backbone_config": _LAST},
    "diffusion_gemma_text": {"num_experts": 4, "moe_intermediate_size": 32},
    "donut-swin": {"image_size": 128, "window_size": 4},
    "dots1": {"n_shared_experts": 1},
    "emu3": {
        "vocabulary_map": {"<image>": 199, "<|extra_200|>": 198}
        | {f"<|visual token {i:06d}|>": 100 + i for i in range(64)}
    },
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": [3, 3, 2]},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2"},
    "granite_speech": {"projector_config.encoder_hidden_size": 128},
    "granite_speech_plus": {"projector_config.encoder_hidden_size": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hiera": {"image_size": [224, 224]},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1},
    "informer": _SERIES,
    "instructblip": _IMAGE,
    "instructblipvideo": {"video_token_index": 199, "image_token_index": 199},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "janus_vqgan": {"base_channels": 32, "num_patches": 4},
    "kosmos-2": {"latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_vision_model": {
        "projector_input_dim": 512,
        "vision_output_dim": 512,
        "projector_output_dim": 512,
        "intermediate_size": 384,
    },
    "llava_next": {"image_grid_pinpoints": [[56, 56]]},
    "llava_next_video": {"image_grid_pinpoints": [[56, 56]]},
    "llava_onevision": {"image_grid_pinpoints": [[56, 56]]},
    "longcat_flash": {
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "ffn_hidden_size": 256,
        "expert_ffn_hidden_size": 32,
    },
    "lw_detr": {"projector_scale_factors": [1.0]},
    "mobilevitv2": {"image_size": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "pvt": {"num_encoder_blocks": 4},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 300,
        "split_ngram_parts": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sam2_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam_hq_prompt_encoder": {"image_embedding_size": 4},
    "sam_prompt_encoder": {"image_embedding_size": 4},
    "seggpt": {"merge_index": 0, "intermediate_hidden_state_indices": [1]},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p5": {"sliding_window": 8},
    "swin2sr": {"image_size": 16},
    "table-transformer": {**_DETR, "backbone_config": _LAST},
    "time_series_transformer": _SERIES,
    "vipllava": {"vision_feature_layers": [1, 2]},
    "vits": {"upsample_initial_channel": 64},
    "voxtral": {"audio_token_id": 199},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 80},
}


def _noise(*shape: int) -> Callable[[Maker, dict[str, Any]], Any]:
    return lambda make, _: make.noise(*shape)


def _ids(*shape: int) -> Callable[[Maker, dict[str, Any]], Any]:
    """Rows of so many ids for each of several books, where there are any."""
    return lambda make, _: make.ids(shape[0]) if len(shape) == 1 else make.books(*shape)


def _frames(mel: int) -> dict[str, Callable[[Maker, dict[str, Any]], Any]]:
    """Sound as frames of so many numbers, all of them there."""
    return {"input_features": _noise(2, 96, mel), "input_features_mask": _ones(2, 96)}


def _nothing(*_: Any) -> None:
    """Left out, though the general rules would give it."""


def _ones(*shape: int) -> Callable[[Maker, dict[str, Any]], Any]:
    return lambda *_: torch.ones(shape, dtype=torch.bool)


def _placed(n: int) -> Callable[[Maker, dict[str, Any]], Any]:
    """Ids with so many placeholders of a picture or a sound in each text."""
    return lambda make, _: make.placed(n)


def _places(side: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


INPUTS: dict[str, dict[str, Callable[[Maker, dict[str, Any]], Any]]] = {
    "clap": {"input_features": _noise(2, 1, 64, 64)},
    "clap_audio_model": {"input_features": _noise(2, 1, 64, 64)},
    "clvp": {"input_features": _noise(2, 80, 50)},
    "deepseek_vl_hybrid": {"high_res_pixel_values": lambda make, _: make.noise(2, 3, 64, 64)},
    "depth_pro": {"pixel_values": _noise(2, 3, 128, 128)},
    "dia": {"decoder_input_ids": _ids(5, 9)},
    "diffusion_gemma": {"decoder_input_ids": _ids(5)},
    "dots3_note": {"input_features": _nothing},
    "dots3_note_audio_encoder": {
        "input_features": _noise(2, 128, 96),
        "chunk_sample_lengths": lambda *_: torch.tensor([15360, 15360]),
    },
    "fastspeech2_conformer_hifigan": {"spectrogram": _noise(2, 8, 80)},
    "fun_asr_nano": _frames(560),
    "fun_asr_nano_encoder": _frames(560),
    "gemma4_audio": {"input_features": _noise(2, 96, 16), "attention_mask": _ones(2, 96)},
    "gemma4_vision": {"pixel_values": _noise(2, 16, 768), "pixel_position_ids": lambda *_: _places(4).repeat(2, 1, 1)},
    "glm_image": {"pixel_values": _nothing, "image_grid_thw": _nothing},
    "granite_docling": {"pixel_values": _noise(2, 1, 3, 64, 64), "pixel_attention_mask": _ones(2, 1)},
    "granite_speech": {"input_features": _noise(2, 30, 160), "input_features_mask": _nothing, "input_ids": _placed(6)},
    "granite_speech5_ctc": {"input_features": _noise(2, 96, 320)},
    "granite_speech5_encoder": {"input_features": _noise(2, 96, 320)},
    "granite_speech_plus": {
        "input_features": _noise(2, 30, 160),
        "input_features_mask": _nothing,
        "input_ids": _placed(6),
    },
    "idefics": {
        "pixel_values": _noise(2, 1, 3, 56, 56),
        "image_attention_mask": lambda *_: torch.ones(2, 12, 1, dtype=torch.long),
    },
    "inkling2": {"pixel_values": _nothing, "image_grid_thw": _nothing},
    "inkling_audio": {"audio_input_ids": _ids(12)},
    "inkling_mm_model": {"pixel_values": _nothing},
    "kimi_k25": {"pixel_values": _noise(32, 3, 14, 14)},
    "kimi_k25_vision": {"pixel_values": _noise(32, 3, 14, 14)},
    "kosmos-2": {
        "pixel_values": _noise(2, 3, 56, 56),
        "image_embeds_position_mask": lambda *_: torch.arange(12).expand(2, 12) < 4,
    },
    "kyutai_speech_to_text": {"input_ids": _ids(12, 33)},
    "lightglue": {"pixel_values": _noise(1, 2, 3, 32, 32)},
    "mimi_decoder": {"latents": _noise(2, 64, 8)},
    "minicpmv4_7": {"pixel_values": _nothing},
    "molmo2": {"pixel_values": _nothing},
    "moshi_depth": {
        "input_ids": _ids(4),
        "last_hidden_state": lambda make, _: make.noise(2, 4, make.config.input_size),
    },
    "musicgen": {"decoder_input_ids": lambda make, _: make.ids(5).repeat(4, 1)},
    "musicgen_decoder": {"input_ids": lambda make, _: make.ids(12).repeat(4, 1)},
    "musicgen_melody": {"decoder_input_ids": lambda make, _: make.ids(5).repeat(4, 1)},
    "musicgen_melody_decoder": {"input_ids": lambda make, _: make.ids(12).repeat(4, 1)},
    "nemo_speechlm": _frames(128),
    "nemotron3_5_transcribe_audio": _frames(128),
    "nemotron_h_omni": {"pixel_values": _nothing, "input_features": _nothing},
    "neucodec": {"input_values": _noise(2, 1, 16000), "input_features": _noise(2, 50, 160)},
    "oneformer": {"task_inputs": _ids(77)},
    "ovis2": {"input_ids": _placed(4)},
    "paddleocr_vl": {"pixel_values": _noise(32, 3, 14, 14)},
    "paddleocr_vl_vision": {"pixel_values": _noise(1, 32, 3, 14, 14)},
    "phi4_multimodal_audio": {"hidden_states": _noise(2, 96, 80), "mask": _ones(2, 96)},
    "pocket_tts_audio_tokenizer_decoder": {"latents": _noise(2, 64, 8)},
    "pp_ocrv5_mobile_rec": {"pixel_values": _noise(2, 3, 48, 96)},
    "qwen2_5_omni_audio_encoder": {
        "input_features": _noise(128, 200),
        "feature_lens": lambda *_: torch.tensor([100, 100]),
        "aftercnn_lens": lambda *_: torch.tensor([50, 50]),
    },
    "qwen2_5_omni_bigvgan": {"mel_spectrogram": _noise(2, 80, 8)},
    "qwen2_audio": {"attention_mask": lambda _, inputs: torch.ones_like(inputs["input_ids"])},
    "qwen3_asr_encoder": {
        "input_features": lambda make, _: make.noise(2, make.config.num_mel_bins, 200),
        "input_features_mask": _ones(2, 200),
    },
    "qwen3_omni_moe_audio_encoder": {
        "input_features": _noise(128, 200),
        "feature_lens": lambda *_: torch.tensor([100, 100]),
    },
    "qwen3_omni_moe_talker_code_predictor": {
        "input_ids": lambda *_: None,
        "inputs_embeds": lambda make, _: make.noise(2, 12, make.size),
    },
    "seggpt": {
        name: lambda make, _: make.noise(2, 3, make.side()[0] // 2, make.side()[1])
        for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "speech-encoder-decoder": {"inputs": _nothing, "input_values": _noise(2, 4000)},
    "speecht5_hifigan": {"spectrogram": _noise(2, 8, 80)},
    "tvp": {"attention_mask": _ones(2, 12)},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": _noise(2, 8, 4)},
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": _noise(2, 1, 640)},
    "video_llama_3": {"image_merge_sizes": lambda *_: torch.tensor([1, 1])},
    "xclip": {"pixel_values": lambda make, _: make.noise(2, make.vision.num_frames, 3, *make.side())},
    "xclip_vision_model": {"pixel_values": lambda make, _: make.noise(2 * make.config.num_frames, 3, *make.side())},
    "xcodec": {"input_values": _noise(2, 1, 4000)},
    "xcodec2": {"input_values": _noise(2, 1, 16000), "input_features": _noise(2, 50, 160)},
}
