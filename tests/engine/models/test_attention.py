import pytest
import torch

from engine.errors import InputError
from engine.models import attention as attention_module
from engine.models.attention import attention, check_backend
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
