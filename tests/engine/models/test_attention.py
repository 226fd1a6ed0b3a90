import pytest
import torch

from engine.errors import InputError
from engine.models import attention as attention_module
from engine.models.attention import AttentionBackend, attention, check_backend, masked_attention
from kernels import reference


def _loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    B, Tq, H, D = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(Tq):
            for h in range(H):
                seen = k.shape[1] - Tq + t + 1 if causal else k.shape[1]
                weights = ((k[b, :seen, h] @ q[b, t, h]) * D**-0.5).exp()
                out[b, t, h] = (weights / weights.sum()) @ v[b, :seen, h]
    return out


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("Tq", "Tk"), [(7, 7), (3, 8), (1, 5)])
def test_backends_compute_attention(backend: str, causal: bool, Tq: int, Tk: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, Tq, 3, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, Tk, 3, 8, dtype=torch.float64)
    out = attention(q, k, v, causal=causal, backend=check_backend(backend, q.device))
    torch.testing.assert_close(out, _loops(q, k, v, causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_masks_leave_out_what_they_forbid(backend: AttentionBackend) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 7, 3, 8, dtype=torch.float64)
    causal = torch.ones(7, 7).tril().bool()
    out = masked_attention(q, k, v, causal, backend=backend)
    torch.testing.assert_close(out, _loops(q, k, v, causal=True), rtol=0, atol=1e-12)
    mask = causal & ((torch.arange(7)[:, None] - torch.arange(7)) % 3 == 0)
    out = masked_attention(q, k, v, mask, backend=backend)
    for row in range(7):
        seen = mask[row].nonzero()[:, 0]
        alone = _loops(q[:, row : row + 1], k[:, seen], v[:, seen], causal=False)
        torch.testing.assert_close(out[:, row : row + 1], alone, rtol=0, atol=1e-12)


def test_xformers_gets_the_mask_in_rows_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels run on a GPU only: a stand-in computes what they are given, and checks how it lies in memory."""

    class Operations:
        @staticmethod
        def memory_efficient_attention(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: torch.Tensor
        ) -> torch.Tensor:
            assert attn_bias.shape == (2, 3, 7, 7)
            assert attn_bias.stride()[2] % 8 == 0
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + attn_bias
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    monkeypatch.setattr(attention_module, "_xformers_ops", lambda: Operations)
    monkeypatch.setattr(attention_module, "check_backend", lambda *_: "xformers")
    q, k, v = torch.randn(3, 2, 7, 3, 8)
    mask = torch.ones(7, 7).tril().bool() & (torch.arange(7) != 2)
    mask[2, 2] = True
    expected = masked_attention(q, k, v, mask, backend="sdpa")
    torch.testing.assert_close(masked_attention(q, k, v, mask, backend="xformers"), expected)


def test_packed_views_and_gradients_agree() -> None:
    torch.manual_seed(0)
    packed = torch.randn(2, 6, 3, 4, 8, requires_grad=True)  # q, k, v as views of one tensor
    gradients = []
    for backend in ("sdpa", "reference"):
        q, k, v = packed.unbind(2)
        out = attention(q, k, v, backend=check_backend(backend, q.device))
        gradients.append(torch.autograd.grad(out.square().sum(), packed)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_reference_in_bfloat16_is_as_good_as_torch() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 33, 2, 16)
    truth = reference.attention(q.double(), k.double(), v.double(), causal=True)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    ours = (reference.attention(q, k, v, causal=True) - truth).abs().max()
    torchs = (attention(q, k, v, backend="sdpa") - truth).abs().max()
    assert ours <= 2 * torchs


def test_unavailable_backends_are_input_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(InputError, match="choose one of sdpa, xformers, reference"):
        check_backend("flash", cpu)
    with pytest.raises(InputError, match="CUDA only"):
        check_backend("xformers", cpu)
    with pytest.raises(InputError, match="CUDA only"):
        attention(*torch.zeros(3, 1, 2, 1, 4), backend="xformers")
    monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install xformers"):
        check_backend("xformers", cuda)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Tq", [40, 7])
def test_xformers_on_the_gpu(causal: bool, Tq: int) -> None:
    pytest.importorskip("xformers")
    torch.manual_seed(0)
    q = torch.randn(2, Tq, 4, 64, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, 2, 40, 4, 64, device="cuda", dtype=torch.float16)
    truth = reference.attention(q.double(), k.double(), v.double(), causal=causal)
    ours = (attention(q, k, v, causal=causal, backend="xformers") - truth).abs().max()
    torchs = (attention(q, k, v, causal=causal, backend="sdpa") - truth).abs().max()
    assert ours <= 2 * torchs + 1e-4
