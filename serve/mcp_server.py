"""`kodalle mcp`: a running server's images as tools of an assistant (Model Context Protocol, over standard input and output).

    kodalle mcp --url http://127.0.0.1:8000 --out generations [--key-file FILE] [--images FOLDER]

A client of the HTTP API like any other: keys, rates and limits are the server's. Images go into a folder and the assistant
gets links to them, because a megabyte of base64 would fill its context and be read as text. What it may send in turn is
limited to that folder and those of --images: an assistant does what the texts that it reads talk it into.

The official SDK (package `mcp`) and OpenAI's client are imported when the command runs.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer
    from mcp_types import ResourceLink
    from openai import AsyncOpenAI

_MEDIA_TYPES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_MOST_LISTED = 100
_HOLDERS = re.compile(r"[A-Za-z0-9._~+/=-]+")
_INSTRUCTIONS = (
    "Images of a small model that knows a few words well: call list_models first and write captions from its attributes and "
    "in the form of its examples, in their language. Answers are links to files, best image first; words_unknown names what the "
    "model did not understand. The images are AI-made, and their metadata say so."
)


@dataclass(frozen=True)
class ImageFolder:
    """Where images are written, and from where else they may be sent. All paths are resolved."""

    out: Path
    readable: tuple[Path, ...] = ()

    def write(self, content: bytes, fields: Any, suffix: str) -> Path:
        """Writes an image; equal images have equal names, and the name says if it was enlarged."""
        from engine.files import atomic_file

        record = (fields.get("rendition") if isinstance(fields, dict) else None) or {}
        enlarged = f"-{record['size']}px-from-{record['enlarged_from']}px" if record.get("enlarged_from") else ""
        digest = hashlib.sha256(content).hexdigest()[:8]
        path = self.out / f"seed{fields['seed']}-candidate{fields['candidate']:03d}{enlarged}-{digest}{suffix}"
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
        return path

    def find(self, link: str) -> Path:
        """The file of a link, a path, or a name in the folder.

        Raises:
            ValueError: no such image, or one outside the folders.
        """
        path = Path(unquote(urlsplit(link).path)) if link.startswith("file:") else Path(link)
        path = (self.out / path).resolve()
        if not any(path.is_relative_to(folder) for folder in (self.out, *self.readable)):
            allowed = ", ".join(str(folder) for folder in (self.out, *self.readable))
            raise ValueError(f"{link} is outside the folders that may be read: {allowed}")
        if path.suffix.lower() not in _MEDIA_TYPES or not path.is_file():
            raise ValueError(f"{link} is no image: call list_images")
        return path

    def newest(self, count: int) -> list[Path]:
        """Images in the folder, the newest first."""
        found = [path for path in self.out.glob("*") if path.suffix.lower() in _MEDIA_TYPES and path.is_file()]
        return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name))[:count]


def build_server(client: "AsyncOpenAI", folder: ImageFolder) -> "MCPServer":
    """The server with its four tools."""
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import ResourceLink, TextContent
    from openai import APIConnectionError, APIStatusError
    from pydantic import Field

    from engine import __version__

    Content = list[ResourceLink | TextContent]
    Count = Annotated[int, Field(ge=1, le=10, description="images returned, the best of the candidates")]
    Seed = Annotated[int | None, Field(ge=0, lt=2**64, description="same seed, same images; default random")]
    Candidates = Annotated[int | None, Field(ge=1, description="images generated and ranked; default the server's")]
    Size = Annotated[str, Field(description="auto, or WIDTHxHEIGHT up to max_size: enlarged, without new detail")]
    Background = Annotated[str, Field(description="auto, opaque or transparent (a cut-out)")]
    Prompt = Annotated[str, Field(description="the caption, in the form of list_models' examples")]
    server = MCPServer("kodalle", instructions=_INSTRUCTIONS, version=__version__, log_level="WARNING")

    def options(seed: int | None, candidates: int | None, **more: Any) -> dict[str, Any]:
        values = {"seed": seed, "candidates": candidates} | more
        return {name: value for name, value in values.items() if value is not None}

    async def called(request: Any) -> Any:
        """The answer of the API, or its error as one that the assistant reads."""
        try:
            return await request
        except APIConnectionError as error:
            raise ToolError(f"the image server at {client.base_url} does not answer") from error
        except APIStatusError as error:
            raise ToolError(
                str(error.body.get("message", error)) if isinstance(error.body, dict) else str(error)
            ) from error

    def found(link: str) -> Path:
        try:
            return folder.find(link)
        except ValueError as error:
            raise ToolError(str(error)) from error

    def written(answer: Any) -> Content:
        links: Content = []
        for image in answer.data:
            path = folder.write(base64.b64decode(image.b64_json), image.provenance, ".png")
            links.append(_link(path, image.provenance))
        said = {"words_unknown": answer.words_unknown, "tokens_cut": answer.tokens_cut, "size": answer.size}
        said |= {"enlarged_from": answer.enlarged_from, "background": answer.background}
        return [*links, TextContent(type="text", text=json.dumps(said, ensure_ascii=False))]

    @server.tool(structured_output=False)
    async def generate_images(
        prompt: Prompt,
        n: Count = 1,
        seed: Seed = None,
        candidates: Candidates = None,
        size: Size = "auto",
        background: Background = "auto",
    ) -> Content:
        """Generates images from a caption; returns links to PNG files, best first."""
        request: Any = {"prompt": prompt, "n": n, "size": size, "background": background}
        return written(await called(client.images.generate(**request, extra_body=options(seed, candidates))))

    @server.tool(structured_output=False)
    async def edit_image(
        image: Annotated[str, Field(description="link or name of an image, as generate_images and list_images return")],
        prompt: Prompt,
        mask: Annotated[str | None, Field(description="link of a PNG of its size, white where to regenerate")] = None,
        keep_rows: Annotated[
            int | None, Field(ge=1, description="without a mask: rows of tokens kept from the top")
        ] = None,
        strength: Annotated[
            float | None, Field(ge=0, le=1, description="without a mask: share made anew, the least likely parts first")
        ] = None,
        changed_from: Annotated[
            str | None,
            Field(description="the image's own prompt: only what the words changed since then touch is made anew"),
        ] = None,
        n: Count = 1,
        seed: Seed = None,
        candidates: Candidates = None,
        size: Size = "auto",
        background: Background = "auto",
    ) -> Content:
        """Regenerates a part of an image: masked, below its upper rows, the least likely, or what changed words touch. Returns links."""
        request: Any = {"prompt": prompt, "n": n, "size": size, "background": background, "image": found(image)}
        if mask is not None:
            request["mask"] = found(mask)
        kept = {"keep_rows": keep_rows, "strength": strength, "changed_from": changed_from}
        return written(await called(client.images.edit(**request, extra_body=options(seed, candidates, **kept))))

    @server.tool(structured_output=False)
    async def list_images(
        count: Annotated[int, Field(ge=1, le=_MOST_LISTED, description="links returned")] = 20,
    ) -> Content:
        """Links to the newest images in the folder, each with the caption and seed that made it."""
        paths = folder.newest(count)
        return [_link(path, _made(path)) for path in paths] or [TextContent(type="text", text="no images yet")]

    @server.tool(structured_output=False)
    async def list_models() -> Content:
        """The served model: how to write captions for it, sizes, limits."""
        cards = [card.model_dump(mode="json") for card in (await called(client.models.list())).data]
        names = ("id", "caption_guide", "image_size", "max_size", "transparent", "default_candidates", "limits")
        shown = [{name: card.get(name) for name in names} for card in cards]
        return [TextContent(type="text", text=json.dumps(shown, ensure_ascii=False))]

    return server


def _link(path: Path, made: Any) -> "ResourceLink":
    from mcp_types import ResourceLink

    made = made if isinstance(made, dict) else {}
    description = ", ".join(
        f"{name} {made[name]}" for name in ("caption", "seed", "candidate") if made.get(name) is not None
    )
    return ResourceLink(
        type="resource_link",
        name=path.name,
        uri=path.as_uri(),
        mime_type=_MEDIA_TYPES[path.suffix.lower()],
        size=path.stat().st_size,
        description=description or None,
    )


def _made(path: Path) -> Any:
    """An image's provenance; None for another program's."""
    from engine.pipeline.image_encoding import read_metadata

    try:
        return read_metadata(path.read_bytes())
    except OSError:
        return None


def read_key(path: Path | None) -> str:
    """The API key in a file.

    Raises:
        InputError: the file cannot be read, or holds something else than a key.
    """
    from engine.errors import InputError

    if path is None:
        return "none"
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("--key-file", path, "cannot be read: write the key alone into it") from error
    if not _HOLDERS.fullmatch(key):
        raise InputError("--key-file", path, "must hold one API key and nothing else")
    return key


def main(arguments: Sequence[str] | None = None) -> None:
    """Offers a running server's images as tools to an assistant (Model Context Protocol)."""
    import typer

    from engine.commands.error_lines import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def serve_tools(
        url: Annotated[str, typer.Option(help="of the server that `kodalle serve` started")] = "http://127.0.0.1:8000",
        out: Annotated[Path, typer.Option(help="folder for the images; links lead there")] = Path("generations"),
        key_file: Annotated[Path | None, typer.Option(help="a file with the API key, if the server needs one")] = None,
        images: Annotated[
            list[Path] | None, typer.Option(help="another folder whose images may be edited; may be given again")
        ] = None,
    ) -> None:
        """Offers a running server's images as tools to an assistant, over standard input and output."""
        from engine.files import check_file_place

        key = read_key(key_file)
        check_file_place(out / "image.png", field="--out")
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=key)
        folder = ImageFolder(out.resolve(), tuple(one.resolve() for one in images or ()))
        build_server(client, folder).run("stdio")

    run_app(app, list(arguments) if arguments is not None else None, prog_name="kodalle mcp")


if __name__ == "__main__":
    main()
