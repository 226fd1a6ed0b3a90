"""Errors of the API: a table of codes with status, type, English and Korean text, and whether a retry can help.

Every reply that is not a success carries OpenAI's error object with all its four keys, and the Korean text beside it:

    {"error": {"message": …, "message_ko": …, "type": …, "param": …, "code": …}}

OpenAI's clients retry by themselves on 408, 409, 429 and every 5xx, up to two times: without `x-should-retry: false`, a
request that misses its deadline would be generated three times.

No torch, no ray, no web framework.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import InputError
from serve.messages import Refused

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]
# What a client should do: retry (after Retry-After), never retry, or follow its own rules for the status.
Retry = Literal["yes", "no", "client"]


@dataclass(frozen=True)
class FailureKind:
    """One entry of the table. The texts are whole sentences; a failure's details are appended to them."""

    status: int
    type: ErrorType
    text: str
    text_ko: str
    retry: Retry = "client"


_BAD: ErrorType = "invalid_request_error"

FAILURES: dict[str, FailureKind] = {
    # -------------------------------------------------------------------------------------------- request contents
    "invalid_json": FailureKind(400, _BAD, "The body is not valid JSON.", "본문이 올바른 JSON이 아닙니다."),
    "invalid_form": FailureKind(
        400, _BAD, "The body is not a valid multipart form.", "본문이 올바른 multipart 양식이 아닙니다."
    ),
    "missing_required_parameter": FailureKind(400, _BAD, "A field is missing.", "필수 항목이 없습니다."),
    "unknown_parameter": FailureKind(
        400, _BAD, "A field is unknown to this server.", "이 서버가 알지 못하는 항목입니다."
    ),
    "unsupported_parameter": FailureKind(
        400, _BAD, "This model does not support a field.", "이 모델이 지원하지 않는 항목입니다."
    ),
    "invalid_type": FailureKind(400, _BAD, "A field has the wrong type.", "항목의 자료형이 맞지 않습니다."),
    "invalid_value": FailureKind(400, _BAD, "A field has an invalid value.", "항목의 값이 맞지 않습니다."),
    "invalid_image": FailureKind(
        400, _BAD, "An uploaded image cannot be used.", "업로드한 이미지를 사용할 수 없습니다."
    ),
    "image_too_large": FailureKind(
        400, _BAD, "An uploaded image has too many pixels.", "업로드한 이미지의 픽셀 수가 너무 많습니다."
    ),
    "request_timeout": FailureKind(
        408, _BAD, "The body did not arrive in time.", "본문이 제시간에 도착하지 않았습니다.", "no"
    ),
    "request_too_large": FailureKind(413, _BAD, "The body is too large.", "본문이 너무 큽니다."),
    "unsupported_media_type": FailureKind(
        415, _BAD, "The body has an unsupported media type.", "지원하지 않는 형식의 본문입니다."
    ),
    # ------------------------------------------------------------------------------------------------------- access
    "missing_api_key": FailureKind(
        401,
        "authentication_error",
        "This server needs an API key: send it as `Authorization: Bearer …`.",
        "API 키가 필요합니다. `Authorization: Bearer …` 헤더로 보내 주세요.",
    ),
    "invalid_api_key": FailureKind(
        401, "authentication_error", "The API key is not valid.", "API 키가 올바르지 않습니다."
    ),
    "insufficient_scope": FailureKind(
        403, "permission_error", "The API key does not allow this.", "이 API 키로는 할 수 없는 요청입니다."
    ),
    "not_local": FailureKind(
        403,
        "permission_error",
        "This server has no API keys, so it answers only requests from its own machine.",
        "API 키 없이 실행 중이므로 같은 컴퓨터에서 온 요청에만 응답합니다.",
    ),
    "cross_site": FailureKind(
        403,
        "permission_error",
        "A page of another website sent this request; a server without API keys does not answer it.",
        "다른 웹사이트의 페이지가 보낸 요청에는 응답하지 않습니다.",
    ),
    # -------------------------------------------------------------------------------------------------------- routing
    "model_not_found": FailureKind(404, _BAD, "No such model.", "그런 모델이 없습니다."),
    "not_found": FailureKind(404, _BAD, "No such path.", "이 주소에는 아무것도 없습니다."),
    "method_not_allowed": FailureKind(
        405, _BAD, "This path does not allow this method.", "이 주소에서 허용되지 않는 메서드입니다."
    ),
    "http_error": FailureKind(400, _BAD, "The request cannot be answered.", "요청에 응답할 수 없습니다."),
    "client_closed_request": FailureKind(
        499, _BAD, "The client closed the connection.", "클라이언트가 연결을 끊었습니다.", "no"
    ),
    # --------------------------------------------------------------------------------------------- load and deadlines
    "rate_limit_exceeded": FailureKind(
        429,
        "rate_limit_error",
        "The key's rate limit is exceeded: try again later.",
        "API 키의 사용량 한도에 도달했습니다. 잠시 후 다시 시도해 주세요.",
    ),
    "queue_full": FailureKind(
        429,
        "rate_limit_error",
        "The server's queue is full: try again later.",
        "지금은 작업이 가득 찼습니다. 잠시 후 다시 시도해 주세요.",
    ),
    "unavailable": FailureKind(
        503,
        "server_error",
        "No worker accepts requests at the moment: try again soon.",
        "지금은 이미지를 생성할 수 있는 서버가 없습니다. 잠시 후 다시 시도해 주세요.",
    ),
    "deadline_exceeded": FailureKind(
        504,
        "server_error",
        "The images were not finished before the deadline.",
        "제한 시간 안에 이미지를 완성하지 못했습니다.",
        "no",
    ),
    "generation_failed": FailureKind(
        500, "server_error", "The generation failed.", "이미지를 생성하는 중에 오류가 발생했습니다."
    ),
    "internal_error": FailureKind(
        500,
        "server_error",
        "Internal error; it is logged under the request id.",
        "서버 내부 오류가 발생했습니다. 요청 ID로 기록되었습니다.",
        "no",
    ),
}  # fmt: skip

