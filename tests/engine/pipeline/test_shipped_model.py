"""The models of this repository generate what their captions describe, on a machine that never trained."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.caption_guide import read_guide
from engine.data.kfashion.colours import K_FASHION_COLOURS
from engine.data.prompt_words import PromptReader
from engine.data.synthetic.oracle import read
from engine.errors import InputError
from engine.metrics.colour import fit_colour_reader
from engine.models.folder import own_real_scores
from engine.pipeline.pipeline import Pipeline
from serve.settings import ServeSettings
from tests.paths import REPOSITORY

MODELS = REPOSITORY / "models"
DEMO, PHOTOS = MODELS / "garments", MODELS / "clothing"

CAPTIONS = [
    ("상의에서 색상은 레드이다. 상의에서 카테고리는 후드티이다. 상의에서 소매기장은 긴팔이다.", "레드", "후드티"),
    (
        "원피스에서 색상은 블루이다. 원피스에서 카테고리는 드레스이다. 원피스에서 소매기장은 민소매이다.",
        "블루",
        "드레스",
    ),
    ("하의에서 색상은 블랙이다. 하의에서 카테고리는 팬츠이다. 하의에서 기장은 발목이다.", "블랙", "팬츠"),
]


def test_the_model_of_photographs_is_served_by_default() -> None:
    assert (MODELS.parent / ServeSettings().model).resolve() == PHOTOS
    assert ServeSettings().model.startswith("./")  # `models/clothing` could also be a name on the hub


@pytest.mark.parametrize("model", [DEMO, PHOTOS], ids=lambda model: model.name)
def test_shipped_models_are_small_and_have_complete_cards(model: Path) -> None:
    assert sum(path.stat().st_size for path in model.iterdir()) < 40e6
    card = (model / "model_card.md").read_text(encoding="utf-8")
    for word in ("Data", "Licence", "Held-out figures", "Limits", "float16"):
        assert word in card


@pytest.mark.slow
def test_the_demos_model_generates_what_the_captions_describe() -> None:
    generations = Pipeline.from_pretrained(DEMO)([caption for caption, *_ in CAPTIONS], candidates=8, seed=7)
    best = [read(generation.candidates[0].image) for generation in generations]
    assert [(one.colour, one.category) for one in best] == [tuple(wanted) for _, *wanted in CAPTIONS]


@pytest.mark.slow
def test_the_clothing_model_generates_clothes_of_the_colours_that_the_captions_say() -> None:
    """Of unmistakable colours; what else its images show is measured in benchmarks/results/clothing."""
    attributes = read_guide(PHOTOS).attributes["상의"]
    assert {"색상", "카테고리", "소매기장"} <= attributes.keys()
    wanted = ["레드", "블랙", "화이트", "옐로우"]
    captions = [
        f"상의에서 색상은 {colour}이다. 상의에서 카테고리는 티셔츠이다. 상의에서 소매기장은 반팔이다."
        for colour in wanted
    ]
    generations = Pipeline.from_pretrained(PHOTOS)(captions, candidates=8, seed=7)
    swatches = {name: rgb for name, rgb in K_FASHION_COLOURS.items() if name in attributes["색상"]}
    reader = fit_colour_reader([np.full((8, 8, 3), rgb, np.uint8) for rgb in swatches.values()], list(swatches))
    assert [reader.name_of(np.asarray(generation.candidates[0].image)) for generation in generations] == wanted


@pytest.mark.parametrize("model", [DEMO, PHOTOS], ids=lambda model: model.name)
def test_shipped_models_know_their_examples_and_have_their_rankers_scores(model: Path) -> None:
    guide, scores = read_guide(model), own_real_scores(model)
    reader = PromptReader((model / "tokenizer.json").read_text(encoding="utf-8"), guide)
    assert guide.examples
    assert all(reader.read(caption).all_known for caption in guide.examples)
    assert scores is not None
    assert scores.pairs >= 72


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ("봄에 입기 좋은 하늘색 린넨 오버핏 셔츠", 0),
        ("a red hoodie with a white zipper", 0),
        ("레두 티셔쓰", 0),
        ("👕", 0),
        ("후드티", 0),  # it has only read 후드티이다
        ("상의에서 색상은 하늘색이다.", 2),
    ],
)
def test_the_clothing_model_knows_what_it_has_not_learned(prompt: str, known: int) -> None:
    read_prompt = PromptReader((PHOTOS / "tokenizer.json").read_text(encoding="utf-8"), read_guide(PHOTOS)).read(prompt)
    assert read_prompt.num_known == known < read_prompt.num_words


@pytest.mark.slow
def test_nonsense_never_has_a_place_before_a_right_caption() -> None:
    right = "하의에서 색상은 블랙이다. 하의에서 카테고리는 팬츠이다."
    nonsense = ["👕", "레두 티셔쓰", "a red hoodie with a white zipper"]
    pipeline = Pipeline.from_pretrained(PHOTOS)
    places = [one.candidates[0].score_percentile for one in pipeline([right, *nonsense], candidates=1, seed=7)]
    assert places[0] is not None
    assert places[1:] == [None, None, None]
    with pytest.raises(InputError, match="레두"):
        pipeline.prepare([nonsense[1]], strict=True)
    assert pipeline.prepare([right], strict=True)[0].words.all_known
