"""K-Fashion label JSON (AI Hub "K-Fashion 이미지" v1.1) as frozen dataclasses, and its vocabulary.

Labels in the wild are incomplete: garments without 카테고리, boxes without a useful label and the reverse, `[{}]` for an
absent garment, boxes without area. None of that fails here; what could not be understood is kept in `Label.notes`,
`Garment.box_fault` or `Garment.outline_fault` for reports.

The vocabulary is open (K-COORD's own tables lack values that occur): an unknown value is a warning, never a fault, and
spelling variants are merged for lookups only; captions keep the label's spelling.

Source: K-COORD/K-Fashion, examples/*.json, README.md, dataset.py.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.clean_json import read_clean_json
from engine.data.label_format import Attributes, Box, LabelFault, Outline
from engine.data.names import readable_name
from engine.data.source_files import CONVERT
from engine.text import TextFault

STYLE = "스타일"
# Types of garment in the order of the JSON's keys and of captions, each with its name in file names.
GARMENT_TYPES = {"아우터": "outer", "하의": "bottom", "원피스": "onepiece", "상의": "top"}
STYLE_ATTRIBUTES = ("스타일", "서브스타일")
ATTRIBUTES = ("기장", "색상", "서브색상", "카테고리", "옷깃", "디테일", "소매기장", "소재", "프린트", "넥라인", "핏")
LIST_ATTRIBUTES = ("디테일", "소재", "프린트")


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.split(","))


_COLORS = _words(
    "골드, 그레이, 그린, 네온, 네이비, 라벤더, 레드, 민트, 베이지, 브라운, 블랙, 블루, 스카이블루, 실버, 옐로우, "
    "오렌지, 와인, 카키, 퍼플, 핑크, 화이트"
)
_STYLES = _words(
    "클래식, 프레피, 매니시, 톰보이, 페미닌, 로맨틱, 섹시, 히피, 웨스턴, 오리엔탈, 모던, 소피스트케이티드, 아방가르드, "
    "컨트리, 리조트, 젠더리스, 스포티, 레트로, 키치, 힙합, 펑크, 밀리터리, 스트리트"
)
# Known values by attribute; 카테고리 and 기장 depend on the garment type and are looked up as (type, attribute) first.
VOCABULARY: dict[str | tuple[str, str], frozenset[str]] = {
    ("상의", "카테고리"): _words("탑, 블라우스, 티셔츠, 니트웨어, 셔츠, 브라탑, 후드티"),
    ("하의", "카테고리"): _words("청바지, 팬츠, 스커트, 래깅스, 조거팬츠"),
    ("아우터", "카테고리"): _words("코트, 재킷, 점퍼, 패딩, 베스트, 가디건, 짚업"),
    ("원피스", "카테고리"): _words("드레스, 점프수트"),
    ("상의", "기장"): _words("크롭, 노멀, 롱"),
    ("하의", "기장"): _words("미니, 니렝스, 미디, 발목, 맥시"),
    ("원피스", "기장"): _words("미니, 니렝스, 미디, 발목, 맥시"),
    ("아우터", "기장"): _words("크롭, 노멀, 하프, 롱, 맥시"),
    "색상": _COLORS,
    "서브색상": _COLORS,
    "소매기장": _words("없음, 민소매, 반팔, 캡, 7부소매, 긴팔"),
    "핏": _words("노멀, 루즈, 오버사이즈, 스키니, 와이드, 타이트, 벨보텀"),
    "소재": _words(
        "패딩, 퍼, 무스탕, 스웨이드, 앙고라, 코듀로이, 시퀸/글리터, 데님, 저지, 트위드, 벨벳, 비닐/PVC, 울/캐시미어, "
        "합성섬유, 헤어 니트, 니트, 레이스, 린넨, 메시, 플리스, 네오프렌, 실크, 스판덱스, 자카드, 가죽, 면, 시폰, 우븐"
    ),
    "프린트": _words(
        "그라데이션, 그래픽, 깅엄, 도트, 레터링, 무지, 믹스, 뱀피, 스트라이프, 아가일, 지그재그, 지브라, 체크, 카무플라쥬, "
        "타이다이, 페이즐리, 플로럴, 하운즈투스, 하트, 해골, 호피"
    ),
    "디테일": _words(
        "X스트랩, 글리터, 니트꽈베기, 단추, 더블브레스티드, 드롭숄더, 드롭웨이스트, 디스트로이드, 띠, 러플, 레이스, 레이스업, "
        "롤업, 리본, 버클, 비대칭, 비즈, 셔링, 스터드, 스트링, 스티치, 스팽글, 슬릿, 싱글브레스티드, 자수, 지퍼, 체인, "
        "컷아웃, 퀄팅, 태슬, 패치워크, 퍼트리밍, 퍼프, 페플럼, 포켓, 폼폼, 프린지, 프릴, 플레어, 플리츠"
    ),
    "넥라인": _words(
        "라운드넥, 유넥, 브이넥, 홀토넥, 오프숄더, 원 숄더, 스퀘어넥, 노카라, 후드, 터틀넥, 보트넥, 스위트하트"
    ),
    "옷깃": _words(
        "셔츠칼라, 보우칼라, 세일러칼라, 숄칼라, 폴로칼라, 피터팬칼라, 너치드칼라, 차이나칼라, 테일러칼라, 밴드칼라"
    ),
    "스타일": _STYLES,
    "서브스타일": _STYLES,
}
_SPELLINGS = {
    "노말": "노멀",
    "홀터넥": "홀토넥",
    "원숄더": "원 숄더",
    "테일러드칼라": "테일러칼라",
    "키치/키덜트": "키치",
    "헤어니트": "헤어 니트",
    "시퀸": "시퀸/글리터",
}

_CORNER = re.compile("[XY]좌표[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Garment:
    """One garment of a photo.

    Args:
        garment_type: 아우터, 하의, 원피스 or 상의.
        index: counts the entries of one type, from 0.
        attributes: as labelled, in file order, without empty values; {} when nothing is labelled.
        box: None when there is none, or when `box_fault` says why it could not be read.
        outline: at least three points; None when there is none, or when `outline_fault` says why it could not be read.
    """

    garment_type: str
    index: int
    attributes: Attributes
    box: Box | None = None
    box_fault: str = ""
    outline: Outline | None = None
    outline_fault: str = ""

    @property
    def name(self) -> str:
        return f"{self.garment_type} {self.index}"


@dataclass(frozen=True)
class Label:
    """One label file. `width`, `height` in pixels; `notes`: content of the file that was not understood."""

    photo: str
    image_file_name: str
    width: int | None
    height: int | None
    styles: tuple[Attributes, ...]
    garments: tuple[Garment, ...]
    notes: tuple[str, ...] = ()


def read_label(path: Path) -> Label:
    """Reads one label file, UTF-8 with or without a byte order mark.

    Raises:
        LabelFault: (an InputError) empty file, not UTF-8, not JSON, or without 데이터셋 상세설명 / 라벨링.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LabelFault("unreadable_label", path, f"cannot be read: {error.strerror}") from error
    if not content.strip():
        raise LabelFault("empty_file", path, "the file is empty")
    try:
        # In normal form: archives repacked on macOS carry decomposed Hangul, whose keys would not be found.
        tree = read_clean_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LabelFault("wrong_encoding", path, f"is not UTF-8: convert it ({CONVERT})") from error
    except TextFault as fault:
        raise LabelFault(fault.defect, path, f"{fault.value} {fault.remedy}") from fault
    except ValueError as error:
        raise LabelFault("broken_json", path, f"is not JSON: {error}") from error
    return parse_label(tree, path)


