import base64
import io

import pytest

from serve.api.data_urls import picture_bytes
from serve.api.errors import Failure
from serve.api.schemas import EditJsonRequest
from serve.api.validation import read_request

CONTENT = bytes(range(256))
URL = f"data:image/png;base64,{base64.b64encode(CONTENT).decode()}"


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg", "jpg", "PNG"])
def test_a_data_url_is_its_file(kind: str) -> None:
    assert picture_bytes(URL.replace("png", kind, 1), "images").read() == CONTENT


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.com/a.png", "fetches nothing"),
        ("http://169.254.169.254/latest/meta-data", "fetches nothing"),
        ("file:///etc/passwd", "fetches nothing"),
        ("", "fetches nothing"),
        ("data:text/html;base64,AAAA", "fetches nothing"),
        ("data:image/svg+xml;base64,AAAA", "PNG, WebP or JPEG"),
        ("data:image/png,AAAA", "PNG, WebP or JPEG"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,AA AA", "not valid base64"),
        ("data:image/png;base64,한글", "not valid base64"),
    ],
)
def test_every_other_url_is_refused_without_being_fetched(
    url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it connected"))
    with pytest.raises(Failure, match=reason) as raised:
        picture_bytes(url, "images")
    assert (raised.value.code, raised.value.param, raised.value.status) == ("invalid_image", "images", 400)


def edit(**fields: object) -> EditJsonRequest:
    return read_request(EditJsonRequest, {"prompt": "a", "images": [{"image_url": URL}]} | fields)


def test_a_json_edits_pictures_have_the_names_of_the_forms_parts() -> None:
    files = edit(mask={"image_url": URL}).files()
    assert {name: file.read() for name, file in files.items()} == {"image": CONTENT, "mask": CONTENT}
    assert list(edit().files()) == ["image"]
    assert isinstance(edit().files()["image"], io.BytesIO)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"images": []}, "invalid_value", "images"),
        ({"images": URL}, "invalid_value", "images"),
        ({"images": [{"url": URL}]}, "missing_required_parameter", "images"),
        ({"images": [{"image_url": URL, "detail": "low"}]}, "invalid_value", "images"),
        ({"images": [{"image_url": URL, "file_id": "f"}]}, "unsupported_parameter", "images"),
        ({"images": [{"image_url": URL}, {"image_url": URL}]}, "invalid_image", "images"),
        ({"mask": {"image_url": "https://example.com/a.png"}}, "invalid_image", "mask"),
        ({"image": URL}, "unknown_parameter", "image"),
    ],
)
def test_what_a_json_edit_cannot_have_is_named(fields: dict[str, object], code: str, param: str) -> None:
    with pytest.raises(Failure) as raised:
        edit(**fields).files()
    assert (raised.value.code, raised.value.param) == (code, param)
