"""A pipeline that paints pixels: diffusers' transformer, scheduler and text encoder, with no autoencoder between.

diffusers' own text-to-image pipelines for transformers all paint latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, PixArtTransformer2DModel, UniPCMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel


class PainterPipeline(DiffusionPipeline):
    """Text to square pictures, by denoising with classifier-free guidance (Ho & Salimans, arXiv:2207.12598).

    The transformer gives the picture that it expects behind the noise; the scheduler says how far to go towards it.

    >>> import regard
    >>> transformer, pipeline = regard.load("painter")
    >>> pipeline("a red circle and a blue star", generator=torch.manual_seed(0)).images[0].size
    (32, 32)
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    transformer: PixArtTransformer2DModel
    text_encoder: T5EncoderModel
    tokenizer: PreTrainedTokenizerFast
    scheduler: UniPCMultistepScheduler

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
        scheduler: UniPCMultistepScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def encode_prompt(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States of the words [batch, token, dim], and which of them are words [batch, token]."""
        words = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.text_encoder.device)
        states = self.text_encoder(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        return states.last_hidden_state, words["attention_mask"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        num_inference_steps: int = 12,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput:
        """Paint a picture for each prompt.

        guidance_scale: 1 paints by the words alone; above, the transformer runs on twice the batch, first without
        words, then with them, and goes on from the one beyond the other.
        generator: of the noise that pictures are painted from; a list has one for each prompt.
        output_type: "pil", "np" (0 to 1) or "pt" (0 to 1, [batch, 3, row, column]).
        callback_on_step_end: given (pipeline, step, timestep, {"latents": pixels from -1 to 1, as noisy as they still
        are}) after each step; gives back a dict, and "latents" in it are gone on with.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        guided = guidance_scale > 1
        states, mask = self.encode_prompt([""] * len(texts) * guided + texts)
        config = self.transformer.config
        shape = len(texts), config.in_channels, config.sample_size, config.sample_size
        pixels = randn_tensor(shape, generator=generator).to(self._execution_device, self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=pixels.device)
        for step, time in enumerate(self.progress_bar(self.scheduler.timesteps)):
            picture = self.transformer(
                torch.cat([pixels] * (1 + guided)),
                encoder_hidden_states=states,
                timestep=time.expand(len(states)),
                encoder_attention_mask=mask,
            ).sample
            if guided:
                without, with_words = picture.chunk(2)
                picture = without + guidance_scale * (with_words - without)
            pixels = self.scheduler.step(picture, time, pixels, return_dict=False)[0]
            if callback_on_step_end is not None:
                pixels = callback_on_step_end(self, step, time, {"latents": pixels}).get("latents", pixels)
        return ImagePipelineOutput(images=self.image_processor.postprocess(pixels, output_type))
