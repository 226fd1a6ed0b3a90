"""What the report shows, read from the folder of a whole training; no judgement and no layout here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.token_shards import open_shards
from engine.training.report.charts import Point

_SHOWN_SAMPLES = 4  # of a stage: the first, the last and those between


@dataclass(frozen=True)
class StageLog:
    """log.jsonl of a stage by quantity, and its sample images, oldest first, as (step, file)."""

    scalars: dict[str, list[Point]]
    samples: list[tuple[int, Path]]

    def validation(self) -> list[tuple[int, float]]:
        """(step, validation loss); a VQGAN before its codebook counts as no codec and is left out."""
        points = self.scalars.get("validation_loss", [])
        with_codes = {step for step, _ in self.scalars.get("validation_codebook_usage", points)}
        return [(int(step), loss) for step, loss in points if step in with_codes]


@dataclass(frozen=True)
class CodeUse:
    """Use of the codebook by the training images: codes that occur, codes that there are, and tokens in all."""

    used: int
    size: int
    tokens: int


def read_log(run: Path) -> StageLog:
    """A stage's log; lines that a killed process left half-written are passed over, as the trainer does."""
    scalars: dict[str, list[Point]] = {}
    file = run / "log.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = record.pop("step", None)
        if step is not None:
            for name, value in record.items():
                scalars.setdefault(name, []).append((float(step), float(value)))
    files = sorted((run / "samples").glob("step-*.png"))
    chosen = sorted({round(place * (len(files) - 1) / max(1, _SHOWN_SAMPLES - 1)) for place in range(_SHOWN_SAMPLES)})
    samples = [(int(files[index].stem.removeprefix("step-")), files[index]) for index in chosen if files]
    return StageLog(scalars, samples)


def code_use(shards: Path, codebook_size: int) -> CodeUse:
    """Of the training images as they are, without augmented views.

    Args:
        shards: folder that the transformer's training wrote.
    """
    used = np.zeros(codebook_size, dtype=bool)
    count = 0
    for shard in open_shards(shards, "train", image_vocab_size=codebook_size):
        used[shard.image_tokens[:, 0]] = True
        count += shard.image_tokens[:, 0].size
    return CodeUse(used=int(used.sum()), size=codebook_size, tokens=count)
