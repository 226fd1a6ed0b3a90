"""KoDalle against an independent loop-based implementation of DALLE-pytorch 1.1.x as KoDALLE used it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import layer_scale

TINY = TransformerConfig(
    dim=24,
    num_layers=3,
    num_heads=2,
    head_dim=8,
    text_vocab_size=20,
    text_seq_len=5,
    text_position_rows=9,
    image_vocab_size=13,
    image_grid_size=3,
)


def _tiny() -> KoDalle:
    torch.manual_seed(0)
    model = KoDalle(TINY)
    with torch.no_grad():  # LayerNorms and scales away from their plain first values
        for name, parameter in model.named_parameters():
            if "norm" in name or "scale" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    text = torch.tensor([[0, 7, 8, 2, 1], [0, 19, 2, 1, 1]])
    return text, torch.randint(0, TINY.image_vocab_size, (2, TINY.image_seq_len))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight + bias


def _ancestor_joint_logits(p: dict[str, Tensor], text: list[int], image: list[int], c: TransformerConfig) -> Tensor:
    """One row: (text_seq_len + image_seq_len, joint vocabulary), forbidden logits at -finfo.max."""
    text = [0, *text]  # <bos> before [CLS]
    xs = [p["text_embedding.tokens"][t] + p["text_embedding.positions"][i] for i, t in enumerate(text)]
    for i, token in enumerate(image):
        row, column = divmod(i, c.image_grid_size)
        position = p["image_embedding.rows"][row] + p["image_embedding.columns"][column]
        xs.append(p["image_embedding.tokens"][token] + position)
    xs = xs[:-1]
    inner = c.num_heads * c.head_dim
    for number in range(c.num_layers):
        a, f = f"layers.{number}.attention.", f"layers.{number}.feed_forward."
        qkv = [p[a + "qkv.weight"] @ _layer_norm(x, p[a + "norm.weight"], p[a + "norm.bias"]) for x in xs]
        attended = []
        for t in range(len(xs)):
            heads = []
            for h in range(c.num_heads):
                cut = slice(h * c.head_dim, (h + 1) * c.head_dim)
                q = qkv[t][:inner][cut] * c.head_dim**-0.5
                scores = torch.stack([q @ other[inner : 2 * inner][cut] for other in qkv[: t + 1]])
                weights = scores.softmax(0)
                heads.append(sum(w * other[2 * inner :][cut] for w, other in zip(weights, qkv, strict=False)))
            attended.append(p[a + "out.weight"] @ torch.cat(heads) + p[a + "out.bias"])
        xs = [x + p[a + "scale"] * y for x, y in zip(xs, attended, strict=True)]
        for t, x in enumerate(xs):
            grown = p[f + "grow.weight"] @ _layer_norm(x, p[f + "norm.weight"], p[f + "norm.bias"]) + p[f + "grow.bias"]
            value, gate = grown[: c.ff_mult * c.dim], grown[c.ff_mult * c.dim :]
            gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
            xs[t] = x + p[f + "scale"] * (p[f + "shrink.weight"] @ (value * gelu) + p[f + "shrink.bias"])
    split = c.text_vocab_size + c.text_seq_len
    rows = []
    for t, x in enumerate(xs):
        logits = p["head.weight"] @ _layer_norm(x, p["head.norm.weight"], p["head.norm.bias"]) + p["head.bias"]
        forbidden = slice(split, None) if t < c.text_seq_len else slice(0, split)
        logits[forbidden] = -torch.finfo(logits.dtype).max
        rows.append(logits)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def ancestor() -> Tensor:
    model = _tiny()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    text, image = _batch()
    rows = zip(text.tolist(), image.tolist(), strict=True)
    return torch.stack([_ancestor_joint_logits(parameters, t, i, TINY) for t, i in rows])


def test_logits_equal_the_ancestors(ancestor: Tensor) -> None:
    model = _tiny().eval()
    text_logits, image_logits = model.logits(*_batch())
    split = TINY.text_vocab_size + TINY.text_seq_len
    torch.testing.assert_close(text_logits, ancestor[:, : TINY.text_seq_len, :split], rtol=0, atol=2e-5)
    torch.testing.assert_close(image_logits, ancestor[:, TINY.text_seq_len :, split:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("weight", [7.0, 1.0])
def test_losses_equal_the_masked_joint_head(ancestor: Tensor, weight: float) -> None:
    text, image = _batch()
    split = TINY.text_vocab_size + TINY.text_seq_len
    targets = torch.cat([text, image + split], dim=1)  # first target is [CLS], [PAD] included
    each = F.cross_entropy(ancestor.transpose(1, 2), targets, reduction="none")
    loss_text, loss_image = each[:, : TINY.text_seq_len].mean(), each[:, TINY.text_seq_len :].mean()
    losses = _tiny()(text, image, loss_image_weight=weight)
    torch.testing.assert_close(losses.loss_text, loss_text)
    torch.testing.assert_close(losses.loss_image, loss_image)
    torch.testing.assert_close(losses.loss, (loss_text + weight * loss_image) / (1 + weight))
    hits = ancestor[:, TINY.text_seq_len :].argmax(-1) == image + split
    assert losses.image_top1 == hits.float().mean()


@pytest.mark.parametrize(("text_seq_len", "published"), [(128, 334_974_336), (64, 334_908_736)])
@pytest.mark.parametrize("embedding_std", [None, 0.02])
def test_parameter_counts_are_the_published_ones(
    text_seq_len: int, published: int, embedding_std: float | None
) -> None:
    with torch.device("meta"):
        model = KoDalle(TransformerConfig(text_seq_len=text_seq_len), embedding_std=embedding_std)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == published
    assert not list(model.buffers())


def test_row_1_of_both_text_tables_gets_no_gradient() -> None:
    model = _tiny()
    model(*_batch()).loss.backward()
    for table in (model.text_embedding.tokens, model.text_embedding.positions):
        assert table is not None
        assert table.grad is not None
        assert not table.grad[1].any()
        assert table.grad[0].any()
        assert table.grad[2].any()


def test_every_other_parameter_learns() -> None:
    model = _tiny()
    model(*_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_logits_see_the_past_only_and_pad_is_seen() -> None:
    model = _tiny().eval()
    text, image = _batch()
    _, before = model.logits(text, image)
    changed = image.clone()
    changed[:, 4] = (changed[:, 4] + 1) % TINY.image_vocab_size
    _, after = model.logits(text, changed)
    assert torch.equal(before[:, :5], after[:, :5])  # position i predicts token i and has read tokens before it
    assert not torch.equal(before[:, 5], after[:, 5])
    longer = text.clone()
    longer[:, -1] = 9  # was [PAD]
    assert not torch.equal(model.logits(longer, image)[1][:, 0], before[:, 0])


def test_first_tokens_alone_give_the_same_logits() -> None:
    model = _tiny().eval()
    text, image = _batch()
    _, whole = model.logits(text, image)
    _, first = model.logits(text, image[:, :4])
    torch.testing.assert_close(first, whole[:, :4], rtol=0, atol=1e-5)


def test_layer_scale_steps_with_depth() -> None:
    assert [layer_scale(number) for number in (1, 18, 19, 24, 25, 64)] == [0.1, 0.1, 1e-5, 1e-5, 1e-6, 1e-6]
    with torch.device("meta"):
        deep = KoDalle(TINY.model_copy(update={"num_layers": 25}))
    assert len(deep.layers) == 25


def test_first_values_are_torchs_or_scaled() -> None:
    config = TINY.model_copy(update={"dim": 64, "text_vocab_size": 500, "image_vocab_size": 500})
    torch.manual_seed(0)
    published, scaled = KoDalle(config), KoDalle(config, embedding_std=0.02)
    for table in ("text_embedding.tokens", "image_embedding.tokens", "image_embedding.rows"):
        assert published.get_parameter(table).std().item() == pytest.approx(1, abs=0.1)
        assert scaled.get_parameter(table).std().item() == pytest.approx(0.02, rel=0.1)
    for model in (published, scaled):
        assert not model.text_embedding.tokens[1].any()
        assert model.text_embedding.positions is not None
        assert not model.text_embedding.positions[1].any()
        assert model.head.weight.abs().max() <= 1 / 8


def test_noisy_tokens_are_seen_and_clean_ones_are_the_targets() -> None:
    model, (text, image) = _tiny(), _batch()
    noisy = (image + 1) % TINY.image_vocab_size
    losses = model(text, image, noisy)
    _, logits = model.logits(text, noisy)
    torch.testing.assert_close(losses.loss_image, F.cross_entropy(logits.flatten(0, 1), image.flatten()))
    assert losses.loss_image != model(text, image).loss_image
    torch.testing.assert_close(model(text, image, image), model(text, image))


def test_similar_codes_start_alike() -> None:
    config = TINY.model_copy(update={"dim": 256, "image_vocab_size": 100})
    torch.manual_seed(0)
    model = KoDalle(config, embedding_std=0.02)
    text_rows = model.head.weight[: model.head.num_text_rows].clone()
    codes = torch.randn(100, 32)
    codes[1] = codes[0] + 0.1 * torch.randn(32)
    model.start_from_codebook(codes)
    weight, bias = model.head.image_rows()
    for rows, std in ((model.image_embedding.tokens, 0.02), (weight, 1 / math.sqrt(3 * 256))):
        assert F.cosine_similarity(rows[0], rows[1], dim=0) > 0.95
        assert F.cosine_similarity(rows[0], rows[2], dim=0).abs() < 0.6
        assert rows.std().item() == pytest.approx(std, rel=0.05)
    assert not bias.any()
    assert torch.equal(model.head.weight[: model.head.num_text_rows], text_rows)


def test_dropout_falls_on_branches_in_training_only() -> None:
    config = TINY.model_copy(update={"attention_dropout": 0.5, "ff_dropout": 0.5})
    torch.manual_seed(0)
    model, (text, image) = KoDalle(config), _batch()
    assert model(text, image).loss != model(text, image).loss
    model.eval()
    assert model(text, image).loss == model(text, image).loss


def test_a_small_model_memorises() -> None:
    torch.manual_seed(0)
    model = KoDalle(TINY, embedding_std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    text, image = _batch()
    for _ in range(40):
        losses = model(text, image)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
    assert losses.image_top1 == 1
    assert losses.loss_image < 0.1
