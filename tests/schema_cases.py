"""Requests generated from the server's own OpenAPI document, valid and invalid, with every reply validated against it."""

import base64
import io
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.core.result import Ok

# A schema cannot express that one field requires another: valid data may be rejected for these, with `invalid_value`.
_DEPENDENT_FIELDS = {
    "n", "candidates", "num_candidates", "guidance_scale", "output_compression", "partial_images", "progress", "rank_by",
    "keep_rows", "mask", "background", "strength", "changed_from",
}  # fmt: skip


@dataclass
class Outcome:
    """Counts of the cases and their replies."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)


def send_cases(url: str, *, per_operation: int, seed: int) -> Outcome:
    """Sends up to `per_operation` valid and, but for forms, as many invalid cases to each operation at `url`.

    Raises:
        AssertionError, or schemathesis' group of failures, with the smallest case found: a status of 500 and above, an
        undocumented status, type or body, invalid JSON accepted, valid data rejected.
    """
    _register_images()
    outcome = Outcome()
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in document.get_all_operations():
        assert isinstance(found, Ok), f"invalid operation in the document: {found.err()}"
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if (
                mode is GenerationMode.NEGATIVE
                and "multipart/form-data" in operation.get_request_payload_content_types()
            ):
                continue  # schemathesis cannot validate files against a negated schema: see tests/byte_mutants.py
            with suppress(Unsatisfiable):  # an operation without fields has no invalid cases
                cases = operation.as_strategy(generation_mode=mode)
                _sender(cases, mode, outcome, count=per_operation, seed=seed)()
    return outcome


def _sender(
    cases: st.SearchStrategy[Case], mode: GenerationMode, outcome: Outcome, *, count: int, seed: int
) -> Callable[[], None]:
    @with_seed(seed)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def send(case: Case) -> None:
        response = case.call()
        outcome.sent += 1
        outcome.statuses[response.status_code] += 1
        outcome.operations[f"{mode.value} {case.operation.label}"] += 1
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        if mode is GenerationMode.POSITIVE and response.status_code == 400:
            error = response.json()["error"]
            assert error["code"] == "invalid_value", (case.as_curl_command(), error)
            is_strict = "does not know" in error["message"]  # `strict` refuses a prompt by its words
            assert is_strict or error["param"] in _DEPENDENT_FIELDS, (case.as_curl_command(), error)

    return send


@lru_cache(maxsize=1)
def _register_images() -> None:
    """Generates files of forms as images of one size, so that masks often match."""
    generator = st.tuples(st.sampled_from(["RGB", "RGBA", "L"]), st.sampled_from(["PNG", "WEBP"]), st.integers(0, 20))
    images = generator.map(lambda values: _image(*values))
    schemathesis.openapi.format("binary", images)
    schemathesis.openapi.format("image-data-url", images.map(_data_url))


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _image(mode: str, form: str, grey: int) -> bytes:
    image = Image.new(mode, (32, 32), "black" if mode == "L" else (grey, grey, grey))
    image.paste("white" if mode != "RGBA" else (0, 0, 0, 0), (0, 0, grey, grey))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()