REFUSALS = {
    "queue_full": "queue_full",
    "deadline": "deadline_exceeded",
    "draining": "unavailable",
    "invalid": "invalid_value",
    "failed": "generation_failed",
}

# Default of `retry_after_s` when a worker gives none.
_RETRY_AFTER_S = {"queue_full": 1.0, "draining": 1.0}


class Failure(Exception):
    """An error reply: a code of the table and the details of this request.

    Args:
        code: key of `FAILURES`.
        detail: one or more sentences, appended to the code's own; never the caption.
        detail_ko: the same in Korean.
        param: the field at fault.
        retry_after_s: seconds after which a retry can succeed.
        headers: further headers of the reply.
    """

    def __init__(
        self,
        code: str,
        detail: str = "",
        detail_ko: str = "",
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.code, self.kind = code, FAILURES[code]
        self.message = f"{self.kind.text} {detail}".strip()
        self.message_ko = f"{self.kind.text_ko} {detail_ko}".strip()
        self.param = param
        self.retry_after_s = retry_after_s
        self._headers = headers or {}
        super().__init__(self.message)

    @property
    def status(self) -> int:
        return self.kind.status

    @property
    def headers(self) -> dict[str, str]:
        """The reply's headers."""
        headers = {"content-type": "application/json", "cache-control": "no-store"} | self._headers
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.kind.retry != "client":
            headers["x-should-retry"] = "true" if self.kind.retry == "yes" else "false"
        return headers

    def as_object(self) -> dict[str, Any]:
        """The value of `error`."""
        return {
            "message": self.message,
            "message_ko": self.message_ko,
            "type": self.kind.type,
            "param": self.param,
            "code": self.code,
        }

    def body(self) -> bytes:
        # Korean stays readable in a terminal, and any text can be encoded.
        return json.dumps({"error": self.as_object()}, ensure_ascii=False).encode("utf-8", errors="backslashreplace")


def invalid_value(name: str, detail: str, detail_ko: str) -> Failure:
    """A field's value that cannot be used; the details begin in lower case and have no full stop."""
    return Failure("invalid_value", f"`{name}` {detail}.", f"`{name}`: {detail_ko}.", param=name)


def refusal(refused: Refused) -> Failure:
    """A worker's refusal as an error of the API."""
    detail_ko = f"({refused.message})" if refused.message else ""
    return Failure(
        REFUSALS[refused.reason],
        refused.message,
        detail_ko,
        param=refused.param,
        retry_after_s=refused.retry_after_s or _RETRY_AFTER_S.get(refused.reason),
    )


def input_failure(error: InputError, *, param: str | None = None, detail_ko: str = "") -> Failure:
    """The engine's InputError as an error of the API.

    Args:
        param: the request's field; None: the engine's name of it.
        detail_ko: the message in Korean; empty: the English message in brackets.
    """
    param = param or error.field
    detail = f"{error.value}: {error.remedy}"
    return Failure("invalid_value", f"`{param}`: {detail}.", f"`{param}`: {detail_ko or f'({detail})'}.", param=param)
