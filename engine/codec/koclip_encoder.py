"""KoCLIP's two encoders for ranking: the same embeddings as `KoClip`'s up to rounding, at less cost.

    images, CPU      BatchNorm folded into the convolutions, channels last, an image a thread (engine.codec.threads)
    images, GPU      the same as one CUDA graph of 16 images, padded with zeros
    captions         one at a time, without padding, and only once: embeddings are cached by their tokens
    captions, GPU    one CUDA graph of a padded caption

CLIPs of two transformers have no BatchNorm to fold: their images and captions go through the modules, without graphs.

Sixteen images of 256 x 256 through EfficientNet-B0, two busy cores: KoClip.embed_images 5.0 s, folded and channels last
3.7 s, an image a thread 1.5 s. A caption of 40 tokens padded to 128: 0.8 s with its padding, 0.2 s without.

Embeddings are batch-invariant: they depend on the image or the caption alone, bit for bit.

B images, M captions, T text tokens, E width of the shared space, S pixels. (B, E) and (M, E) have one dimension more with
`token_similarity`: see `KoClip`.
"""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine.codec.captured import Captured
from engine.codec.threads import single_threads
from engine.models.koclip import KoClip
from engine.models.ranker import Ranker
from engine.models.roberta import PAD_TOKEN

_GRAPH_IMAGES = 16  # batch of the CUDA graph; the default number of candidates
_CACHED_CAPTIONS = 4096  # embeddings of 2 KB each
# transformers' names in an EfficientNet: each convolution with the BatchNorm that follows it.
_FOLDED = {
    "convolution": "batchnorm",
    "expand_conv": "expand_bn",
    "depthwise_conv": "depthwise_norm",
    "project_conv": "project_bn",
    "top_conv": "top_bn",
}


class KoclipEncoder:
    """The encoders of a KoCLIP in eval mode.

    Args:
        koclip: on a CPU or a GPU, of any dtype. A KoCLIP's image encoder is copied, its text encoder shared.
        graphed: on a GPU, False runs the same operations without a CUDA graph.
    """

    def __init__(self, koclip: Ranker, *, graphed: bool = True) -> None:
        self._koclip: Ranker = _folded(koclip) if isinstance(koclip, KoClip) else koclip.eval()
        self._device = next(koclip.parameters()).device
        self._graphed = graphed and self._device.type == "cuda" and isinstance(koclip, KoClip)
        self._image_graph: Captured | None = None  # each captured on first use
        self._text_graph: Captured | None = None
        self._texts: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()  # the most recently used last

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images to the shared space: (B, 3, any, any) float in [0, 1] -> (B, E) float32. As `KoClip.embed_images`.

        Raises:
            ValueError: wrong shape or type.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B, 3, S, S) float in [0, 1], got {tuple(images.shape)} {images.dtype}")
        if len(images) == 0:
            return torch.empty(0, *self._koclip.image_embedding_shape, dtype=torch.float32, device=images.device)
        if self._device.type == "cpu":
            embed_image = torch.no_grad()(self._koclip.embed_images)
            with single_threads() as (pool, _):
                return torch.cat(list(pool.map(embed_image, images.split(1))))
        return torch.cat([self._embed_padded(part) for part in images.split(_GRAPH_IMAGES)])

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
            return torch.empty(0, *self._koclip.text_embedding_shape, dtype=torch.float32, device=text_tokens.device)
        return torch.stack([self._text_embedding(tokens) for tokens in text_tokens.tolist()]).to(text_tokens.device)

    def _text_embedding(self, tokens: list[int]) -> Tensor:
        """Embedding of one caption, from the cache or the encoder."""
        tokens = self._koclip.trim(tokens)
        key = tuple(tokens)
        if key not in self._texts:
            self._texts[key] = self._embed_caption(tokens)
            if len(self._texts) > _CACHED_CAPTIONS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]

    def _embed_caption(self, text_tokens: list[int]) -> Tensor:
        padding = self._koclip.config.text_seq_len - len(text_tokens) if self._graphed else 0
        tokens = torch.tensor([text_tokens + [PAD_TOKEN] * padding], dtype=torch.int64, device=self._device)
        if not self._graphed:
            return self._koclip.embed_texts(tokens)[0]
        if self._text_graph is None:
            self._text_graph = Captured(self._koclip.embed_texts, tokens)
        return self._text_graph(tokens)[0]

    def _embed_padded(self, images: Tensor) -> Tensor:
        """Up to `_GRAPH_IMAGES` images, padded to as many: cuDNN picks its algorithm by the batch size."""
        padded = images.new_zeros(_GRAPH_IMAGES, *images.shape[1:])
        padded[: len(images)] = images
        if not self._graphed or not isinstance(self._koclip, KoClip):
            return self._koclip.embed_images(padded)[: len(images)]
        pixels = self._koclip.prepare(padded)  # outside the graph: it copies small tensors from the host
        if self._image_graph is None:
            self._image_graph = Captured(self._koclip.embed_pixels, pixels)
        return self._image_graph(pixels)[: len(images)]


def _folded(koclip: KoClip) -> KoClip:
    """A copy with its BatchNorms folded, channels last; it shares the text encoder."""
    shared = [part for name, part in koclip.named_children() if name == "text_encoder" or "text_projection" in name]
    copied: KoClip = copy.deepcopy(koclip, {id(module): module for module in shared}).eval()
    with torch.no_grad():
        fold_batch_norms(copied.image_encoder)
    copied.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def fold_batch_norms(encoder: nn.Module) -> None:
    """Folds each BatchNorm of an EfficientNet in eval mode into the convolution before it, in place.

    Raises:
        ValueError: a BatchNorm without one: transformers uses other layer names than these.
    """
    for module in list(encoder.modules()):
        for convolution, norm in _FOLDED.items():
            if isinstance(getattr(module, norm, None), nn.BatchNorm2d):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    unfolded = [name for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if unfolded:
        raise ValueError(f"image encoder: {unfolded[0]} follows no convolution that is known")
