"""`kodalle mcp` as an assistant uses it: the SDK's own client over standard input and output, and a served model behind it."""

import asyncio
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcp import Client, StdioServerParameters
from PIL import Image

from engine.errors import InputError
from engine.pipeline.image_encoding import read_metadata
from engine.pipeline.pipeline import Pipeline
from serve.api.application import build_api
from serve.local_pool import LocalPool
from serve.mcp_server import ImageFolder, read_key
from serve.settings import ServeSettings
from tests.live_server import serving
from tests.paths import REPOSITORY

CAPTION = "빨강 바탕에 파랑 네모"


@pytest.fixture(scope="module")
def port(kodalle_run: Path) -> Iterator[int]:
    settings = ServeSettings(model=str(kodalle_run / "model"), model_id="tiny", default_candidates=2, page=False)
    pool = LocalPool(settings)
    with serving(build_api(pool, settings)) as port:
        yield port
    pool.close()


def conversation(port: int, out: Path, *calls: tuple[str, dict[str, Any]], options: tuple[str, ...] = ()) -> list[Any]:
    """Results of tool calls, one after the other, in one session."""
    arguments = ["-m", "serve.mcp_server", "--url", f"http://127.0.0.1:{port}", "--out", str(out), *options]

    async def talk() -> list[Any]:
        server = StdioServerParameters(command=sys.executable, args=arguments, cwd=REPOSITORY)
        async with Client(server, read_timeout_seconds=120) as client:
            results: list[Any] = [await client.list_tools()] if not calls else []
            return results + [await client.call_tool(name, values) for name, values in calls]

    return asyncio.run(talk())


def links(result: Any) -> list[Path]:
    """Files of a result, after a check that it holds links and a few words, and no image."""
    assert not result.is_error, result.content
    assert {one.type for one in result.content} <= {"resource_link", "text"}
    assert len(result.model_dump_json()) < 4000, "links, never base64"
    found = [one for one in result.content if one.type == "resource_link"]
    for one in found:
        path = Path(one.uri.removeprefix("file://"))
        assert (one.mime_type, one.size) == ("image/png", path.stat().st_size)
        assert CAPTION in one.description
    return [Path(one.uri.removeprefix("file://")) for one in found]


def said(result: Any) -> Any:
    return json.loads(result.content[-1].text)


@pytest.mark.slow
def test_an_assistant_generates_edits_and_lists(port: int, tmp_path: Path, kodalle_run: Path) -> None:
    out = tmp_path / "out"
    made, again, models, listed = conversation(
        port,
        out,
        ("generate_images", {"prompt": CAPTION, "n": 2, "seed": 7, "size": "64x64"}),
        ("generate_images", {"prompt": f"{CAPTION} 린넨", "seed": 7, "background": "transparent"}),
        ("list_models", {}),
        ("list_images", {"count": 2}),
    )
    best, second = links(made)
    assert re.fullmatch(r"seed7-candidate00[01]-64px-from-32px-[0-9a-f]{8}\.png", best.name)
    assert said(made) == {
        "words_unknown": [], "tokens_cut": 0, "size": "64x64", "enlarged_from": "32x32", "background": "opaque",
    }  # fmt: skip
    generation = Pipeline.from_pretrained(kodalle_run / "model")([CAPTION], candidates=2, seed=7)[0]
    for path, one in zip((best, second), generation.candidates, strict=True):
        wanted = one.image.resize((64, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(wanted))
        assert read_metadata(path.read_bytes())["candidate"] == one.candidate
    assert said(again)["words_unknown"] == ["린넨"]
    assert Image.open(links(again)[0]).mode == "RGBA"
    (card,) = said(models)
    assert (card["id"], card["image_size"], card["transparent"]) == ("tiny", 32, True)
    assert links(listed)[0] == links(again)[0], "the newest first"

    edited, weaker, recoloured, foreign, refused = conversation(
        port,
        out,
        ("edit_image", {"image": best.as_uri(), "prompt": CAPTION, "keep_rows": 4, "seed": 3}),
        ("edit_image", {"image": best.as_uri(), "prompt": CAPTION, "strength": 0.25}),
        ("edit_image", {"image": best.as_uri(), "prompt": CAPTION, "changed_from": f"{CAPTION} {CAPTION}"}),
        ("edit_image", {"image": "/etc/hostname", "prompt": CAPTION}),
        ("generate_images", {"prompt": CAPTION, "size": "31x31"}),
    )
    (path,) = links(edited)
    assert read_metadata(path.read_bytes())["init_image"]["keep_rows"] == 4
    assert read_metadata(links(weaker)[0].read_bytes())["init_image"]["strength"] == 0.25
    assert read_metadata(links(recoloured)[0].read_bytes())["init_image"]["changed_from"] == f"{CAPTION} {CAPTION}"
    assert foreign.is_error
    assert "outside the folders" in foreign.content[0].text
    assert refused.is_error
    assert "`size` must be auto, 32x32" in refused.content[0].text


@pytest.mark.slow
def test_tools_are_described_and_a_server_that_is_down_is_one_line(tmp_path: Path) -> None:
    (tools,) = conversation(9, tmp_path)
    assert [tool.name for tool in tools.tools] == ["generate_images", "edit_image", "list_images", "list_models"]
    for tool in tools.tools:
        assert tool.description
        assert all(field.get("description") for field in tool.input_schema["properties"].values())
    (failed,) = conversation(9, tmp_path, ("list_models", {}))
    assert failed.is_error
    assert failed.content[0].text.endswith("the image server at http://127.0.0.1:9/v1/ does not answer")


def test_only_images_in_the_folders_can_be_sent(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    for place in (out, other):
        place.mkdir()
        Image.new("RGB", (8, 8)).save(place / "a b.png")
    (out / "leads away.png").symlink_to(other / "a b.png")
    (out / "notes.txt").write_text("secret")
    folder = ImageFolder(out)
    assert folder.find("a b.png") == folder.find((out / "a b.png").as_uri()) == folder.find(str(out / "a b.png"))
    for link in (
        "../other/a b.png",
        (other / "a b.png").as_uri(),
        "leads away.png",
        "/etc/passwd",
        "file:///etc/passwd",
    ):
        with pytest.raises(ValueError, match="outside the folders"):
            folder.find(link)
    for link in ("notes.txt", "missing.png", "."):
        with pytest.raises(ValueError, match="is no image"):
            folder.find(link)
    assert ImageFolder(out, (other,)).find(str(other / "a b.png")).parent == other


def test_equal_images_have_one_file_and_others_never_replace_it(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "new")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    one = folder.write(file.getvalue(), {"seed": 7, "candidate": 0}, ".png")
    assert folder.write(file.getvalue(), {"seed": 7, "candidate": 0}, ".png") == one
    assert folder.write(file.getvalue() + b"\0", {"seed": 7, "candidate": 0}, ".png") != one
    assert len(folder.newest(10)) == 2


def test_a_key_file_holds_a_key_and_nothing_else(tmp_path: Path) -> None:
    assert read_key(None) == "none"
    (tmp_path / "key").write_text("sk-kodalle-abc_123\n")
    assert read_key(tmp_path / "key") == "sk-kodalle-abc_123"
    (tmp_path / "key").write_text("id: shop\nsha256: 00\n")
    for path in (tmp_path / "key", tmp_path / "none"):
        with pytest.raises(InputError, match="--key-file"):
            read_key(path)
