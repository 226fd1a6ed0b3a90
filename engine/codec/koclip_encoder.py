"""KoCLIP's two encoders for ranking: the same embeddings as `KoClip`'s up to rounding, at less cost.

    pictures, CPU    BatchNorm folded into the convolutions, channels last, a picture a thread (engine.codec.threads)
    pictures, GPU    the same as one CUDA graph of 16 pictures, filled up with zeros
    captions         each alone, without its padding, and only once: embeddings are kept by their tokens
    captions, GPU    one CUDA graph of a padded caption

Sixteen pictures of 256 x 256 through EfficientNet-B0, two busy cores: KoClip.embed_images 5.0 s, folded and channels last
3.7 s, a picture a thread 1.5 s. A caption of 40 tokens in a row of 128: 0.8 s with its padding, 0.2 s without.

An embedding depends on its picture or caption alone, bit for bit, whatever is embedded beside it.

B pictures, M captions, T text tokens, E width of the shared space, S pixels.
"""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine.codec.captured import Captured
from engine.codec.threads import single_threads
from engine.models.koclip import PAD_TOKEN, KoClip

_PICTURES_AT_ONCE = 16  # on a GPU; what a drawing has
_CAPTIONS_KEPT = 4096  # 2 KB each
# transformers' names in an EfficientNet: each convolution with the BatchNorm that follows it.
_FOLDED = {
    "convolution": "batchnorm",
    "expand_conv": "expand_bn",
    "depthwise_conv": "depthwise_norm",
    "project_conv": "project_bn",
    "top_conv": "top_bn",
}


class KoclipEncoder:
    """Embeds as the KoCLIP that it was made of was, in eval mode.

    Args:
        koclip: on a CPU or a GPU, of any type. Its image encoder is copied, its text encoder shared.
        graphed: on a GPU, False runs the same operations one by one.
    """

    def __init__(self, koclip: KoClip, *, graphed: bool = True) -> None:
        shared = (koclip.text_encoder, koclip.text_projection)
        self._koclip: KoClip = copy.deepcopy(koclip, {id(module): module for module in shared}).eval()
        with torch.no_grad():
            fold_batch_norms(self._koclip.image_encoder)
        self._koclip.image_encoder.to(memory_format=torch.channels_last)
        self._device = koclip.image_projection.projection.weight.device
        self._graphed = graphed and self._device.type == "cuda"
        self._image_graph: Captured | None = None  # each captured when it is first needed
        self._text_graph: Captured | None = None
        self._texts: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()  # embeddings (E,), the last used at the end

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures to the shared space: (B, 3, any, any) float in [0, 1] -> (B, E) float32. As `KoClip.embed_images`.

        Raises:
            ValueError: wrong shape or type.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, S, S) float in [0, 1], got {tuple(images.shape)} {images.dtype}")
        if len(images) == 0:
            return torch.empty(0, self._koclip.config.embed_dim, device=images.device)
        if self._device.type == "cpu":
            alone = torch.no_grad()(self._koclip.embed_images)
            with single_threads() as (pool, _):
                return torch.cat(list(pool.map(alone, images.split(1))))
        return torch.cat([self._embed_filled(part) for part in images.split(_PICTURES_AT_ONCE)])

    @torch.no_grad()
    def embed_texts(self, text_tokens: Tensor) -> Tensor:
        """Captions to the shared space: (M, T) integers, padded with 1 -> (M, E) float32. As `KoClip.embed_texts`.

        Raises:
            ValueError: wrong shape or type, or longer than the config's text_seq_len.
        """
        longest = self._koclip.config.text_seq_len
        if text_tokens.dim() != 2 or text_tokens.is_floating_point():
            raise ValueError(f"text tokens must be (M, T) integers, got {tuple(text_tokens.shape)} {text_tokens.dtype}")
        if text_tokens.shape[1] > longest:
            raise ValueError(f"{text_tokens.shape[1]} text tokens, this KoCLIP takes {longest}")
        if len(text_tokens) == 0:
            return torch.empty(0, self._koclip.config.embed_dim, device=text_tokens.device)
        return torch.stack([self._text(row) for row in text_tokens.tolist()]).to(text_tokens.device)

    def _text(self, row: list[int]) -> Tensor:
        """(E,) of one caption."""
        while len(row) > 1 and row[-1] == PAD_TOKEN:
            row.pop()
        key = tuple(row)
        if key not in self._texts:
            self._texts[key] = self._embed_caption(row)
            if len(self._texts) > _CAPTIONS_KEPT:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def _embed_caption(self, row: list[int]) -> Tensor:
        if not self._graphed:
            return self._koclip.embed_texts(torch.tensor([row], device=self._device))[0]
        row = row + [PAD_TOKEN] * (self._koclip.config.text_seq_len - len(row))
        tokens = torch.tensor([row], device=self._device)
        if self._text_graph is None:
            # Warmed with padding: without any, transformers would go another way than the capture does.
            padded = torch.full_like(tokens, PAD_TOKEN)
            padded[:, 0] = tokens[:, 0]
            self._text_graph = Captured(self._koclip.embed_texts, padded)
        return self._text_graph(tokens)[0]

    def _embed_filled(self, images: Tensor) -> Tensor:
        """Up to `_PICTURES_AT_ONCE` pictures, always as many: cuDNN picks its arithmetic by their number."""
        filled = images.new_zeros(_PICTURES_AT_ONCE, *images.shape[1:])
        filled[: len(images)] = images
        if not self._graphed:
            return self._koclip.embed_images(filled)[: len(images)]
        pixels = self._koclip.prepare(filled)  # outside the graph: it makes small tensors from the host's numbers
        if self._image_graph is None:
            self._image_graph = Captured(self._koclip.embed_pixels, pixels)
        return self._image_graph(pixels)[: len(images)]


def fold_batch_norms(encoder: nn.Module) -> None:
    """Puts each BatchNorm of an EfficientNet in eval mode into the convolution before it, in place.

    Raises:
        ValueError: a BatchNorm that has none: transformers calls its layers by other names than these.
    """
    for module in list(encoder.modules()):
        for convolution, norm in _FOLDED.items():
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    left = [name for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if left:
        raise ValueError(f"image encoder: {left[0]} follows no convolution that is known")
