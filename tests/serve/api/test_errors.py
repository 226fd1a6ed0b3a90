import json

import pytest

from engine.errors import InputError
from serve.api.errors import FAILURES, REFUSALS, Failure, input_failure, refusal
from serve.messages import Refused

# OpenAI's client retries these statuses, unless `x-should-retry` is false.
RETRIED = {408, 409, 429}


@pytest.mark.parametrize("code", FAILURES)
def test_each_code_has_openais_four_keys_and_both_languages(code: str) -> None:
    failure = Failure(code, "More.", "더.", param="n")
    error = json.loads(failure.body())["error"]
    assert error.keys() == {"message", "message_ko", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, "n")
    assert error["message"].endswith(". More.")
    assert any("가" <= letter <= "힣" for letter in FAILURES[code].text_ko)
    assert failure.headers["content-type"] == "application/json"


def test_clients_do_not_retry_errors_that_a_retry_cannot_fix() -> None:
    for code in ("deadline_exceeded", "internal_error", "request_timeout"):
        assert Failure(code).headers["x-should-retry"] == "false"
    for code, kind in FAILURES.items():
        if kind.status < 500 and kind.status not in RETRIED:
            continue
        should_retry = Failure(code).headers.get("x-should-retry")
        assert should_retry == "false" or code in (
            "queue_full",
            "rate_limit_exceeded",
            "unavailable",
            "generation_failed",
        ), code


def test_retry_after_is_in_whole_seconds_and_never_0() -> None:
    assert Failure("queue_full", retry_after_s=0.01).headers["retry-after"] == "1"
    assert Failure("queue_full", retry_after_s=2.2).headers["retry-after"] == "3"
    assert "retry-after" not in Failure("queue_full").headers


@pytest.mark.parametrize(
    ("reason", "status"), [("queue_full", 429), ("deadline", 504), ("draining", 503), ("invalid", 400), ("failed", 500)]
)
def test_a_workers_refusal_has_a_status(reason: str, status: int) -> None:
    failure = refusal(Refused(reason, "why", param="n", retry_after_s=4))  # type: ignore[arg-type]
    assert (failure.status, failure.param, failure.headers["retry-after"]) == (status, "n", "4")
    assert "why" in failure.message
    assert "why" in failure.message_ko
    assert set(REFUSALS) == {"queue_full", "deadline", "draining", "invalid", "failed"}


def test_the_engines_message_is_kept_with_the_requests_name_of_the_field() -> None:
    failure = input_failure(InputError("mask_image", "all white", "keeps nothing"), param="mask")
    assert (failure.param, failure.status) == ("mask", 400)
    assert "`mask`: all white: keeps nothing" in failure.message


def test_a_message_that_cannot_be_encoded_is_escaped() -> None:
    body = Failure("unknown_parameter", "\ud800").body()
    assert "\\ud800" in body.decode("utf-8")
    assert json.loads(body)["error"]["code"] == "unknown_parameter"
