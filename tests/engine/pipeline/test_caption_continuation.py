"""Caption continuation: cached == uncached, alone == in a batch, and nothing but words."""

import pytest
import torch
from torch import Tensor

from engine.config.transformer import TransformerConfig
from engine.data.tokenizer import CaptionTokenizer, train_tokenizer
from engine.errors import InputError
from engine.models.transformer import KoDalle
from engine.pipeline.caption_continuation import allowed_tokens, continue_caption, continue_tokens
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels import reference
from tests.engine.decoding.cases import OPTIONS

CAPTIONS = [
    f"{garment}에서 {attribute} {value}이다."
    for garment in ("상의", "하의", "원피스")
    for attribute, value in (("색상은", "레드"), ("카테고리는", "셔츠"), ("소매기장은", "긴팔"), ("프린트에는", "도트"))
]
CONFIG = TransformerConfig(
    dim=48,
    num_layers=3,
    num_heads=2,
    head_dim=16,
    text_vocab_size=80,
    text_seq_len=14,
    text_position_rows=16,
    image_vocab_size=20,
    image_grid_size=2,
)
BEGINNING = "상의에서 색상은"
GREEDY = SamplingParams(temperature=0)
MIXED = [SamplingParams(), SamplingParams(temperature=0.7, top_k=12), GREEDY, SamplingParams(top_k=30, top_p=0.8)]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=60)


@pytest.fixture(scope="module")
def model() -> KoDalle:
    return _model()


