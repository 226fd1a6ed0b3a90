"""The `kodalle` command.

    kodalle data captions|prepare|check|make-demo …
    kodalle generate MODEL "caption" --candidates 16 --top 4 --seed 7 --out DIR
    kodalle generate MODEL "caption" --image photo.jpg --keep-rows 8          (or --mask mask.png)
    kodalle generate MODEL "caption" --size 192x128
    kodalle generate MODEL "caption" --refine 10
    kodalle generate [MODEL] --from generations/01-seed7-candidate003.png
    kodalle continue MODEL "beginning of a caption" --count 4 --seed 7
    kodalle evaluate MODEL PAIRS --out FILE
    kodalle calibrate MODEL PAIRS
    kodalle train-classifier PAIRS --out FOLDER
    kodalle train PHOTOS --out FOLDER                                     (or one stage: kodalle train CONFIG key=value …)
    kodalle serve MODEL --port 8000                                       (from the package serve)
    kodalle export MODEL --out DIR
    kodalle convert MODEL DIR --dtype float16
    kodalle import CHECKPOINT DIR
    kodalle push FOLDER owner/name
    kodalle demo
    kodalle doctor

Exit codes: 0 done, 1 faults found (`data check`, `doctor`), 2 bad input: one line on stderr naming field, value and remedy;
130 and 143 stopped by SIGINT or SIGTERM.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from engine import __version__
from engine.commands import calibrate as calibrate_command
from engine.commands import data as data_commands
from engine.commands import doctor as doctor_command
from engine.commands import evaluate as evaluate_command
from engine.commands import export as export_commands
from engine.commands import import_checkpoint as import_command
from engine.commands import push as push_command
from engine.commands import train as train_commands
from engine.commands import train_classifier as train_classifier_command
from engine.commands.error_lines import run_app
from engine.commands.plugins import add_plugin_commands
from engine.errors import InputError
from engine.sampling_params import FIELDS, INIT_IMAGE_FIELDS, SamplingParams

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data_commands.app, name="data", help="Labels, captions, prepared folders, the drawn demo set.")
app.command("train")(train_commands.train)
app.command("evaluate")(evaluate_command.evaluate)
app.command("calibrate")(calibrate_command.calibrate)
app.command("train-classifier")(train_classifier_command.train_classifier)
app.command("export")(export_commands.export)
app.command("convert")(export_commands.convert)
app.command("import")(import_command.import_)
app.command("push")(push_command.push)
app.command("doctor")(doctor_command.doctor)
add_plugin_commands(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kodalle-engine {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Trains text-to-image transformers on captioned images, generates with them, serves them."""


_MAX_CANDIDATES = 1024  # of one command: their pixels are in memory together


def _parameter(name: str, default: str = "", *, most: int | None = None) -> Any:
    """An option whose help and bounds are those of a sampling parameter, which checks the value."""
    spec = (FIELDS | INIT_IMAGE_FIELDS)[name]
    bounds = spec.range_text if most is None else f"{spec.least} to {most}"
    return typer.Option(help=f"{spec.description}; {bounds}{default and f'; default: {default}'}", max=most)


