"""Content Credentials: a signed C2PA manifest in each image, with the key and certificates that the settings name.

    c2pa.created, digitalSourceType trainedAlgorithmicMedia or compositeWithTrainedAlgorithmicMedia, by this engine

The manifest binds the whole file, metadata included, so a changed pixel or caption shows. Its identifier is random, and most
algorithms sign with random numbers: the same request then gives the same pixels and the same provenance, but other bytes. No
time stamp authority is called, as that is another server's answer for each image: verifiers trust a manifest for as long as its
certificate is valid.

Specification: https://spec.c2pa.org, version 2. The package c2pa-python is imported when a server has a key.
"""

import io
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine import __version__
from engine.errors import InputError
from engine.pipeline.ai_marks import SOURCE_TYPE_URI, DigitalSource
from engine.pipeline.image_encoding import ImageFormat, encode_image
from engine.pipeline.provenance import SOFTWARE

if TYPE_CHECKING:
    from c2pa import Signer

_ALGORITHMS = ("es256", "ps256", "ed25519", "es384", "es512")  # of the commonest kinds of keys first
_VALID = ("Valid", "Trusted")


class ContentCredentials:
    """Signs images. Any thread may call it.

    Args:
        certificates: PEM, the signer's first and then those that issued it.
        key: PEM of PKCS #8, the signer's; not readable for every user.

    Raises:
        InputError: a file that cannot be read, or a pair that does not sign; the package is not installed.
    """

    def __init__(self, certificates: Path, key: Path) -> None:
        try:
            import c2pa
        except ModuleNotFoundError as error:
            remedy = "needs the package c2pa-python: pip install 'kodalle-engine[c2pa]'"
            raise InputError("c2pa_key", key, remedy) from error
        self._c2pa = c2pa
        self._certificates = _read(certificates, "c2pa_certificates")
        self._key = _read(key, "c2pa_key")
        if os.name == "posix" and key.stat().st_mode & stat.S_IROTH:
            raise InputError("c2pa_key", key, "is readable for every user: chmod o-r it")
        probe = encode_image(Image.new("RGB", (8, 8)), "png", metadata={})
        reasons = []
        for self._algorithm in _ALGORITHMS:
            try:
                signed = self.sign(probe, "png", "trainedAlgorithmicMedia")
                with c2pa.Reader("image/png", io.BytesIO(signed)) as reader:
                    if reader.get_validation_state() in _VALID:
                        return
                    reasons.append("its signature is not valid")
            except c2pa.C2paError as error:
                reasons.append(str(error).splitlines()[0])
        remedy = f"does not sign with {certificates} ({reasons[0]}): give the key of the first certificate, and its issuers after it"
        raise InputError("c2pa_key", key, remedy)

    def sign(self, content: bytes, image_format: ImageFormat, source: DigitalSource) -> bytes:
        """An image file with a manifest."""
        signed = io.BytesIO()
        with self._signer() as signer, self._c2pa.Builder(json.dumps(_manifest(source))) as builder:
            builder.sign(signer, f"image/{image_format}", io.BytesIO(content), signed)
        return signed.getvalue()

    def _signer(self) -> "Signer":
        info = self._c2pa.C2paSignerInfo(self._algorithm, self._certificates, self._key, None)
        return self._c2pa.Signer.from_info(info)


def _manifest(source: DigitalSource) -> dict[str, Any]:
    agent = {"name": SOFTWARE, "version": __version__}
    action = {"action": "c2pa.created", "digitalSourceType": f"{SOURCE_TYPE_URI}{source}", "softwareAgent": agent}
    return {
        "claim_generator_info": [agent],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(field, path, f"cannot be read ({error.strerror}): correct the path") from error
