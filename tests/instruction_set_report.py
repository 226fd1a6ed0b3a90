"""A program for tests: decodes in the instruction set that the environment leaves, and prints what it found as JSON."""

import dataclasses
import json

import torch
import torch.nn.functional as F

from engine.config.transformer import TransformerConfig
from engine.decoding.cpu.packed_weights import Weights, _Int8Linear, _quantise_rows
from engine.decoding.sampler import Sampler
from engine.device import cpu_capabilities, default_dtype
from engine.models.transformer import KoDalle
from engine.sampling_params import SamplingParams, SequenceRequest

CONFIG = TransformerConfig(
    dim=64, num_layers=2, num_heads=2, head_dim=32, text_vocab_size=30, text_seq_len=8, text_position_rows=12,
    image_vocab_size=64, image_grid_size=3,
)  # fmt: skip
TEXT = torch.tensor([[0, 5, 6, 7, 2, 1, 1, 1], [0, 9, 2, 1, 1, 1, 1, 1]])
REQUESTS = [SequenceRequest(i % 2, SamplingParams(seed=i // 8), candidate=i % 8) for i in range(21)]
CASES: dict[str, tuple[torch.dtype, Weights | None]] = {
    "float32": (torch.float32, None),
    "float32 plain": (torch.float32, "plain"),
    "float32 int8": (torch.float32, "int8"),
    "bfloat16": (torch.bfloat16, None),
}


def main() -> None:
    weights, equal, tokens = {}, {}, {}
    for name, (dtype, wanted) in CASES.items():
        torch.manual_seed(0)
        model = KoDalle(CONFIG).to(dtype)
        sampler = Sampler(model, weights=wanted)
        weights[name] = sampler.weights
        if dtype == torch.float32 or multiplies(dtype):
            equal[name] = is_batch_invariant(sampler)
        if dtype == torch.float32 and sampler.step_model().compiled is not None:
            tokens[name] = sampler.generate(TEXT, REQUESTS).tolist()
    print(
        json.dumps(
            {
                "cpu": dataclasses.asdict(cpu_capabilities()),
                "default_dtype_of_a_large_model": str(default_dtype(torch.device("cpu"), 335_000_000))[6:],
                "multiplies_plain_bfloat16": multiplies(torch.bfloat16),
                "weights": weights,
                "equal_alone_and_in_a_batch": equal,
                "compiled_tokens": tokens,
                "int8_equals_integers": {
                    "as chosen": int8_equals_integers(in_bytes=None),
                    "as float32": int8_equals_integers(in_bytes=False),
                },
            }
        )
    )


def multiplies(dtype: torch.dtype) -> bool:
    try:
        F.linear(torch.ones(4, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
    except RuntimeError:
        return False
    return True


def is_batch_invariant(sampler: Sampler) -> bool:
    prefix = sampler.prefill(TEXT)
    together = sampler.decode(prefix, REQUESTS)
    return all(
        torch.equal(sampler.decode(prefix, [request])[0], tokens)
        for request, tokens in zip(REQUESTS, together, strict=True)
    )


def int8_equals_integers(*, in_bytes: bool | None) -> bool:
    """The 8-bit layer's bits against integers and one rounding an operation, at random and at the largest numbers."""
    torch.manual_seed(0)
    cases = [(300, 520, 40), (64, 4096, 5), (64, 1025, 7)]
    normal = [(torch.randn(N, K), torch.randn(R, K)) for N, K, R in cases]
    largest = [(torch.ones(N, K), torch.ones(R, K)) for N, K, R in cases]
    for weight, x in normal + largest:
        bias = torch.randn(len(weight))
        scales = weight.abs().amax(1) / 127
        quantised, steps = _quantise_rows(x)
        product = (quantised.double() - 128) @ (weight / scales[:, None]).round().double().T
        expected = (product.float() * scales * steps) + bias
        if not torch.equal(_Int8Linear(weight, bias, in_bytes=in_bytes).multiply(quantised, steps), expected):
            return False
    return True


if __name__ == "__main__":
    main()
