"""How many passes an image takes when several tokens are guessed at once and checked (fixed-noise Jacobi decoding).

    python benchmarks/jacobi_acceptance.py runs/demo/kodalle/model runs/demo/pairs [--cost cost.json] [--out result.json]

A token is argmax(logits / temperature + noise of (seed, candidate, position, token)), so a guess is right or wrong, and
an image's passes can be counted on any machine. Guesses for cells that no pass has sampled yet:

    above     the token of the cell above; in the first row, the newest token
    left      the newest token
    noise     argmax of the cell's noise alone: the token of a model for which all are equally likely
    mode      the cell's most frequent token in other images
    marginal  argmax of the log frequency in other images + the cell's noise
    sibling   the token of another image of the same caption
    regenerated   argmax of the logits of the cell above + the cell's own noise

Cells that a pass has sampled after a wrong guess are guessed to stay what they are; `fresh` guesses those anew as well.
Every image that is counted is compared with `Sampler.generate`: `wrong` must be 0.

Needs a trained model. With random weights hardly anything but the noise and the last token decides, so more guesses are
right than with a model that depends on its image, and the count is no measure of real images (`--random-weights`).

B sequences, A unfinished ones, w window, T positions, C model dim, N image tokens, V image vocabulary, P prefix positions.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine_facts import print_document, stored_path
from torch import Tensor

from engine.data.pairs import load_pairs
from engine.decoding.kv_cache import Prefix
from engine.decoding.sampler import Sampler, evaluating
from engine.decoding.speculative.jacobi import JacobiDecoder
from engine.facts import facts
from engine.models.folder import load_folder_tokenizer, load_part
from engine.models.transformer import KoDalle
from engine.models.transformer_layer import Layer
from engine.sampling_params import SamplingParams, SequenceRequest
from kernels import reference

SETTINGS = ((0.7, None), (0.7, 0.9), (1.0, None), (1.0, 0.9))  # temperature, top_p
GUESSES = ("left", "noise", "mode", "marginal", "sibling", "regenerated")
COPYING = ("above", "left", "regenerated")  # made from the image itself, the others are tables
FREE_ROWS = 184  # of an H200 at 16 bit: below, a step takes as long as reading the weights


@dataclass(frozen=True)
class PassCount:
    """Passes of the images of one setting. `depth[j]`: share of right guesses j + 1 ahead, of those reached."""

    temperature: float
    top_p: float | None
    guess: str
    fresh: bool
    window: int
    tokens: int  # N - 1: passes of one token at a time
    passes: list[int]  # of each image
    depth: list[float]
    wrong: int

    @property
    def gain(self) -> float:
        return self.tokens / statistics.mean(self.passes)


class Sequences:
    """Keys and values of all sequences, and the model over a window of each. Plain code: only counts matter."""

    def __init__(self, model: KoDalle, prefix: Prefix, requests: list[SequenceRequest], window: int) -> None:
        config = model.config
        self.model, self.prefix_len, self.params = model, config.prefix_len, requests[0].sampling_params
        caption = torch.tensor([request.prefix_index for request in requests])
        self.seeds = torch.tensor([request.seed for request in requests])
        self.candidates = torch.tensor([request.candidate for request in requests])
        room = config.prefix_len + config.image_seq_len + window
        self._kv = torch.zeros(2, config.num_layers, len(requests), config.num_heads, room, config.head_dim)
        for number, read in enumerate((prefix.keys, prefix.values)):
            self._kv[number, :, :, :, : config.prefix_len] = read[:, caption].transpose(2, 3)
        self.first_logits = model.head.image_logits(model.head.norm(prefix.hidden[caption]))  # (B, V)
        self._positions = model.input_positions()

    def logits(self, indices: Tensor, cells: Tensor, tokens: Tensor) -> Tensor:
        """tokens (A, w) at grid cells (A, w) of sequences (A,) -> what they predict, (A, w, V)."""
        places = self.prefix_len + cells
        x = self.model.image_embedding.tokens[tokens] + self._positions[cells.clamp(max=len(self._positions) - 1)]
        seen = torch.arange(self._kv.shape[4]) <= places[:, :, None]  # (A, w, T)

        def attend(number: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._kv[:, number]
            keys[indices[:, None], :, places], values[indices[:, None], :, places] = k, v
            read = (q.transpose(1, 2), keys[indices], values[indices], seen[:, None])
            return F.scaled_dot_product_attention(*read).transpose(1, 2)

        x = self.model.apply_layers(x, attend)
        return self.model.head.image_logits(self.model.head.norm(x))

    def sample(self, indices: Tensor, cells: Tensor, logits: Tensor) -> Tensor:
        """sequences (n,), cells (n,), logits (n, V) -> (n,)."""
        params = self.params
        return reference.sample(
            logits, self.seeds[indices], self.candidates[indices], cells,
            torch.full(indices.shape, params.temperature), torch.full(indices.shape, params.top_k or 0),
            torch.full(indices.shape, 1.0 if params.top_p is None else params.top_p),
        )  # fmt: skip


class Guesser:
    """What is fed where no token is final. `tokens`: (B, N), final ones and what passes sampled."""

    def __init__(self, name: str, table: Tensor | None, sequences: Sequences, *, fresh: bool) -> None:
        config = sequences.model.config
        self._name, self._table, self._sequences, self._fresh = name, table, sequences, fresh
        self._N, self._width = config.image_seq_len, config.image_grid_size
        B = len(sequences.seeds)
        self.tokens = torch.zeros(B, self._N, dtype=torch.int64)
        self.last_logits = torch.zeros(B, self._N, config.image_vocab_size) if name == "regenerated" else None

    def inputs(self, indices: Tensor, cells: Tensor, final: Tensor, num_sampled: Tensor) -> Tensor:
        """(A, w) tokens of cells (A, w), of which `final` (A,) are known and `num_sampled` (A,) were sampled."""
        cells = cells.clamp(max=self._N - 1)
        known = (final if self._fresh else num_sampled)[:, None]  # (A, 1)
        above = cells - ((cells - known).div(self._width, rounding_mode="floor") + 1) * self._width
        has_above = (above >= 0) & (self._name != "left")
        source = torch.where(cells < known, cells, torch.where(has_above, above, known - 1))
        inputs = self.tokens[indices].gather(1, source)
        if self._table is not None:
            inputs = torch.where(cells < known, inputs, self._table[indices].gather(1, cells))
        if self.last_logits is not None:
            guessed = (cells >= known).nonzero()
            row, cell, like = indices[guessed[:, 0]], cells[guessed.unbind(1)], source[guessed.unbind(1)]
            inputs[guessed.unbind(1)] = self._sequences.sample(row, cell, self.last_logits[row, like])
        return inputs


def count_passes(
    sequences: Sequences, expected: Tensor, guess: str, table: Tensor | None, window: int, *, fresh: bool = False
) -> PassCount:
    """Samples all sequences, each at its own pace. expected: (B, N), the tokens of single steps."""
    B, N = expected.shape
    guesser = Guesser(guess, table, sequences, fresh=fresh)
    tokens = guesser.tokens
    tokens[:, 0] = sequences.sample(torch.arange(B), torch.zeros(B, dtype=torch.int64), sequences.first_logits)
    if guesser.last_logits is not None:
        guesser.last_logits[:, 0] = sequences.first_logits
    final, num_sampled = torch.ones(B, dtype=torch.int64), torch.ones(B, dtype=torch.int64)
    passes = torch.zeros(B, dtype=torch.int64)
    reached, right = torch.zeros(window - 1), torch.zeros(window - 1)
    offsets = torch.arange(window)
    while (final < N).any():
        active = (final < N).nonzero()[:, 0]  # (A,)
        cells = final[active, None] - 1 + offsets  # (A, w)
        inputs = guesser.inputs(active, cells, final[active], num_sampled[active])
        logits = sequences.logits(active, cells, inputs)
        at, flat = cells + 1, active[:, None].expand_as(cells).flatten()
        inside = at < N
        result = sequences.sample(flat, at.clamp(max=N - 1).flatten(), logits.flatten(0, 1)).view_as(at)
        matches = ((inputs[:, 1:] == result[:, :-1]) & inside[:, 1:]).long().cumprod(1)  # (A, w - 1)
        tried = torch.cat([torch.ones(len(active), 1, dtype=torch.int64), matches[:, :-1]], 1) * inside[:, 1:]
        reached += tried.sum(0)
        right += matches.sum(0)
        tokens[flat.view_as(at)[inside], at[inside]] = result[inside]
        if guesser.last_logits is not None:
            guesser.last_logits[flat.view_as(at)[inside], at[inside]] = logits[inside]
        num_sampled[active] = at[:, -1].clamp(max=N - 1) + 1
        final[active] += 1 + matches.sum(1)
        passes[active] += 1
    params = sequences.params
    depth = [round(float(share), 4) for share in right / reached.clamp(min=1)]
    wrong = int((tokens != expected).any(1).sum())
    return PassCount(params.temperature, params.top_p, guess, fresh, window, N - 1, passes.tolist(), depth, wrong)


def tables(model: KoDalle, requests: list[SequenceRequest], others: Tensor) -> dict[str, Tensor]:
    """Guesses (B, N) that do not follow the image. others: (B, N) images of the same captions, other seeds."""
    (B, N), V = others.shape, model.config.image_vocab_size
    seeds = torch.tensor([request.seed for request in requests])
    candidates = torch.tensor([request.candidate for request in requests])
    counts = torch.full((N, V), 1e-3).scatter_add_(1, others.T, torch.ones(N, B))
    log_frequency = (counts / counts.sum(1, keepdim=True)).log()
    noise, marginal = torch.empty(B, N, dtype=torch.int64), torch.empty(B, N, dtype=torch.int64)
    for cell in range(N):
        gumbel = reference.gumbel_noise(seeds, candidates, torch.full((B,), cell), V)  # (B, V)
        noise[:, cell] = gumbel.argmax(1)
        marginal[:, cell] = (log_frequency[cell] + gumbel).argmax(1)
    return {"noise": noise, "marginal": marginal, "sibling": others, "mode": counts.argmax(1).expand(B, N)}


def measure(model: KoDalle, prefix: Prefix, arguments: argparse.Namespace) -> list[PassCount]:
    """All settings: `above` with every window; without top_p the other guesses too, with windows 4 and 16."""
    N = model.config.image_seq_len
    windows = sorted({min(window, N - 1) for window in (*arguments.windows, N - 1)})
    results = []
    for temperature, top_p in SETTINGS:
        params = SamplingParams(temperature=temperature, top_p=top_p)

        def requests(seed: int, params: SamplingParams = params) -> list[SequenceRequest]:
            every = range(prefix.num_captions * arguments.candidates)
            return [
                SequenceRequest(
                    i // arguments.candidates, params.updated(seed=seed), candidate=i % arguments.candidates
                )
                for i in every
            ]

        sampler = Sampler(model, speculative=False)
        expected, others = (sampler.decode(prefix, requests(arguments.seed + number)) for number in (0, 1))
        made = tables(model, requests(arguments.seed), others)
        plans = [("above", window, False) for window in windows]
        if top_p is None:
            plans += [(guess, window, False) for guess in GUESSES for window in (4, 16)]
            plans += [(guess, 16, True) for guess in ("above", "left", "noise")]
        with evaluating(model):
            for guess, window, fresh in plans:
                sequences = Sequences(model, prefix, requests(arguments.seed), window)
                table = None if guess in COPYING else made[guess]
                count = count_passes(sequences, expected, guess, table, window, fresh=fresh)
                print(line(count), flush=True)
                results.append(count)
    return results


def line(count: PassCount) -> str:
    """One row of the table."""
    ordered = sorted(count.passes)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    ahead = " ".join(f"{share:.2f}" for share in count.depth[:6])
    return (
        f"T {count.temperature:.1f}  top_p {count.top_p or 'off':>3}  {count.guess + (' fresh' if count.fresh else ''):14}"
        f"w {count.window:3}  passes {statistics.mean(ordered):6.2f} of {count.tokens} (10-90 %: {low}-{high})  "
        f"{count.gain:5.2f}x fewer  wrong {count.wrong}  right by depth {ahead}"
    )


def predict(counts: list[PassCount], costs: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """tokens / passes x cost of a step / cost of a pass, for `above`, each sequence at its own pace.

    costs: {weights: {"B" or "Bxw": ms}} of jacobi_cost.py. Beside them a GPU that only reads: flat up to FREE_ROWS.
    """
    flat: dict[str, dict[str, float]] = {"reading-bound, 184 rows free": {}}
    for B in (1, 4, 16, 64):
        flat["reading-bound, 184 rows free"][str(B)] = 1.0
        for w in {count.window for count in counts}:
            flat["reading-bound, 184 rows free"][f"{B}x{w}"] = max(1.0, B * w / FREE_ROWS)
    table: list[dict[str, Any]] = []
    for name, cost in (costs | flat).items():
        for shape in (shape for shape in cost if "x" in shape):
            batch, window = shape.split("x")
            for count in counts:
                if count.guess == "above" and not count.fresh and count.window == int(window):
                    setting = {"temperature": count.temperature, "top_p": count.top_p}
                    speedup = round(count.gain * cost[batch] / cost[shape], 3)
                    table.append(
                        {"cost": name, "batch": int(batch), "window": int(window)} | setting | {"speedup": speedup}
                    )
    return table


def check(model: KoDalle, prefix: Prefix, arguments: argparse.Namespace) -> dict[str, Any]:
    """`JacobiDecoder` itself: `--check` images of it, 16 at a time, compared with `Sampler.decode`, both timed.

    Temperature 0.7, window 16. Then the first 16 of them one at a time, both ways in turns.
    """
    params, captions = SamplingParams(temperature=0.7), prefix.num_captions
    requests = [
        SequenceRequest(i % captions, params.updated(seed=arguments.seed), candidate=i // captions)
        for i in range(arguments.check)
    ]
    sampler = Sampler(model, speculative=False)
    equal, seconds = 0, {"sampler_16": 0.0, "jacobi_16": 0.0, "sampler_1": 0.0, "jacobi_1": 0.0}

    def run(name: str, part: list[SequenceRequest]) -> Tensor:
        start = time.perf_counter()
        if name.startswith("sampler"):
            tokens = sampler.decode(prefix, part)
        else:
            with evaluating(model):
                decoder = JacobiDecoder(sampler.step_model(), len(part), window=16)
                slots = [decoder.add(prefix, request) for request in part]
                unfinished = set(slots)
                while unfinished:
                    unfinished -= set(decoder.step())
                tokens = torch.stack([decoder.remove(slot) for slot in slots])
        seconds[name] += time.perf_counter() - start
        return tokens

    for start in range(0, len(requests), 16):
        part = requests[start : start + 16]
        equal += int((run("sampler_16", part) == run("jacobi_16", part)).all(1).sum())
    for request in requests[:16]:
        run("sampler_1", [request]), run("jacobi_1", [request])
    result = {"images": len(requests), "equal": equal, "weights": sampler.weights, "seconds": seconds}
    print(f"{equal} of {len(requests)} images of JacobiDecoder equal Sampler's, all tokens; seconds {seconds}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("pairs", type=Path, help="prepared pairs: their validation captions are used")
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=2, help="of each caption")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cost", type=Path, help="document of jacobi_cost.py")
    parser.add_argument("--check", type=int, default=1000, help="images of the decoder itself, compared and timed")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--out", type=Path, help="where the document is also written")
    arguments = parser.parse_args()
    model: KoDalle = load_part(arguments.model, "transformer")
    if arguments.random_weights:
        torch.manual_seed(0)
        model = KoDalle(model.config, embedding_std=0.02).eval()
    captions = sorted({pair.captions[0] for pair in load_pairs(arguments.pairs).validation})
    chosen = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))[: arguments.captions]
    texts = load_folder_tokenizer(arguments.model).encode(
        [captions[index] for index in chosen.tolist()], model.config.text_seq_len
    )
    prefix = Sampler(model, speculative=False).prefill(texts.tokens)
    checked = check(model, prefix, arguments)
    counts = measure(model, prefix, arguments)
    machine = facts(torch.device("cpu"))
    costs = json.loads(arguments.cost.read_text(encoding="utf-8"))["pass_ms"] if arguments.cost else {}
    document = machine | {
        "model": stored_path(arguments.model), "sizes": model.config.model_dump(), "random_weights": arguments.random_weights,
        "captions": len(texts.tokens), "candidates": arguments.candidates, "seed": arguments.seed,
        "counts": [asdict(count) | {"gain": round(count.gain, 4)} for count in counts],
        "checked": checked, "predicted": predict(counts, costs),
    }  # fmt: skip
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")
    print_document(document)


if __name__ == "__main__":
    main()
