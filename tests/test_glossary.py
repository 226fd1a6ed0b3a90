"""Retired words stay retired: the repository speaks of transformers, workers, sequences and init images.

Here are only words and names without another meaning in this repository. `CHANGELOG.md` lists them all with their successors.
"""

import re
import subprocess

import pytest

from tests.paths import REPOSITORY

# Case-sensitive, so that a class can be retired whose lower-case name is an ordinary word.
RETIRED = {
    "worker": r"\b[Dd]rawers?\b|num_drawer|max_drawer|per_drawer|_drawers?\b|DrawerLost",
    "coordinator": r"\b[Ll]edgers?\b",
    "API server": r"num_edges|serve/edge|serve\.edge",
    "generation": r"kodalle draw\b|make draw\b|DrawJob|DrawnImage|DrawParameters|DrawingFailed|drawing_failed"
    r"|pictures_drawn|tokens_drawn|rows_drawn|--out drawings|training_pictures",
    "sequence": r"RowRequest|RowTable|RowRule|RowState|row_table|row_invarian|queued_rows|[Pp]artner",
    "add, remove, allocate, wait, borrow": r"num_joined|\b_?leave\(|\b_?(?:un)?park(?:ed|ing|s)?\b|\b_?(?:un)?seat(?:ed|ing|s)?\b"
    r"|\blend(?:s|ing|er)?\b|\bCrew\b|\b[Cc]rowd(?:s|ed)?\b",
    "batch invariance, padding rule": r"[Rr]ow[ _-]rule|in (?:any|its|such) company|[Aa]lone as in company",
    "speculative decoding": r"[Gg]uess(?:es|ing)?[ _-]ahead",
    "RequestState, DecodeLoop, Postprocessor": r"\bFlights?\b|\bStepper\b|\bFinisher\b|num_flights|\bLatelyFull\b",
    "init image": r"GivenImage|GivenFiles|tokens_given|given_image|given_tokens|\bgiven=|[Rr]epaint",
    "log-likelihood": r"rank_by=.fit|rank-by fit|rank_by: fit",
    "independent classifier": r"--judge|\b[Jj]udges?\b",
    "garment classes": r"\bKinds\b|metrics[./]kinds|garment kinds?\b",
    "augmented views": r"[Mm]oved[ _-]views?",
    "codebook reset": r"CodebookCare|codebook_care|\brevive",
    "input token noise": r"image_token_noise",
    "row tiles": r"vqgan_bands|[Bb]anded convolution",
    "packed weights": r"[Pp]acked[ _-]rows?\b",
    "SamplingParams": r"SamplingOptions|default_options",
    "no/any <the thing>, started, requested, reported": r"\b(?:[Nn]obody|[Ss]omebody|[Aa]nybody|[Ee]verybody)\b|\b[Bb]egun\b"
    r"|\bbidding\b|\b[Aa]sked for\b|\btold\b",
}
NOT_SEARCHED = {"CHANGELOG.md", "tests/test_glossary.py"}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every tracked text file that people write, by its path."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    found = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if name in NOT_SEARCHED or name.startswith("benchmarks/results/") or not path.is_file():
            continue
        try:
            found[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # images, weights
    assert len(found) > 300
    return found


@pytest.mark.parametrize("successor", RETIRED)
def test_retired_words_do_not_come_back(successor: str, texts: dict[str, str]) -> None:
    pattern = re.compile(RETIRED[successor])
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in texts.items()
        if pattern.search(text)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, f"write {successor} instead:\n" + "\n".join(found)


def test_the_changelog_names_them(texts: dict[str, str]) -> None:
    """Negative control: the patterns do find retired words where these are listed."""
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    for successor in ("worker", "coordinator", "generation", "sequence", "init image", "SamplingParams"):
        assert re.search(RETIRED[successor], changelog), successor
