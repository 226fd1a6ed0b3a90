"""Content Credentials: manifests that a verifier reads back and finds valid, and a changed file that it finds out."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import c2pa
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from PIL import Image

from engine.errors import InputError
from engine.pipeline.ai_marks import DigitalSource
from engine.pipeline.image_encoding import ImageFormat, encode_image, read_metadata
from serve.worker.content_credentials import ContentCredentials
from tests.signers import Key, write_signer

METADATA = {"caption": "상의에서 색상은 레드이다.", "seed": 7}


@pytest.fixture(scope="module")
def credentials(signer: tuple[Path, Path]) -> ContentCredentials:
    return ContentCredentials(*signer)


def read(content: bytes, image_format: ImageFormat) -> tuple[str | None, dict[str, object]]:
    """Validation state and active manifest, as a verifier finds them."""
    with c2pa.Reader(f"image/{image_format}", io.BytesIO(content)) as reader:
        store = json.loads(reader.json())
        return reader.get_validation_state(), store["manifests"][store["active_manifest"]]


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("source", ["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"])
def test_a_verifier_reads_who_made_an_image_and_how(
    credentials: ContentCredentials, image_format: ImageFormat, source: DigitalSource
) -> None:
    image = Image.linear_gradient("L").resize((48, 48)).convert("RGB")
    plain = encode_image(image, image_format, metadata=METADATA, source=source)
    signed = credentials.sign(plain, image_format, source)
    state, manifest = read(signed, image_format)
    assert state == "Valid"
    (actions,) = (one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions"))  # type: ignore[attr-defined]
    assert actions[0]["action"] == "c2pa.created"
    assert actions[0]["digitalSourceType"] == f"http://cv.iptc.org/newscodes/digitalsourcetype/{source}"
    assert manifest["signature_info"]["issuer"] == "A Fashion House"  # type: ignore[index]
    assert manifest["claim_generator_info"][0]["name"] == "KoDALLE engine"  # type: ignore[index]
    with Image.open(io.BytesIO(signed)) as opened, Image.open(io.BytesIO(plain)) as unsigned:
        assert opened.convert("RGB").tobytes() == unsigned.convert("RGB").tobytes()
        assert opened.info["xmp"] == unsigned.info["xmp"]
    assert read_metadata(signed) == METADATA, "provenance stays beside it"


def test_a_changed_caption_is_found_out(credentials: ContentCredentials) -> None:
    content = encode_image(Image.new("RGB", (16, 16)), "png", metadata={"caption": "red shirt"})
    signed = credentials.sign(content, "png", "trainedAlgorithmicMedia")
    assert signed.count(b"red shirt") >= 1
    state, _ = read(signed.replace(b"red shirt", b"tan shirt"), "png")
    assert state == "Invalid"


@pytest.mark.parametrize("kind", ["rsa", "ed25519", "p384"])
def test_the_algorithm_is_that_of_the_key(tmp_path: Path, kind: str) -> None:
    make: dict[str, Callable[[], Key]] = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    }
    credentials = ContentCredentials(*write_signer(tmp_path, make[kind]()))
    content = encode_image(Image.new("RGB", (16, 16)), "jpeg", metadata={})
    assert read(credentials.sign(content, "jpeg", "trainedAlgorithmicMedia"), "jpeg")[0] == "Valid"


def test_files_that_cannot_sign_are_one_line(signer: tuple[Path, Path], tmp_path: Path) -> None:
    certificates, key = signer
    other = write_signer(tmp_path, ec.generate_private_key(ec.SECP256R1()))[1]
    (tmp_path / "text.pem").write_text("no key")
    (tmp_path / "text.pem").chmod(0o600)
    for one, field in ((tmp_path / "none.pem", "c2pa_key"), (other, "c2pa_key"), (tmp_path / "text.pem", "c2pa_key")):
        with pytest.raises(InputError) as raised:
            ContentCredentials(certificates, one)
        assert raised.value.field == field
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(InputError, match="c2pa_certificates"):
        ContentCredentials(tmp_path / "none.pem", key)
    other.chmod(0o644)
    with pytest.raises(InputError, match="readable for every user"):
        ContentCredentials(certificates, other)
