"""The model that comes with the repository draws, on a machine that never trained, what its captions say."""

from pathlib import Path

from engine.data.demo_oracle import read
from engine.decoding.options import SamplingOptions
from engine.sampling.pipeline import Pipeline
from serve.settings import ServeSettings

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "models" / "garments"

CAPTIONS = [
    ("상의에서 색상은 레드이다. 상의에서 카테고리는 후드티이다. 상의에서 소매기장은 긴팔이다.", "레드", "후드티"),
    (
        "원피스에서 색상은 블루이다. 원피스에서 카테고리는 드레스이다. 원피스에서 소매기장은 민소매이다.",
        "블루",
        "드레스",
    ),
    ("하의에서 색상은 블랙이다. 하의에서 카테고리는 팬츠이다. 하의에서 기장은 발목이다.", "블랙", "팬츠"),
]


def test_it_is_what_is_served_by_default() -> None:
    assert (REPOSITORY / ServeSettings().model).resolve() == MODEL
    assert ServeSettings().model.startswith("./")  # `models/garments` is also a name on the hub, somebody else's


def test_it_is_small_and_tells_where_it_comes_from() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 40e6
    card = (MODEL / "model_card.md").read_text(encoding="utf-8")
    for word in ("Data", "Licence", "Held-out figures", "Limits", "float16"):
        assert word in card


def test_it_draws_what_the_captions_say() -> None:
    drawings = Pipeline.from_pretrained(MODEL)(
        [caption for caption, *_ in CAPTIONS], candidates=8, seed=7, options=SamplingOptions(temperature=0.7)
    )
    best = [read(drawing.candidates[0].image) for drawing in drawings]
    assert [(one.colour, one.category) for one in best] == [tuple(wanted) for _, *wanted in CAPTIONS]
