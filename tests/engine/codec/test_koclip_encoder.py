"""The ranking encoders: the embeddings of KoCLIP, batch invariance, the cache of captions."""

import pytest
import torch

from engine.codec import koclip_encoder
from engine.codec.koclip_encoder import KoclipEncoder, fold_batch_norms
from engine.config.ranker import KoclipConfig
from engine.models.koclip import KoClip

HAS_CUDA = torch.cuda.is_available()


def _koclip(**changes: object) -> KoClip:
    torch.manual_seed(0)
    sizes = {
        "image_size": 32, "image_width": 0.25, "image_depth": 0.25, "image_hidden_dim": 320, "embed_dim": 16,
        "text_vocab_size": 64, "text_seq_len": 12, "text_position_rows": 16, "text_dim": 16, "text_layers": 2,
        "text_heads": 2, "text_ff_dim": 32,
    }  # fmt: skip
    koclip = KoClip(KoclipConfig(**(sizes | changes))).train()
    # As if trained: folding must use all four tensors of a BatchNorm, and images must not have equal embeddings.
    for module in koclip.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            module.momentum = 0.9
    with torch.no_grad():
        koclip.embed_images(_images(8))
    return koclip.eval()


def _images(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def _texts() -> torch.Tensor:
    texts = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((12, 5, 1, 9)):
        texts[row, length:] = 1
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["cosine", "published"])
@pytest.mark.parametrize("size", [32, 40])
def test_embeds_as_koclip(similarity: str, size: int) -> None:
    koclip = _koclip(similarity=similarity)
    before = {name: tensor.clone() for name, tensor in koclip.state_dict().items()}
    encoder = KoclipEncoder(koclip)
    with torch.no_grad():
        images, texts = koclip.embed_images(_images(3, size)), koclip.embed_texts(_texts())
    torch.testing.assert_close(encoder.embed_images(_images(3, size)), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.embed_texts(_texts()), texts, atol=1e-5, rtol=1e-4)
    assert images.std(0).max() > 1e-4  # images have different embeddings
    assert all(torch.equal(tensor, before[name]) for name, tensor in koclip.state_dict().items())


def test_batch_invariance() -> None:
    encoder = KoclipEncoder(_koclip())
    images, texts = _images(5), _texts()
    together = encoder.embed_images(images)
    for rows in ([0], [4], [3, 1]):
        assert torch.equal(encoder.embed_images(images[rows]), together[rows])
    expected = encoder.embed_texts(texts)
    for rows in ([2], [3, 0]):
        assert torch.equal(KoclipEncoder(_koclip()).embed_texts(texts[rows]), expected[rows])
    assert encoder.embed_images(images[:0]).shape == (0, 16)
    assert encoder.embed_texts(texts[:0]).shape == (0, 16)


def test_captions_are_cached_and_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, texts = KoclipEncoder(_koclip()), _texts()
    encoded: list[list[int]] = []
    plain = encoder._embed_caption

    def count(tokens: list[int]) -> torch.Tensor:
        encoded.append(tokens)
        return plain(tokens)

    monkeypatch.setattr(encoder, "_embed_caption", count)
    monkeypatch.setattr(koclip_encoder, "_CACHED_CAPTIONS", 2)
    first = encoder.embed_texts(texts[:2])
    assert torch.equal(encoder.embed_texts(texts[:2]), first)
    assert torch.equal(encoder.embed_texts(texts[1:2, :7]), first[1:])  # less padding is the same caption
    assert len(encoded) == 2
    encoder.embed_texts(texts[2:3])  # the oldest, row 0, goes
    encoder.embed_texts(texts[1:2])
    assert len(encoded) == 3
    encoder.embed_texts(texts[:1])
    assert len(encoded) == 4


def test_refuses_what_koclip_refuses() -> None:
    koclip = _koclip()
    encoder = KoclipEncoder(koclip)
    for images in (torch.rand(2, 1, 32, 32), torch.rand(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        for embedder in (koclip, encoder):
            with pytest.raises(ValueError, match="images must be"):
                embedder.embed_images(images)
    for texts in (torch.zeros(2, 12), torch.zeros(12, dtype=torch.int64), torch.full((1, 13), 5)):
        for embedder in (koclip, encoder):
            with pytest.raises(ValueError, match="text tokens"):
                embedder.embed_texts(texts)


def test_a_batch_norm_without_a_known_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="image encoder: 1 follows no convolution that is known"):
        fold_batch_norms(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_on_a_gpu_graphed_equals_eager_and_is_batch_invariant() -> None:
    koclip = _koclip().cuda()
    encoder, eager = KoclipEncoder(koclip), KoclipEncoder(koclip, graphed=False)
    images, texts = _images(18).cuda(), _texts().cuda()
    together = encoder.embed_images(images)
    assert torch.equal(together, eager.embed_images(images))
    torch.testing.assert_close(encoder.embed_texts(texts), eager.embed_texts(texts), atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder.embed_images(images[[17, 3]]), together[[17, 3]])