def _model(**sizes: int) -> KoDalle:
    """A fresh model's tokens depend on hardly anything but the token before them and the noise: this one's on everything."""
    torch.manual_seed(0)
    model = KoDalle(CONFIG.model_copy(update=sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(1.0)
            elif name.endswith("x0_scalars"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif model.config.zero_init_branches and name.endswith(("out.weight", "shrink.weight")):
                parameter.normal_(0, 0.3)
            elif name.endswith(("qkv.weight", "attention.out.weight", "head.weight")):
                parameter.mul_(3)
    return model


def _requests(count: int) -> list[SequenceRequest]:
    return [SequenceRequest(0, MIXED[i % len(MIXED)].updated(seed=9 + i // 8), candidate=i % 8) for i in range(count)]


@torch.no_grad()
def _uncached(
    model: KoDalle, first: list[int], request: SequenceRequest, allowed: Tensor, end_ids: frozenset[int]
) -> list[int]:
    """Whole forward passes over the caption so far, [PAD] after it."""
    length, option = model.config.text_seq_len, request.sampling_params
    sampled: list[int] = []
    while len(first) + len(sampled) < length and not end_ids & set(sampled):
        ids = [*first, *sampled]
        text = torch.tensor([ids + [1] * (length - len(ids))])
        logits = model.logits(text, torch.zeros(1, 1, dtype=torch.int64))[0][:, len(ids)]  # (1, V_text + reserved)
        token = reference.sample(
            logits[:, : len(allowed)].masked_fill(~allowed, -torch.inf),
            torch.tensor([request.seed]),
            torch.tensor([request.candidate]),
            torch.tensor([2**31 + len(ids) + 1]),
            torch.tensor([option.temperature]),
            torch.tensor([option.top_k or 0]),
            torch.tensor([option.top_p or 1.0]),
        )
        sampled.append(int(token))
    return sampled


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="plain"), pytest.param(OPTIONS["all"], id="with options", marks=pytest.mark.slow)],
)
def test_cached_tokens_equal_uncached_tokens(options: dict[str, bool], tokenizer: CaptionTokenizer) -> None:
    model = _model(**options)
    allowed, end_ids, requests = allowed_tokens(tokenizer), tokenizer.end_ids, _requests(24)
    for beginning in ("", BEGINNING):
        first = tokenizer.encode_beginning(beginning)
        sampled = continue_tokens(model, first, requests, allowed=allowed, end_ids=end_ids)
        for request, tokens in zip(requests, sampled, strict=True):
            assert tokens == _uncached(model, first, request, allowed, end_ids), request
        lengths = {len(tokens) for tokens in sampled}
        assert len(lengths) > 3, "sequences that all end together would not test how they end apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_alone_equals_the_sequence_in_a_batch(dtype: torch.dtype, tokenizer: CaptionTokenizer) -> None:
    """Also bit by bit: hidden states of odd sizes at the published width, which tokens would hide."""
    model = _model(dim=1024, num_layers=1, num_heads=8, head_dim=64).to(dtype)
    first, requests = tokenizer.encode_beginning(BEGINNING), _requests(21)
    seen: list[Tensor] = []

    def run(some: list[SequenceRequest]) -> tuple[list[list[int]], list[Tensor]]:
        seen.clear()
        handle = model.head.norm.register_forward_hook(lambda *call: seen.append(call[2].clone()))
        tokens = continue_tokens(
            model, first, some, allowed=allowed_tokens(tokenizer), end_ids=frozenset()
        )  # none ends: equally many steps
        handle.remove()
        return tokens, list(seen)

    whole, hidden = run(requests[:16])
    assert [len(tokens) for tokens in whole] == [CONFIG.text_seq_len - len(first)] * 16
    for places in ([3], [15], [9, 2], list(range(7, 16))):
        some, some_hidden = run([requests[number] for number in places])
        assert some == [whole[number] for number in places]
        for step, expected in zip(some_hidden, hidden, strict=True):
            assert torch.equal(step[: len(places)], expected[places]), places
    assert run(requests)[0][:16] == whole


def test_same_seed_same_captions_any_count(model: KoDalle, tokenizer: CaptionTokenizer) -> None:
    lines = continue_caption(model, tokenizer, BEGINNING, count=20, seed=3)
    assert continue_caption(model, tokenizer, BEGINNING, count=20, seed=3) == lines
    for count in (1, 5, 17):
        assert continue_caption(model, tokenizer, BEGINNING, count=count, seed=3) == lines[:count]
    assert [(line.candidate, line.seed) for line in lines] == [(number, 3) for number in range(20)]
    assert len({line.text for line in lines}) > 10
    assert continue_caption(model, tokenizer, BEGINNING, count=5, seed=4) != lines[:5]
    assert (
        len({line.text for line in continue_caption(model, tokenizer, BEGINNING, count=5, sampling_params=GREEDY)}) == 1
    )


def test_global_generator_and_mode_are_left_alone(model: KoDalle, tokenizer: CaptionTokenizer) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model.train()
    continue_caption(model, tokenizer, BEGINNING)
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)


def test_only_words_and_ends_are_sampled(tokenizer: CaptionTokenizer) -> None:
    """The model wants nothing but what is forbidden: [CLS], [UNK], [MASK], rows without an entry, reserved rows."""
    model, first, requests = _model(), tokenizer.encode_beginning(BEGINNING), _requests(16)
    forbidden = [0, 3, 4, *range(tokenizer.vocab_size, model.head.num_text_rows)]
    with torch.no_grad():
        model.head.bias[forbidden] += 200
    allowed = allowed_tokens(tokenizer)
    assert sorted(set(range(model.head.num_text_rows)) - set(allowed.nonzero()[:, 0].tolist())) == forbidden
    sampled = continue_tokens(model, first, requests, allowed=allowed, end_ids=tokenizer.end_ids)
    assert not {token for tokens in sampled for token in tokens} & set(forbidden)
    everything = torch.ones(model.config.text_vocab_size, dtype=torch.bool)
    unguarded = continue_tokens(model, first, requests, allowed=everything, end_ids=tokenizer.end_ids)
    assert {token for tokens in unguarded for token in tokens} <= set(forbidden)


@pytest.mark.parametrize("end", [2, 1])
def test_separator_and_padding_end_a_caption(end: int, tokenizer: CaptionTokenizer) -> None:
    model = _model()
    with torch.no_grad():
        model.head.bias[end] += 200
    for line in continue_caption(model, tokenizer, BEGINNING):
        assert (line.text, line.is_complete) == (BEGINNING, True)
        assert list(line.text_tokens) == tokenizer.encode_beginning(BEGINNING)


def test_a_full_text_is_not_complete(tokenizer: CaptionTokenizer) -> None:
    model = _model()
    with torch.no_grad():
        model.head.bias[sorted(tokenizer.end_ids)] -= 200
    for line in continue_caption(model, tokenizer, BEGINNING):
        assert (len(line.text_tokens), line.is_complete) == (CONFIG.text_seq_len, False)


def test_text_begins_as_it_was_written_and_joins_words(tokenizer: CaptionTokenizer) -> None:
    _, word, *_, piece = tokenizer.encode_beginning("레드이다")
    # 龍 is no letter of the tokenizer's: [UNK], which decoding leaves out
    for beginning in (BEGINNING, f"{BEGINNING}  ", "龍", f"龍 {BEGINNING}", ""):
        added = _room(tokenizer, beginning)
        assert added > 5
        assert _text_of_one_token(tokenizer, word, beginning) == " ".join([*beginning.split(), *["레"] * added])
    assert _text_of_one_token(tokenizer, piece, "레드") == "레드" + "이다" * _room(tokenizer, "레드")


def _room(tokenizer: CaptionTokenizer, beginning: str) -> int:
    return CONFIG.text_seq_len - len(tokenizer.encode_beginning(beginning))


def _text_of_one_token(tokenizer: CaptionTokenizer, token: int, beginning: str) -> str:
    model = _model()
    with torch.no_grad():
        model.head.bias[token] += 200
    return continue_caption(model, tokenizer, beginning, count=1, sampling_params=GREEDY)[0].text


def test_beginning_has_no_end(tokenizer: CaptionTokenizer) -> None:
    whole = tokenizer.encode([BEGINNING], 14).tokens[0].tolist()
    assert tokenizer.encode_beginning(BEGINNING) == whole[: whole.index(2)]
    assert tokenizer.encode_beginning("") == [0]
    assert tokenizer.end_ids == {1, 2}
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}


def test_noise_is_not_that_of_images() -> None:
    seed, candidate = torch.tensor([7]), torch.tensor([0])
    sampled = {
        tuple(reference.gumbel_noise(seed, candidate, torch.tensor([first + position]), 8)[0].tolist())
        for first in (0, 2**31)
        for position in range(100)
    }
    assert len(sampled) == 200


def test_bad_requests(model: KoDalle, tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(InputError, match=r"caption: .*tokens and the model's text 14: shorten it"):
        continue_caption(model, tokenizer, BEGINNING * 5)
    with pytest.raises(InputError, match=r"guidance_scale: 2.0: guides images, not captions"):
        continue_caption(model, tokenizer, BEGINNING, sampling_params=SamplingParams(guidance_scale=2.0))
    with pytest.raises(InputError, match="count: 0"):
        continue_caption(model, tokenizer, BEGINNING, count=0)
    with pytest.raises(InputError, match="seed: -1"):
        continue_caption(model, tokenizer, BEGINNING, seed=-1)
