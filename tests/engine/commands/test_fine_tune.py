"""An imported model trained further on own pairs: import, fine-tune, generate; classes and images alone; what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from engine import cli
from engine.commands.fine_tune import keeps_its_codec
from engine.config_files import load_run
from engine.errors import InputError
from engine.interop.importing import ImportOptions, import_checkpoint
from engine.models.folder_config import part_config, read_config
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams
from tests.engine.commands.test_train_pictures import draw
from tests.engine.interop.test_importing_clip import _clip_folder as save_clip
from tests.engine.interop.test_importing_dalle import DALLE
from tests.engine.interop.test_importing_dalle import _save as save_dalle
from tests.engine.interop.test_importing_mindalle import write

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trained")]

TINY = ["--set", "kodalle.loop.epochs=null", "--set", "kodalle.loop.steps=3"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "photos", 24)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    import_checkpoint(write(folder / "theirs", "text"), folder / "ours")
    return folder / "ours"


def _train(photos: Path, imported: Path, out: Path, *more: str) -> str:
    result = CliRunner().invoke(
        cli.app,
        ["train", str(photos), "--from", str(imported), "--out", str(out), *TINY, *more],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_captions(photos: Path, imported: Path, trained: list[str], tmp_path: Path) -> None:
    """The codec and what is not of the text are the imported ones, a few steps on; a second call has nothing to do."""
    save_clip(tmp_path / "clip-files")
    import_checkpoint(tmp_path / "clip-files", tmp_path / "clip")
    ranker = ("--set", f"kodalle.koclip={tmp_path / 'clip'}")
    output = _train(photos, imported, tmp_path / "run", *ranker)
    model = tmp_path / "run" / "kodalle" / "model"
    assert f"kodalle serve {model}" in output
    before, after = (load_file(folder / "transformer.safetensors") for folder in (imported, model))
    assert before.keys() == after.keys()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert {"layers.0.attention.qkv.bias", "image_embedding.cells", "text_embedding.positions"} <= set(moved)
    assert all(float((before[name] - after[name]).abs().max()) < 1e-3 for name in moved)  # three steps of 1e-4
    assert load_file(imported / "vqgan.safetensors").keys() == load_file(model / "vqgan.safetensors").keys()
    for name, value in load_file(imported / "vqgan.safetensors").items():
        assert torch.equal(value, load_file(model / "vqgan.safetensors")[name]), name
    run = load_run(tmp_path / "run" / "configs" / "kodalle.yaml")
    settings = run.deepspeed
    assert (
        settings["optimizer"]["params"] | {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.0}
        == settings["optimizer"]["params"]
    )
    assert settings["gradient_clipping"] == 4.0
    pipeline = Pipeline.from_pretrained(model)
    assert pipeline.default_sampling_params.top_k == 256
    candidates = pipeline(["a red square"], SamplingParams(candidates=3, guidance_scale=2.0))[0].candidates
    scores = [one.score for one in candidates if one.score is not None]  # of the imported CLIP
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    launched = list(trained)
    assert "is finished: nothing to do" in _train(photos, imported, tmp_path / "run", *ranker)
    assert trained == launched


def test_a_dalle_with_attention_patterns(photos: Path, tmp_path: Path) -> None:
    """DALLE-pytorch's transformer over its own DiscreteVAE, with a tokenizer that pads with 0."""
    words = ["[PAD]", "a", "red", "blue", "green", "square", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "tokenizer")
    patterns = {"attention_patterns": ("axial_row", "conv")}
    source = save_dalle(tmp_path / "dalle.pt", DALLE.model_copy(update=patterns), attn_types=("axial_row", "conv_like"))
    import_checkpoint(source, tmp_path / "ours", options=ImportOptions(tokenizer=str(tmp_path / "tokenizer")))
    _train(photos, tmp_path / "ours", tmp_path / "run")
    model = tmp_path / "run" / "kodalle" / "model"
    assert part_config(model, "transformer").attention_patterns == ("axial_row", "conv")
    assert part_config(model, "vqgan").family == "discrete-vae"
    before, after = (load_file(folder / "transformer.safetensors") for folder in (tmp_path / "ours", model))
    assert (
        0 < float((before["layers.1.attention.qkv.weight"] - after["layers.1.attention.qkv.weight"]).abs().max()) < 1e-3
    )
    generation = Pipeline.from_pretrained(model)(["a red square"], SamplingParams(candidates=2, guidance_scale=1.5))[0]
    assert generation.candidates[0].image.size == (32, 32)


@pytest.mark.parametrize(("condition", "caption"), [("class", "a red square"), ("nothing", "anything")])
def test_transfer_to_classes_and_to_images_alone(
    condition: str, caption: str, photos: Path, imported: Path, tmp_path: Path
) -> None:
    _train(photos, imported, tmp_path / "run", "--set", f"kodalle.model.condition={condition}")
    model = tmp_path / "run" / "kodalle" / "model"
    config = part_config(model, "transformer")
    assert (config.condition, config.text_vocab_size) == (condition, 6 if condition == "class" else 1)
    before, after = (load_file(folder / "transformer.safetensors") for folder in (imported, model))
    assert (
        float((before["layers.1.feed_forward.grow.weight"] - after["layers.1.feed_forward.grow.weight"]).abs().max())
        < 1e-3
    )
    # The head's rows of images are taken, too.
    assert float((before["head.weight"][-config.image_vocab_size :] - after["head.weight"]).abs().max()) < 1e-3
    pipeline = Pipeline.from_pretrained(model)
    assert pipeline([caption])[0].candidates[0].image.size == (32, 32)
    if condition == "class":
        with pytest.raises(InputError, match="is none of the model's 6 classes: a blue circle, "):
            pipeline(["a purple square"])
    # A trained model of classes is trained on as it is.
    _train(photos, model, tmp_path / "again")
    assert part_config(tmp_path / "again" / "kodalle" / "model", "transformer").condition == condition


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--minutes", "3"], "--minutes: 3.0: is for models with a KoCLIP"),
        (["--set", "vqgan.loop.steps=3"], "is trained on as a kodalle alone"),
        (["--set", "kodalle.model.dim=48"], r"model.dim is 48, there 24"),
        (["--set", "kodalle.model.bos=true"], r"text_position_rows 6 is less than 1 \+ text_seq_len"),
        (["--set", "kodalle.nothing=3"], "nothing"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: list[str], message: str, photos: Path, imported: Path, trained: list[str], tmp_path: Path
) -> None:
    arguments = ["train", str(photos), "--from", str(imported), "--out", str(tmp_path / "run"), *more]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert trained == []
    assert not (tmp_path / "run" / "kodalle").exists()


def test_another_request_for_the_same_folder_is_refused(photos: Path, imported: Path, tmp_path: Path) -> None:
    _train(photos, imported, tmp_path / "run")
    other = draw(tmp_path / "other", 24)
    (other / "00.txt").write_text("something else", encoding="utf-8")
    for source, more, message in (
        (other, [], "was started with other files"),
        (photos, ["--set", "kodalle.seed=3"], "--set"),
    ):
        arguments = ["train", str(source), "--from", str(imported), "--out", str(tmp_path / "run"), *more]
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


def test_a_model_with_a_ranker_is_not_an_imported_one(imported: Path, tmp_path: Path) -> None:
    assert keeps_its_codec(imported)
    assert "koclip" not in read_config(imported)