def parse_label(tree: Any, path: Path) -> Label:
    """The label in a decoded JSON tree; `path` names it in faults and stands in for a missing 이미지 식별자."""
    detail = _section(_section(tree, "데이터셋 정보", path), "데이터셋 상세설명", path)
    labelling = _section(detail, "라벨링", path)
    notes: list[str] = []
    about = tree.get("이미지 정보", {})
    if not isinstance(about, dict):
        notes.append("이미지 정보 is not an object")
        about = {}
    boxes, polygons = (_positions(detail, name, notes) for name in ("렉트좌표", "폴리곤좌표"))
    notes += [f"라벨링 has an unknown part {name!r}" for name in labelling if name not in (STYLE, *GARMENT_TYPES)]
    styles = (_attributes(entry, STYLE, notes) for entry in _entries(labelling, STYLE, notes))
    garments: list[Garment] = []
    for garment_type in GARMENT_TYPES:
        parts = (_entries(section, garment_type, notes) for section in (labelling, boxes, polygons))
        for index, (entry, rectangle, polygon) in enumerate(itertools.zip_longest(*parts, fillvalue={})):
            attributes = _attributes(entry, f"{garment_type} {index}", notes)
            garment = Garment(garment_type, index, attributes, *_box(rectangle), *_outline(polygon))
            if garment != Garment(garment_type, index, {}):
                garments.append(garment)
    return Label(
        photo=_identifier(about.get("이미지 식별자"), path),
        image_file_name=str(about.get("이미지 파일명") or ""),
        width=_pixels(about, "이미지 너비", notes),
        height=_pixels(about, "이미지 높이", notes),
        styles=tuple(style for style in styles if style),
        garments=tuple(garments),
        notes=tuple(notes),
    )


