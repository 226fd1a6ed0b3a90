"""The model card that is exported with every model."""

import json
from pathlib import Path

from engine.config.run import Run
from engine.config.stages import DvaeRun, KodalleRun, VqganRun
from engine.training.checkpoints import TrainingProgress


def model_card(run: Run, progress: TrainingProgress, log: Path | None, *, ground: str | None = None) -> str:
    """Markdown with the training data and settings, held-out figures and limits of a model.

    Args:
        log: log.jsonl to read the last validation figures from; None on ranks that write nothing.
        ground: `#rrggbb` around the objects in its training images, if they are cut-outs.
    """
    kinds = {VqganRun: "VQGAN", DvaeRun: "dVAE", KodalleRun: "KoDALLE"}
    kind = kinds.get(type(run), "KoCLIP")
    lines = [
        f"# {kind}",
        "",
        f"Trained with KoDALLE engine for {progress.step} steps on the captioned images of `{run.data.pairs.name}`, "
        f"seed {run.seed}.",
        *([] if ground is None else ["", f"Its images are cut-outs on a plain ground of `{ground}`."]),
        "",
        "## Held-out figures",
        "",
        *_figures(log),
        "",
        "## Limits",
        "",
        "It knows only what its training images and captions show. The licence of those images applies to what is "
        "generated from them.",
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(run.model_dump(mode="json", exclude={"run", "data"}), ensure_ascii=False, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _figures(log: Path | None) -> list[str]:
    if log is None or not log.is_file():
        return ["none measured"]
    records = []
    for line in log.read_text(encoding="utf-8").splitlines():
        if '"validation_' in line:
            records.append(json.loads(line))
    if not records:
        return ["none measured"]
    last = records[-1]
    return [f"- {name.removeprefix('validation_')}: {value}" for name, value in last.items()]
