"""The `kodalle` command.

    kodalle data captions|prepare|check|make-demo …
    kodalle draw MODEL "caption" --candidates 16 --top 4 --seed 7 --out DIR
    kodalle draw MODEL "caption" --image photo.jpg --keep-rows 8          (or --mask mask.png)
    kodalle continue MODEL "beginning of a caption" --count 4 --seed 7
    kodalle evaluate MODEL PAIRS --out FILE
    kodalle export MODEL --out DIR
    kodalle convert MODEL DIR --dtype float16
    kodalle demo
    kodalle doctor

Exit codes: 0 done, 1 faults found (`data check`, `doctor`), 2 bad input: one line on stderr naming field, value and remedy.
"""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands import data as data_commands
from engine.commands import doctor as doctor_command
from engine.commands import export as export_commands
from engine.commands.error_lines import run_app
from engine.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data_commands.app, name="data", help="Labels, captions, prepared folders, the drawn demo set.")
app.command("export")(export_commands.export)
app.command("convert")(export_commands.convert)
app.command("doctor")(doctor_command.doctor)


@app.command("draw")
def draw(
    model: Annotated[str, typer.Argument(help="model folder, or owner/name on the Hugging Face hub")],
    caption: Annotated[str, typer.Argument(help="what to draw")],
    candidates: Annotated[int, typer.Option(min=1, max=1024, help="pictures drawn")] = 16,
    top: Annotated[int, typer.Option(min=1, help="pictures kept, best first")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="same seed, same pictures")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the pictures, sheet.png and result.json")] = Path("drawings"),
    temperature: Annotated[
        float | None, typer.Option(help="1: what was learnt; 0: always the likeliest; default: the model's choice")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest tokens; default: as the model says")] = None,
    top_p: Annotated[float | None, typer.Option(help="of those, the fewest that reach this probability")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1: none; above: closer to the caption; default: the model's choice")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="picture to start from: its middle square")] = None,
    keep_rows: Annotated[
        int | None, typer.Option(help="complete --image from so many rows of tokens; default 7 of 16")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="repaint --image where this picture is white")] = None,
    paste: Annotated[bool, typer.Option(help="kept pixels: the original's, or as the model decodes them")] = True,
    rank_by: Annotated[
        str, typer.Option(help="koclip; or, with --mask, fit: to what is kept after the hole")
    ] = "koclip",
    strict: Annotated[bool, typer.Option("--strict", help="refuse a caption that is too long")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="8-bit arithmetic on a CPU with VNNI: twice as fast, nearly the same")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Draws a caption, ranks the candidates, writes the best."""
    from engine.sampling_params import SamplingParams

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
    if image is None:
        needs_image = {"--keep-rows": keep_rows, "--mask": mask, "--no-paste": None if paste else "without a picture"}
        for name, value in needs_image.items():
            if value is not None:
                raise InputError(name, value, "give the picture too: --image FILE")
    SamplingParams().but(**options)  # a value out of range is told before torch is imported, which takes seconds
    from engine.commands.generate import InitImageFiles, generate_to_folder

    generate_to_folder(
        model,
        caption,
        out,
        candidates=candidates,
        top=top,
        seed=seed,
        options=options,
        strict=strict,
        device=device,
        int8=int8,
        given=None if image is None else InitImageFiles(image, keep_rows=keep_rows, mask=mask, paste=paste),
        rank_by=rank_by,
    )


@app.command("continue")
def continue_(
    model: Annotated[str, typer.Argument(help="model folder, or owner/name on the Hugging Face hub")],
    beginning: Annotated[str, typer.Argument(help="first words of a caption; may be empty")],
    count: Annotated[int, typer.Option(min=1, max=1024, help="captions written")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="same seed, same captions")] = 0,
    temperature: Annotated[float, typer.Option(help="1: the model's own distribution; 0: always the likeliest")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="of those, the fewest that reach this probability")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Writes a caption on, as the model's training captions went; one a line."""
    from engine.commands.generate import print_continuations
    from engine.sampling_params import SamplingParams

    options = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    print_continuations(model, beginning, count=count, seed=seed, options=options, device=device)


@app.command("evaluate")
def evaluate(
    model: Annotated[Path, typer.Argument(help="model folder; every part that it has is measured")],
    pairs: Annotated[Path, typer.Argument(help="prepared folder; its validation split is used")],
    out: Annotated[Path, typer.Option(help="where the JSON goes; a sheet of drawings is put beside it")] = Path(
        "evaluation.json"
    ),
    generations: Annotated[int, typer.Option(min=0, help="held-out captions to draw; 0: none")] = 40,
    candidates: Annotated[int, typer.Option(min=1, max=1024, help="pictures drawn of each")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="same seed, same captions, same pictures")] = 7,
    judge: Annotated[
        Path | None, typer.Option(help="model folder with another KoCLIP, which says what garment a drawing shows")
    ] = None,
    partial_captions: Annotated[
        bool, typer.Option("--partial-captions", help="draw captions that leave out sentences at random")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Measures a model on held-out pairs: reconstruction error, losses, KoCLIP recall@1/5, its drawings' scores."""
    from engine.data.kfashion.colours import COLOUR_ATTRIBUTE, K_FASHION_COLOURS
    from engine.metrics.colour import lab_palette
    from engine.metrics.evaluate import evaluate_to_file

    evaluate_to_file(
        model,
        pairs,
        out,
        generations=generations,
        candidates=candidates,
        seed=seed,
        device=device,
        colour_attribute=COLOUR_ATTRIBUTE,
        palette=lab_palette(K_FASHION_COLOURS),
        judge=judge,
        partial_captions=partial_captions,
    )


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="where the demo's runs go")] = Path("runs/demo"),
    configs: Annotated[Path, typer.Option(help="folder with the demo's configs")] = Path("configs/demo"),
) -> None:
    """The whole job, small: draws garments, trains the three models, draws held-out captions, writes report.json."""
    from engine.commands.demo import run_demo

    run_demo(out, configs)


def main() -> None:
    run_app(app, prog_name="kodalle")


if __name__ == "__main__":
    main()