def normalise(value: str) -> str:
    """The spelling under which the vocabulary knows a value (노말 -> 노멀); for lookups only."""
    value = " ".join(value.split())
    return _SPELLINGS.get(value, value)


def vocabulary(part: str, attribute: str) -> frozenset[str] | None:
    """Known values of an attribute of a garment type (or of STYLE); None for an attribute that is not known."""
    return VOCABULARY.get((part, attribute), VOCABULARY.get(attribute))


def unknown_values(label: Label) -> list[str]:
    """One line for every attribute or value outside the vocabulary: things to look at, not faults."""
    lines = []
    parts = [(STYLE, style) for style in label.styles] + [
        (item.garment_type, item.attributes) for item in label.garments
    ]
    for part, attributes in parts:
        for attribute, value in attributes.items():
            known = vocabulary(part, attribute)
            if known is None:
                lines.append(f"{part}: unknown attribute {attribute!r}")
                continue
            values = [value] if isinstance(value, str) else value
            lines += [f"{part} {attribute}: unknown value {v!r}" for v in values if normalise(v) not in known]
    return lines


# --------------------------------------------------------------------------------------------------- parsing parts


def _section(tree: Any, name: str, path: Path) -> dict[str, Any]:
    part = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(part, dict):
        raise LabelFault("wrong_structure", path, f"has no object {name!r}: it is no K-Fashion label")
    return part


def _positions(detail: dict[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    section = detail.get(name, {})
    if isinstance(section, dict):
        return section
    notes.append(f"{name} is not an object")
    return {}


def _entries(section: dict[str, Any], part: str, notes: list[str]) -> list[dict[str, Any]]:
    entries = section.get(part)
    if entries is None:
        return []
    if isinstance(entries, dict):
        notes.append(f"{part} is an object, not a list of objects: read as a list of one")
        return [entries]
    if not isinstance(entries, list):
        notes.append(f"{part} is not a list of objects: ignored")
        return []
    bad = sum(not isinstance(entry, dict) and entry is not None for entry in entries)
    if bad:
        notes.append(f"{part} has {bad} entries that are not objects: ignored")
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _attributes(entry: dict[str, Any], where: str, notes: list[str]) -> Attributes:
    attributes: dict[str, str | list[str]] = {}
    for name, value in entry.items():
        if isinstance(value, list):
            texts = [item.strip() for item in value if isinstance(item, str) and item.strip()]
            if any(not isinstance(item, str | None) for item in value):
                notes.append(f"{where} {name}: has values that are not texts")
            if texts:
                attributes[name] = texts
        elif isinstance(value, str):
            if value.strip():
                attributes[name] = value.strip()
        elif value is not None:
            notes.append(f"{where} {name}: {value!r} is not a text")
    return attributes


def _box(entry: dict[str, Any]) -> tuple[Box | None, str]:
    if not entry:
        return None, ""
    numbers, fault = _numbers(entry, ("X좌표", "Y좌표", "가로", "세로"))
    return (None, f"box: {fault}") if fault else (Box(*numbers), "")


def _outline(entry: dict[str, Any]) -> tuple[Outline | None, str]:
    """The points X좌표1, Y좌표1, X좌표2, … of one polygon, in the order of their numbers."""
    if not entry:
        return None, ""
    strange = next((name for name in entry if not _CORNER.fullmatch(name)), None)
    if strange is not None:
        return None, f"outline: {strange[:40]!r} is no coordinate"
    count = max(int(name[len("X좌표") :]) for name in entry)
    if count > len(entry):  # at least half of the numbers below are missing; do not list a million names
        return None, f"outline: has a point {count}, but only {len(entry)} coordinates"
    names = [f"{axis}좌표{number}" for number in range(1, count + 1) for axis in "XY"]
    numbers, fault = _numbers(entry, names)
    if fault:
        return None, f"outline: {fault}"
    points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    if len(set(points)) < 3:
        return None, f"outline: has {len(set(points))} different points, at least 3 enclose an area"
    return points, ""


def _numbers(entry: dict[str, Any], names: Iterable[str]) -> tuple[list[float], str]:
    """The positions under `names`, or what is wrong with the first bad one."""
    numbers = []
    for name in names:
        number = entry.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float):
            return [], f"{name} is {number!r:.40}, not a number" if name in entry else f"{name} is missing"
        if not abs(number) < 1e9:  # also false for NaN, which Python's JSON reader accepts
            return [], f"{name} is {number!r}, which is no position in an image"
        numbers.append(float(number))
    return numbers, ""


def _pixels(about: dict[str, Any], name: str, notes: list[str]) -> int | None:
    number = about.get(name)
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1e9:
        return int(number)
    if number is not None:
        notes.append(f"{name} is {number!r}, not a positive number")
    return None


def _identifier(value: Any, path: Path) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        return readable_name(path.stem)
    return str(value).strip()
