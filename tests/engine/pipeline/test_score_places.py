"""What is said of a score: its place among real pairs, and nothing for a caption of which the model knows no word."""

from pathlib import Path

import pytest
import torch

from engine.commands.generate import unknown_note
from engine.data.prompt_words import PromptWords, UnknownWord
from engine.files import write_json
from engine.models.folder import own_real_scores
from engine.models.folder_config import weights_digest
from engine.models.real_scores import REAL_SCORES_FILE, RealScores, read_real_scores, real_scores, write_real_scores
from engine.pipeline.generation import PreparedRequest, ranked
from engine.pipeline.ranking import Scores
from engine.sampling_params import SamplingParams

TABLE = real_scores([0.1 * number for number in range(11)], ranker="0" * 16)
PARTLY = PromptWords(6, 1, 3, 2, (UnknownWord("하늘색", 0, 3, "스카이블루이다", "스카이블루"),))
FOREIGN = PromptWords(4, 2, 2, 0, (UnknownWord("레두", 0, 2, "레드이다", "레드"), UnknownWord("x", 3, 4)))
KNOWN = PromptWords(5, 0, 3, 3)


def _places(words: PromptWords, table: RealScores = TABLE, contrast: list[float] | None = None) -> list[float | None]:
    request = PreparedRequest(
        caption="c",
        words=words,
        text_tokens=torch.zeros(1, 4, dtype=torch.int64, device="cpu"),
        tokens_read=4,
        tokens_cut=0,
        sampling_params=SamplingParams(candidates=2),
        candidates=(0, 1),
        rank_by="koclip",
        init_image=None,
    )
    tokens = torch.zeros(2, 4, dtype=torch.int64, device="cpu")
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device="cpu")
    score = torch.tensor([0.25, 0.83], dtype=torch.float32, device="cpu")
    contrasts = None if contrast is None else torch.tensor(contrast, dtype=torch.float32, device="cpu")
    scores = Scores(score, contrasts, guess=0.0 if contrast is None else -2.0)
    return [one.score_percentile for one in ranked(request, tokens, pixels, scores, None, table)]


@pytest.mark.parametrize("words", [KNOWN, PARTLY])
def test_candidates_have_their_place_among_real_pairs(words: PromptWords) -> None:
    assert _places(words) == pytest.approx([83, 25], abs=0.01)


def test_places_follow_the_order_where_candidates_are_ranked_by_contrast() -> None:
    """The better score may have the worse contrast: rank 1 must not stand far below rank 2."""
    table = real_scores([0.1, 0.5, 0.9], ranker="0" * 16, certainties=[-1.0, 0.0, 1.0])
    assert _places(KNOWN, table, contrast=[-1.0, -3.0]) == [75, 25]  # certainties of 0.5 and -0.5
    assert _places(KNOWN, TABLE, contrast=[-1.0, -3.0]) == pytest.approx([25, 83], abs=0.01)  # an older table


def test_an_older_file_s_gains_are_of_another_scale_and_are_not_used(tmp_path: Path) -> None:
    tree = TABLE.model_dump(mode="json", exclude={"certainty_percentiles"}) | {"gain_percentiles": list(range(101))}
    write_json(tmp_path / REAL_SCORES_FILE, tree)
    assert read_real_scores(tmp_path) == TABLE


def test_nonsense_has_no_place_whatever_its_score() -> None:
    assert _places(FOREIGN) == [None, None]


def test_the_command_says_what_was_not_read() -> None:
    assert unknown_note(KNOWN) == ""
    assert "knows 2 of the caption's 3 words" in unknown_note(PARTLY)
    assert "하늘색 (스카이블루이다?)" in unknown_note(PARTLY)
    assert "their scores say nothing" in unknown_note(FOREIGN)
    assert "has no word" in unknown_note(PromptWords(3, 1, 0, 0))


def test_a_table_of_another_ranker_is_not_used_and_named(kodalle_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = kodalle_run / "model"
    assert own_real_scores(model) is None
    assert capsys.readouterr().err == ""
    path = model / "real_scores.json"
    try:
        write_real_scores(model, TABLE)
        assert own_real_scores(model) is None
        assert "kodalle calibrate" in capsys.readouterr().err
        own = TABLE.model_copy(update={"ranker": weights_digest(model, "koclip")})
        write_real_scores(model, own)
        assert own_real_scores(model) == own
    finally:
        path.unlink(missing_ok=True)
