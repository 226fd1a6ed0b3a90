"""minDALL-E's sampling example, line by line, with this engine: python examples/mindalle_sampling.py MODEL [--prompt …] [--clip FOLDER]

theirs (examples/sampling_ex.py)                          here
parser: -n 96, --softmax-temperature, --top-k, --top-p    the same options
set_seed(args.seed)                                       SamplingParams(seed=…): candidate i of a seed is always the same image
Dalle.from_pretrained('minDALL-E/1.3B')                   kodalle import 1.3B.tar.gz MODEL, then Pipeline.from_pretrained(MODEL)
model.sampling(prompt=…, num_candidates=…)                pipeline([prompt], SamplingParams(…))
clip.load("ViT-B/32"), clip_score, images[rank]           kodalle import clip-vit-base-patch32/ FOLDER; the pipeline ranks with it
Image.fromarray(…).save(f'./figures/{prompt}_{i}.png')    the best sixteen are saved under the same names
"""

import argparse
from pathlib import Path

from engine.models.folder import load_own_ranker_tokenizer, load_part
from engine.pipeline.pipeline import Pipeline
from engine.sampling_params import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="what `kodalle import 1.3B.tar.gz MODEL` wrote")
    parser.add_argument("-n", "--num-candidates", type=int, default=96)
    parser.add_argument("--prompt", default="A painting of a tree on the ocean")
    parser.add_argument("--softmax-temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--top-p", type=float, default=None, help="0.0 <= top-p <= 1.0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clip", type=Path, default=None, help="what `kodalle import clip-vit-base-patch32/ FOLDER` wrote"
    )
    parser.add_argument("--device", default="cpu", help="cuda:0 where there is a GPU")
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    args = parser.parse_args()

    # Setup
    model = Pipeline.from_pretrained(args.model, device=args.device)
    if args.clip is not None:
        ranker = load_part(args.clip, "koclip").to(args.device)
        tokenizer = load_own_ranker_tokenizer(args.clip)
        model = Pipeline(model.transformer, model.vqgan, ranker, model.tokenizer, ranker_tokenizer=tokenizer)

    # Sampling, and CLIP re-ranking where there is a CLIP: best first
    params = SamplingParams(
        temperature=args.softmax_temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        candidates=args.num_candidates,
    )
    generation = model([args.prompt], params)[0]

    # Save images
    rank = [candidate.candidate for candidate in generation.candidates]
    print(rank, len(rank))
    args.figures.mkdir(parents=True, exist_ok=True)
    for i, candidate in enumerate(generation.top(min(16, args.num_candidates))):
        candidate.image.save(args.figures / f"{args.prompt}_{i}.png")


if __name__ == "__main__":
    main()
