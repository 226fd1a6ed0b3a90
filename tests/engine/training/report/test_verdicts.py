"""Each verdict is a function of figures: both sides of every threshold."""

import re

import pytest

from engine.training.report import verdicts


@pytest.mark.parametrize(
    ("recall", "among", "pairs", "level", "words"),
    [
        (0.01, 100, 137, "bad", "the ranker has learnt nothing: right and wrong captions score alike"),
        (0.25, 4, 4, "bad", "the ranker has learnt nothing"),
        (0.5, 4, 4, "unknown", "which luck can give"),
        (0.5, 6, 6, "unknown", "which luck can give"),
        (0.05, 100, 137, "good", "tells captions apart"),
        (0.022, 100, 137, "unknown", "luck can give"),
        (0.02, 100, 2000, "fair", "has learnt a little"),
        (1.0, 4, 4, "good", "tells captions apart"),
        (1.0, 1, 9, "unknown", "all the same"),
    ],
)
def test_ranker(recall: float, among: int, pairs: int, level: str, words: str) -> None:
    found = verdicts.ranker(recall, among, pairs)
    assert found.level == level, found
    assert words in found.text


def test_codebook_says_how_many_codes_are_in_use() -> None:
    found = verdicts.codebook(61, 1024, 175_000)
    assert found.text == "codebook: 61 of 1,024 codes in use"
    assert found.level == "bad"
    assert verdicts.codebook(200, 1024, 175_000).level == "fair"
    assert verdicts.codebook(900, 1024, 175_000).level == "good"
    assert verdicts.codebook(61, 1024, 100).level == "good"  # there are no more tokens to use codes for


@pytest.mark.parametrize(
    ("losses", "level", "words"),
    [
        (
            [(100, 5.0), (200, 4.0), (300, 4.2)],
            "fair",
            "past its best step: validation loss 4.000 at step 200, 4.200 at 300",
        ),
        ([(100, 5.0), (200, 4.0), (300, 4.01)], "good", "at its best"),
        ([(100, 5.0), (200, 4.5), (300, 4.0)], "fair", "still improves at its last step, 300"),
        ([(100, 5.0), (240, 4.0), (300, 3.99)], "good", "at its best"),
        ([(100, 5.0)], "unknown", "validated 1 times"),
        ([], "unknown", "validated 0 times"),
    ],
)
def test_best_step(losses: list[tuple[int, float]], level: str, words: str) -> None:
    found = verdicts.best_step("the transformer", losses, {"taken": "model-best"})
    assert found.level == level, found
    assert words in found.text
    assert verdicts.is_past_best(losses) == ("past its best" in found.text)


@pytest.mark.parametrize(
    ("taken", "words"),
    [
        ("model", "the exported model is the last one, whose images fit held-out captions better (0.60 against 0.40)"),
        ("model-best", "the exported model is the one of its best step, whose images fit held-out captions better"),
    ],
)
def test_past_the_best_step_it_says_which_model_was_taken(taken: str, words: str) -> None:
    scores = {"model": 0.6, "model-best": 0.4} if taken == "model" else {"model": 0.3, "model-best": 0.4}
    found = verdicts.best_step("the transformer", [(1, 4.0), (2, 5.0)], {"taken": taken, "scores": scores})
    assert words in found.remedy


@pytest.mark.parametrize(("psnr_db", "level"), [(12.0, "bad"), (20.0, "fair"), (27.0, "good")])
def test_reconstruction(psnr_db: float, level: str) -> None:
    found = verdicts.reconstruction(psnr_db)
    assert found.level == level
    assert f"{psnr_db:.1f} dB" in found.text
    assert bool(found.remedy) == (level != "good")


@pytest.mark.parametrize(("loss", "level"), [(4.16, "bad"), (3.5, "fair"), (2.0, "good")])
def test_transformer_against_guessing_among_64_codes(loss: float, level: str) -> None:
    found = verdicts.transformer(loss, 64)
    assert found.level == level
    assert "4.16" in found.text


@pytest.mark.parametrize(("random", "level"), [(0.12, "bad"), (0.3, "fair"), (0.45, "good")])
def test_following_captions(random: float, level: str) -> None:
    found = verdicts.following(0.5, 0.1, random + 0.05, random, captions=40)
    assert found is not None
    assert found.level == level
    few = verdicts.following(0.5, 0.1, random + 0.05, random, captions=6)
    assert few is not None
    assert few.level == ("fair" if level == "good" else level)


def test_no_verdict_where_nothing_can_be_said() -> None:
    assert verdicts.following(0.5, 0.48, 0.6, 0.5, captions=40) is None  # the ranker tells nothing apart
    assert verdicts.following(0.5, None, 0.6, 0.5, captions=40) is None
    assert verdicts.variety(None) is None
    assert verdicts.held_out(20) is None
    assert verdicts.captions_cut(0, 10) is None


def test_few_held_out_images_are_named() -> None:
    found = verdicts.held_out(6)
    assert found is not None
    assert found.text.startswith("6 held-out images")


def test_variety_and_cut_captions() -> None:
    alike, varied = verdicts.variety(0.001), verdicts.variety(0.1)
    assert alike is not None
    assert varied is not None
    assert (alike.level, varied.level) == ("bad", "good")
    some, many = verdicts.captions_cut(2, 100), verdicts.captions_cut(50, 100)
    assert some is not None
    assert many is not None
    assert (some.level, many.level) == ("fair", "bad")


@pytest.mark.parametrize(
    ("real", "top", "level", "words"),
    [
        (
            1.0,
            0.9,
            "good",
            "90% of the best-ranked images of 72 held-out captions have colour right .*real images: 100%",
        ),
        (0.9, 0.5, "fair", "50% of the best-ranked"),
        (1.0, 0.0, "bad", "0% of the best-ranked"),
        (0.1, 0.0, "unknown", "only 10% of the real images are read as their labels say"),
    ],
)
def test_an_oracle_that_misreads_real_images_has_no_say(real: float, top: float, level: str, words: str) -> None:
    shares = {
        who: {"colour": value, "all": value} for who, value in (("real", real), ("random", top), ("top_ranked", top))
    }
    found = verdicts.by_oracle(shares, 72)
    assert found.level == level
    assert re.search(words, found.text)