@app.command("generate")
def generate(
    model: Annotated[
        str | None, typer.Argument(help="model folder, or owner/name on the Hugging Face hub", show_default=False)
    ] = None,
    caption: Annotated[str | None, typer.Argument(help="what the images shall show", show_default=False)] = None,
    candidates: Annotated[
        int | None, _parameter("candidates", str(SamplingParams.candidates), most=_MAX_CANDIDATES)
    ] = None,
    top: Annotated[int | None, _parameter("top", "4, or all where there are fewer")] = None,
    seed: Annotated[int | None, _parameter("seed", str(SamplingParams.seed))] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="folder for the images, sheet.png and result.json; replaces those of the last generation there"
        ),
    ] = Path("generations"),
    temperature: Annotated[float | None, _parameter("temperature", "the model's")] = None,
    top_k: Annotated[int | None, _parameter("top_k", "the model's")] = None,
    top_p: Annotated[float | None, _parameter("top_p", "the model's")] = None,
    guidance_scale: Annotated[float | None, _parameter("guidance_scale", "the model's")] = None,
    image: Annotated[Path | None, typer.Option(help="init image: its middle square is used")] = None,
    keep_rows: Annotated[
        int | None, typer.Option(help="rows of tokens of --image that are kept, from the top; default: 7 of 16")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="regenerate --image where this image is white")] = None,
    strength: Annotated[float | None, _parameter("strength")] = None,
    changed_from: Annotated[
        str | None,
        typer.Option(
            help="the caption that --image was made from: what its likelihood falls with is sampled anew, --strength of it",
            show_default=False,
        ),
    ] = None,
    paste: Annotated[
        bool | None,
        typer.Option(
            "--paste/--no-paste",
            help="kept pixels: the original's, or as the model decodes them, which --strength and --changed-from do",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="WIDTHxHEIGHT in pixels, e.g. 192x128: larger than the model's own size, by a sliding window",
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="steps in which the images written are moved towards the caption, as the ranker sees it",
            show_default=False,
        ),
    ] = None,
    refine_step_size: Annotated[
        float | None, typer.Option(min=0, max=10, help="of --refine, in standard deviations of the codes; default: 0.2")
    ] = None,
    refine_with: Annotated[
        Path | None,
        typer.Option(
            help="what guides --refine: a model folder with a ranker, or transformers' folder of a CLIP; default: the model's own"
        ),
    ] = None,
    rank_by: Annotated[
        str | None, typer.Option(help="koclip, the default; or, with --mask, log_likelihood of what is kept after it")
    ] = None,
    enlarge: Annotated[
        int | None,
        typer.Option(help="pixels a side: enlarged by Lanczos, which adds no detail; default: the model's own"),
    ] = None,
    transparent: Annotated[
        bool, typer.Option("--transparent", help="cut the objects out: for models of cut-outs")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="refuse a caption that is too long, or has words that the model does not know"),
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="8-bit arithmetic on a CPU: twice as fast, nearly the same images")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="the transformer's on a CPU: int8, or int4, coarser; default: as --int8 says")
    ] = None,
    codec_backend: Annotated[
        str | None, typer.Option(help="torch, the default; or onnx, the files that `kodalle export` wrote")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="make this image again from its own metadata; --image and --mask if it had them"),
    ] = None,
) -> None:
    """Generates candidates for a caption, ranks them, writes the best."""
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
    params |= {"candidates": candidates, "seed": seed, "top": top}
    of_image: dict[str, Any] = {"--keep-rows": keep_rows, "--mask": mask, "--no-paste": paste}
    _check_needs(of_image | {"--strength": strength, "--changed-from": changed_from}, image)
    if refine is None:
        needs = {"--refine-step-size": refine_step_size, "--refine-with": None if from_ else refine_with}
        for name, value in needs.items():
            if value is not None:
                raise InputError(name, value, "give the steps too: --refine 10")
    if from_ is not None:
        stated = params | {
            "keep_rows": keep_rows,
            "strength": strength,
            "changed_from": changed_from,
            "paste": paste,
            "rank_by": rank_by,
            "codec_backend": codec_backend,
            "size": size,
        }
        stated |= {"refine": refine, "refine_step_size": refine_step_size}
        stated |= {
            "int8": int8 or None,
            "weights": weights,
            "strict": strict or None,
            "enlarge": enlarge,
            "transparent": transparent or None,
        }
        _check_from(from_, caption, stated)
        from engine.commands.regenerate import regenerate_to_folder

        regenerate_to_folder(
            from_, out, model=model, device=device, init_image=image, mask=mask, refine_with=refine_with
        )
        return
    if model is None or caption is None:
        raise InputError(
            "MODEL" if model is None else "CAPTION", "(nothing)", "give a model and a caption, or --from FILE"
        )
    if top is None:
        params["top"] = min(4, SamplingParams().updated(candidates=candidates).candidates)
    SamplingParams().updated(**params)
    from engine.pipeline.image_size import parse_size

    requested_size = None if size is None else parse_size(size, field="--size")
    if requested_size is not None and (enlarge is not None or transparent):
        raise InputError(
            "--size", requested_size, "goes with neither --enlarge nor --transparent: leave one of them out"
        )
    from engine.commands.generate import generate_to_folder
    from engine.pipeline.init_image import InitImage
    from engine.pipeline.provenance import Refinement
    from engine.pipeline.rendition import Rendition

    refinement = None
    if refine is not None:
        chosen = {} if refine_step_size is None else {"step_size": refine_step_size}
        refinement = Refinement(steps=refine, **chosen)
    init_image = None
    if image is not None:
        init_image = InitImage.from_files(
            image, keep_rows=keep_rows, mask=mask, paste=paste, strength=strength, changed_from=changed_from
        )
    generate_to_folder(
        model,
        caption,
        out,
        sampling_params=params,
        strict=strict,
        device=device,
        int8=int8,
        weights=weights,
        codec_backend=codec_backend or "torch",
        init_image=init_image,
        size=requested_size,
        rank_by=rank_by or "koclip",
        rendition=Rendition(enlarge, transparent),
        refinement=refinement,
        refine_with=refine_with,
    )


def _check_needs(needs_image: dict[str, Any], image: Path | None) -> None:
    for name, value in needs_image.items():
        if value is not None and image is None:
            raise InputError(
                name, "without an image" if isinstance(value, bool) else value, "give the image too: --image FILE"
            )


def _check_from(image: Path, caption: str | None, stated: dict[str, Any]) -> None:
    """Raises InputError: an option that the image's metadata state already."""
    if caption is not None:
        raise InputError("CAPTION", caption, f"is stated by {image}: leave it out")
    for name, value in stated.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')}", value, f"is stated by {image}: leave it out")


@app.command("continue")
def continue_(
    model: Annotated[str, typer.Argument(help="model folder, or owner/name on the Hugging Face hub")],
    beginning: Annotated[str, typer.Argument(help="first words of a caption; may be empty")],
    count: Annotated[int, typer.Option(min=1, max=_MAX_CANDIDATES, help="captions written")] = 4,
    seed: Annotated[int, typer.Option(help=f"same seed, same captions; {FIELDS['seed'].range_text}")] = 0,
    temperature: Annotated[float, _parameter("temperature")] = SamplingParams.temperature,
    top_k: Annotated[int | None, _parameter("top_k")] = None,
    top_p: Annotated[float | None, _parameter("top_p")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda when there is one")] = "",
) -> None:
    """Samples the rest of a caption as training captions went on; one a line."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    from engine.commands.generate import print_continuations

    print_continuations(model, beginning, params, count=count, device=device)


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="where the demo's runs go")] = Path("runs/demo"),
    configs: Annotated[
        Path | None, typer.Option(help="folder with the demo's configs; default: those that come with the project")
    ] = None,
) -> None:
    """`kodalle train` on a drawn data set: three trainings in minutes, the report, and shares of right images."""
    from engine.commands.demo import run_demo, shipped_configs

    run_demo(out, configs or shipped_configs())


def main() -> None:
    run_app(app, prog_name="kodalle")


if __name__ == "__main__":
    main()
