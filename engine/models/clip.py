"""CLIP of two transformers as a ranker: transformers' `CLIPModel` behind KoCLIP's interface. Imported, not trained here.

minDALL-E ranks with OpenAI's ViT-B/32; Korean CLIPs in this form exist too. It has a tokenizer of its own, which the model folder
keeps beside the transformer's (engine.models.folder).

Shapes: B images, M captions, S pixels, T text tokens, E embed_dim.
Source: Radford et al. 2021, arXiv:2103.00020; transformers `CLIPModel`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.ranker import ClipConfig
from engine.models.environment import check_torchvision

_LEGACY_END_TOKEN = 2  # in older configs; such models end where the highest token is


class Clip(nn.Module):
    """Image and caption encoders with a shared space; an `engine.models.ranker.Ranker`.

    Raises:
        InputError: an installation that cannot load the encoders.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        check_torchvision()
        from transformers import CLIPConfig, CLIPModel

        self.config = config
        shared = {"hidden_act": config.activation, "layer_norm_eps": config.layer_norm_eps}
        text = shared | {
            "vocab_size": config.text_vocab_size, "hidden_size": config.text_dim,
            "intermediate_size": config.text_ff_dim, "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads, "max_position_embeddings": config.text_seq_len,
            "eos_token_id": config.end_token, "bos_token_id": 0, "pad_token_id": 0,
        }  # fmt: skip
        vision = shared | {
            "hidden_size": config.image_dim, "intermediate_size": config.image_ff_dim,
            "num_hidden_layers": config.image_layers, "num_attention_heads": config.image_heads,
            "image_size": config.image_size, "patch_size": config.patch_size,
        }  # fmt: skip
        sizes = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embed_dim)
        self.network = CLIPModel(sizes).float()  # transformers builds in the default dtype

    @property
    def image_embedding_shape(self) -> tuple[int, ...]:
        """Shape of one image's embedding."""
        return (self.config.embed_dim,)

    @property
    def text_embedding_shape(self) -> tuple[int, ...]:
        """Shape of one caption's embedding."""
        return (self.config.embed_dim,)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images to the shared space: (B, 3, any, any) float in [0, 1] -> (B, E) float32 of unit length.

        Raises:
            ValueError: wrong shape or type.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, S, S) float in [0, 1], got {tuple(images.shape)} {images.dtype}")
        return self.embed_pixels(self.prepare(images))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Prepared images to the shared space: (B, 3, S, S) -> (B, E) float32 of unit length. Without checks, with gradients."""
        pixels = pixels.to(self.network.visual_projection.weight.dtype)
        pooled = self.network.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.network.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, text_tokens: Tensor) -> Tensor:
        """Captions to the shared space: (M, T) integers with an end token -> (M, E) float32 of unit length.

        What follows the end token does not count: attention is causal.

        Raises:
            ValueError: wrong shape or type, or longer than config.text_seq_len.
        """
        if text_tokens.dim() != 2 or text_tokens.is_floating_point():
            raise ValueError(f"text tokens must be (M, T) integers, got {tuple(text_tokens.shape)} {text_tokens.dtype}")
        if text_tokens.shape[1] > self.config.text_seq_len:
            raise ValueError(f"{text_tokens.shape[1]} text tokens, this CLIP has {self.config.text_seq_len}")
        pooled = self.network.text_model(input_ids=text_tokens.long()).pooler_output
        return F.normalize(self.network.text_projection(pooled).float(), dim=-1)

    def trim(self, text_tokens: list[int]) -> list[int]:
        """A caption's tokens up to its end token."""
        end = max(text_tokens) if self.config.end_token == _LEGACY_END_TOKEN else self.config.end_token
        return text_tokens[: text_tokens.index(end) + 1] if end in text_tokens else text_tokens

    def scores(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Cosines of each image and each caption: (B, E), (M, E) -> (M, B)."""
        return text_embeddings @ image_embeddings.T

    def caption_scores(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """`scores` the other way round, (B, M): captions for an image."""
        return self.scores(image_embeddings, text_embeddings).T

    def similarity(self, images: Tensor, text_tokens: Tensor) -> Tensor:
        """`scores` of images (B, 3, any, any) in [0, 1] and captions (M, T): (M, B)."""
        return self.scores(self.embed_images(images), self.embed_texts(text_tokens))

    def loss(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Contrastive loss of B pairs, as `KoClip.loss`: a metric here."""
        logits = self.scores(image_embeddings, text_embeddings) * self.network.logit_scale.float().exp().clamp(max=100)
        pairs = torch.arange(len(logits), dtype=torch.int64, device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    def prepare(self, images: Tensor) -> Tensor:
        """CLIP's preprocessing: shorter side to S, bicubic; the middle square; normalised. (B, 3, any, any) -> (B, 3, S, S)."""
        S = self.config.image_size
        images = images.float()
        height, width = images.shape[2:]
        shorter = min(height, width)
        if shorter != S:
            size = (max(S, math.floor(height * S / shorter)), max(S, math.floor(width * S / shorter)))
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(
                0.0, 1.0
            )
        top, left = (images.shape[2] - S) // 2, (images.shape[3] - S) // 2
        images = images[:, :, top : top + S, left : left + S]
        mean, std = (
            images.new_tensor(values).view(1, 3, 1, 1) for values in (self.config.image_mean, self.config.image_std)
        )
        return (images - mean) / std
