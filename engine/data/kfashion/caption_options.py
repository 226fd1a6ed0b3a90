"""How captions are written of K-Fashion labels: the options, and what they mean, for `kodalle data`. Imports nothing."""

from typing import Literal

ListValues = Literal["all", "first"]
CaptionScope = Literal["garment", "photo"]
OPTION_HELP = {
    "caption_scope": "caption of the cropped garment, or of all garments in the photo",
    "style": "keep sentences about 스타일 (KoDALLE trains without)",
    "subject_once": "write `상의에서` once per garment",
    "list_values": "values of 디테일, 소재, 프린트 that the caption names",
    "per_garment": "one line a garment instead of one a file",
}
