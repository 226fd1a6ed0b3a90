"""Reader of the weights that FID is published with: `pt_inception-2015-12-05-6726825d.pth`.

pytorch-fid, torch-fidelity and those who build on them load this one file, a plain state dict. It is not downloaded here: give its path.
Other weights of the same network are read, too, but `is_published` says that no paper's figure is comparable with theirs.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import InputError
from engine.files import file_digest
from engine.interop.checkpoint import open_checkpoint
from engine.interop.trees import check_shapes
from engine.models.inception_v3 import InceptionV3
from engine.models.uninitialised import Uninitialised

PUBLISHED_SHA256_START = "6726825d"  # the name of the published file states it, as torch.hub checks it
_FIELD = "--inception"
_COUNTERS = ".num_batches_tracked"  # of training; some versions of torch store them


@dataclass(frozen=True)
class InceptionWeights:
    """The network in eval mode, and which weights it has.

    Attributes:
        sha256: of the file.
        is_published: the file is the one that published FIDs are computed with.
    """

    network: InceptionV3
    sha256: str
    is_published: bool


def read_inception(path: Path) -> InceptionWeights:
    """The FID network with the weights of a file; nothing in the file is run.

    Raises:
        InputError: no such file, none of torch.save, one that asks for code to be run, a tensor that is missing, of another
            shape or not known (by name), or not finite.
    """
    if not path.is_file():
        raise InputError(_FIELD, path, "no such file: give the path of pt_inception-2015-12-05-6726825d.pth")
    found = {name: value for name, value in open_checkpoint(path).weights.items() if not name.endswith(_COUNTERS)}
    with Uninitialised():
        network = InceptionV3()
    own = network.state_dict()
    expected = {name: tuple(value.shape) for name, value in own.items() if not name.endswith(_COUNTERS)}
    check_shapes(found, expected, f"{_FIELD} {path}")
    for name, value in found.items():
        tensor = value.to(torch.float32).read()
        if not tensor.isfinite().all():
            raise InputError(f"{_FIELD} {path} {name}", "not finite", "copy the file again")
        own[name].copy_(tensor)
    sha256 = file_digest(path).sha256
    return InceptionWeights(
        network.eval().requires_grad_(False), sha256, is_published=sha256.startswith(PUBLISHED_SHA256_START)
    )
