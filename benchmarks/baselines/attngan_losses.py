"""What AttnGAN minimises: how well words and images match (DAMSM), and the discriminators' and the generator's losses.

Shapes: B images with their captions, T words, P regions of an image, E width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.attngan_networks import Discriminator, Words

# Of the published configuration for birds: sharpness of a word's regions, of a caption's best words, and of the softmax over pairs;
# and the weight of the matching losses beside the discriminators'.
REGION_GAMMA, WORD_GAMMA, PAIR_GAMMA = 4.0, 5.0, 10.0
MATCHING_WEIGHT = 5.0
_EPSILON = 1e-8


def word_similarities(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """How well images fit captions by their parts, of every image with every caption.

    Each word attends to the regions that prefer it over other words; its cosine with what it sees counts, and the best words most.

    Args:
        regions: (B, P, E).
        words: (M, T, E).
        mask: (M, T) bool.

    Returns:
        (B, M): log of the sum over words of exp(WORD_GAMMA * cosine).
    """
    scores = torch.einsum("bpe,mte->bmpt", regions, words)
    preferred = scores.masked_fill(~mask[None, :, None], -torch.inf).softmax(dim=3)
    attention = (REGION_GAMMA * preferred).softmax(dim=2)
    seen = torch.einsum("bmpt,bpe->bmte", attention, regions)
    cosines = F.cosine_similarity(seen, words[None], dim=3, eps=_EPSILON)
    return (WORD_GAMMA * cosines).masked_fill(~mask[None], -torch.inf).logsumexp(dim=2)


def sentence_similarities(images: Tensor, sentences: Tensor) -> Tensor:
    """Cosines of (B, E) and (M, E): (B, M)."""
    return F.normalize(images, dim=1, eps=_EPSILON) @ F.normalize(sentences, dim=1, eps=_EPSILON).T


def matching_loss(similarities: Tensor, captions: Tensor) -> Tensor:
    """Cross-entropy of finding an image's caption and a caption's image; other pairs with an equal caption are no mistakes.

    Args:
        similarities: (B, B).
        captions: (B,), equal numbers for equal captions.

    Returns:
        scalar, the sum of both directions.
    """
    pairs = torch.arange(len(captions), dtype=torch.int64, device=captions.device)
    same = (captions[:, None] == captions) & (pairs[:, None] != pairs)
    logits = (PAIR_GAMMA * similarities).masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)


def damsm_loss(encoded: tuple[Tensor, Tensor], text: Words, captions: Tensor) -> Tensor:
    """Both matching losses, of words with regions and of captions with whole images.

    Args:
        encoded: (B, P, E) regions and (B, E) images.
        captions: as in `matching_loss`.
    """
    regions, images = encoded
    by_words = word_similarities(regions, text.words, text.mask)
    return matching_loss(by_words, captions) + matching_loss(sentence_similarities(images, text.sentence), captions)


def discriminator_loss(network: Discriminator, real: Tensor, generated: Tensor, sentences: Tensor) -> Tensor:
    """Real ones with their captions are right; generated ones, and real ones with the next pair's caption, are wrong."""
    of_real, of_generated = network(real), network(generated.detach())
    wrong = network.logits(of_real[:-1], sentences[1:])
    right = _real(network.unconditional_logits(of_real)) + _real(network.logits(of_real, sentences))
    fake = _fake(network.unconditional_logits(of_generated)) + _fake(network.logits(of_generated, sentences))
    return right / 2 + (fake + _fake(wrong)) / 3


def generator_loss(network: Discriminator, generated: Tensor, sentences: Tensor) -> Tensor:
    """What a discriminator must take for real."""
    features = network(generated)
    return _real(network.unconditional_logits(features)) + _real(network.logits(features, sentences))


def _real(logits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def _fake(logits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
