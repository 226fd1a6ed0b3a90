import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.kfashion import labels
from engine.data.kfashion.labels import (
    GARMENT_TYPES,
    parse_label,
    read_label,
    unknown_values,
)
from engine.data.label_format import Box, LabelFault
from engine.errors import InputError
from tests.label_trees import polygon

BOX = {"X좌표": 12.5, "Y좌표": 30.0, "가로": 100, "세로": 200}


def tree(identifier: Any = 1092253, boxes: dict[str, Any] | None = None, **labelling: Any) -> dict[str, Any]:
    absent: dict[str, Any] = {garment_type: [{}] for garment_type in GARMENT_TYPES}
    return {
        "이미지 정보": {
            "이미지 식별자": identifier,
            "이미지 높이": 1066,
            "이미지 파일명": "shop (3).jpg",
            "이미지 너비": 800,
        },
        "데이터셋 정보": {
            "파일 생성일자": "2020-11-04 10:20:30",
            "데이터셋 상세설명": {
                "렉트좌표": {**absent, **(boxes or {})},
                "폴리곤좌표": absent,
                "라벨링": {"스타일": [{}], **absent, **labelling},
            },
            "파일 번호": identifier,
            "파일 이름": "shop (3).jpg",
        },
    }


def write(path: Path, content: Any, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    return path


# ------------------------------------------------------------------------------------------------------- reading


def test_reads_a_whole_label(tmp_path: Path) -> None:
    top = {"색상": "화이트", "카테고리": "티셔츠", "프린트": ["무지", "레터링"]}
    content = tree(boxes={"상의": [BOX]}, 스타일=[{"스타일": "로맨틱", "서브스타일": "페미닌"}], 상의=[top])
    label = read_label(write(tmp_path / "1092253.json", content))
    assert (label.photo, label.image_file_name, label.width, label.height) == ("1092253", "shop (3).jpg", 800, 1066)
    assert label.styles == ({"스타일": "로맨틱", "서브스타일": "페미닌"},)
    (garment,) = label.garments
    assert (garment.garment_type, garment.index, garment.attributes) == ("상의", 0, top)
    assert list(garment.attributes) == list(top)  # file order
    assert garment.box == Box(12.5, 30.0, 100.0, 200.0)
    assert label.notes == ()


def test_absent_garments_and_styles_give_nothing() -> None:
    label = parse_label(tree(), Path("1.json"))
    assert label.garments == ()
    assert label.styles == ()


def test_published_incomplete_label() -> None:
    """Example 1092253: 하의 with a colour only, 상의 with colour and sleeves, no category, no style."""
    content = tree(
        boxes={"하의": [BOX], "상의": [BOX]}, 하의=[{"색상": "블랙"}], 상의=[{"색상": "핑크", "소매기장": "긴팔"}]
    )
    label = parse_label(content, Path("1092253.json"))
    assert [(g.garment_type, g.attributes) for g in label.garments] == [
        ("하의", {"색상": "블랙"}),
        ("상의", {"색상": "핑크", "소매기장": "긴팔"}),
    ]


def test_several_garments_and_several_of_one_type() -> None:
    content = tree(
        boxes={"상의": [BOX, {**BOX, "X좌표": 1}], "아우터": [BOX]},
        상의=[{"색상": "화이트"}, {"색상": "블랙"}],
        아우터=[{"색상": "카키"}],
    )
    found = [
        (g.garment_type, g.index, g.attributes["색상"], g.box and g.box.x)
        for g in parse_label(content, Path("1")).garments
    ]
    assert found == [("아우터", 0, "카키", 12.5), ("상의", 0, "화이트", 12.5), ("상의", 1, "블랙", 1.0)]


def test_box_without_labels_and_labels_without_box() -> None:
    content = tree(boxes={"상의": [BOX]}, 하의=[{"색상": "블랙"}])
    bottom, top = parse_label(content, Path("1")).garments
    assert (bottom.garment_type, bottom.box, bottom.box_fault) == ("하의", None, "")
    assert (top.garment_type, top.attributes) == ("상의", {})


def test_entry_without_label_keeps_its_index() -> None:
    content = tree(boxes={"상의": [{}, BOX]}, 상의=[{}, {"색상": "블랙"}])
    (garment,) = parse_label(content, Path("1")).garments
    assert garment.name == "상의 1"


@pytest.mark.parametrize(
    ("box", "word"),
    [
        ({"X좌표": 1, "Y좌표": 2, "가로": 3}, "세로 is missing"),
        ({**BOX, "가로": "100"}, "not a number"),
        ({**BOX, "가로": True}, "not a number"),
        ({**BOX, "X좌표": float("nan")}, "no position"),
        ({**BOX, "X좌표": 1e300}, "no position"),
    ],
)
def test_unreadable_boxes_say_why(box: dict[str, Any], word: str) -> None:
    (garment,) = parse_label(tree(boxes={"상의": [box]}, 상의=[{"색상": "블랙"}]), Path("1")).garments
    assert garment.box is None
    assert word in garment.box_fault


CORNERS = ((12.5, 30), (112, 31.5), (60, 230))


def test_outlines_are_read_in_the_order_of_their_numbers() -> None:
    written = dict(reversed(polygon(*CORNERS, *((1, n) for n in range(9))).items()))  # 10 to 12 come before 2 as text
    content = tree(상의=[{}, {"색상": "블랙"}, {"색상": "레드"}])
    content["데이터셋 정보"]["데이터셋 상세설명"]["폴리곤좌표"] = {"상의": [{}, written], "하의": [polygon(*CORNERS)]}
    bottom, black, red = parse_label(content, Path("1")).garments
    assert black.outline == (*CORNERS, *((1, n) for n in range(9)))
    assert (black.index, black.outline_fault) == (1, "")
    assert (red.outline, red.outline_fault) == (None, "")
    assert (bottom.outline, bottom.attributes, bottom.box) == (CORNERS, {}, None)


@pytest.mark.parametrize("polygons", [None, [{}], "x", {}, {"상의": [{}]}, {"상의": None}])
def test_labels_without_outlines_are_whole(polygons: Any) -> None:
    content = tree(boxes={"상의": [BOX]}, 상의=[{"색상": "블랙"}])
    content["데이터셋 정보"]["데이터셋 상세설명"]["폴리곤좌표"] = polygons
    label = parse_label(content, Path("1"))
    assert [(g.outline, g.outline_fault, g.box) for g in label.garments] == [(None, "", Box(12.5, 30.0, 100.0, 200.0))]
    assert label.notes == (() if isinstance(polygons, dict) else ("폴리곤좌표 is not an object",))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"Y좌표3": ...}, "Y좌표3 is missing"),
        ({"X좌표1": ...}, "X좌표1 is missing"),
        ({"X좌표2": ..., "Y좌표2": ...}, "X좌표2 is missing"),
        ({"X좌표999999": 1, "Y좌표999999": 1}, "point 999999, but only 10 coordinates"),
        ({f"{axis}좌표{n}": ... for axis in "XY" for n in (1, 2, 3)}, "point 4, but only 2 coordinates"),
        ({"X좌표3": ..., "Y좌표3": ..., "X좌표4": ..., "Y좌표4": ...}, "2 different points"),
        ({f"{axis}좌표{n}": 5 for axis in "XY" for n in (2, 3, 4)}, "2 different points"),
        ({"X좌표1": "10"}, "'10', not a number"),
        ({"X좌표1": None}, "None, not a number"),
        ({"X좌표1": True}, "True, not a number"),
        ({"X좌표1": [1]}, "not a number"),
        ({"Y좌표2": float("nan")}, "no position"),
        ({"Y좌표2": float("-inf")}, "no position"),
        ({"Y좌표2": 1e300}, "no position"),
        ({"Z좌표1": 1}, "'Z좌표1' is no coordinate"),
        ({"X좌표0": 1, "Y좌표0": 1}, "no coordinate"),
        ({"X좌표01": 1, "Y좌표01": 1}, "no coordinate"),
        ({"X좌표" + "9" * 5000: 1}, "no coordinate"),
        ({"X좌표": 1}, "no coordinate"),
    ],
)
def test_unreadable_outlines_say_why(change: dict[str, Any], word: str) -> None:
    """`...` leaves a coordinate out of an outline of four points."""
    entry = {name: value for name, value in (polygon(*CORNERS, (3, 4)) | change).items() if value is not ...}
    content = tree(boxes={"상의": [BOX]}, 상의=[{"색상": "블랙"}])
    content["데이터셋 정보"]["데이터셋 상세설명"]["폴리곤좌표"] = {"상의": [entry]}
    (garment,) = parse_label(content, Path("1")).garments
    assert garment.outline is None
    assert re.search(word, garment.outline_fault)
    assert len(garment.outline_fault) < 120
    assert garment.box is not None  # which is usable all the same


def test_empty_values_are_nothing_and_strange_ones_are_noted() -> None:
    entry = {"색상": " ", "카테고리": None, "소재": ["", None, " 면 "], "핏": 3, "디테일": [{"a": 1}]}
    content = tree(상의=[entry], 하의={"색상": "블랙"}, 신발=[{}])
    content["이미지 정보"]["이미지 너비"] = "wide"
    label = parse_label(content, Path("1"))
    assert [g.attributes for g in label.garments] == [{"색상": "블랙"}, {"소재": ["면"]}]
    assert label.width is None
    notes = "\n".join(label.notes)
    for word in ("핏", "디테일", "하의 is an object", "신발", "이미지 너비"):
        assert word in notes


@pytest.mark.parametrize(
    ("identifier", "photo"), [(7, "7"), ("A-7", "A-7"), (None, "stem"), (True, "stem"), ("", "stem")]
)
def test_photo_id_falls_back_to_the_file_name(identifier: Any, photo: str) -> None:
    assert parse_label(tree(identifier), Path("some/stem.json")).photo == photo


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_with_and_without_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    assert read_label(write(tmp_path / "1.json", tree(상의=[{"색상": "블랙"}]), encoding)).garments


def test_decomposed_hangul_is_read(tmp_path: Path) -> None:
    text = json.dumps(tree(상의=[{"색상": "블랙"}]), ensure_ascii=False)
    (tmp_path / "1.json").write_text(unicodedata.normalize("NFD", text), encoding="utf-8")
    assert read_label(tmp_path / "1.json").garments[0].attributes == {"색상": "블랙"}


@pytest.mark.parametrize(
    ("content", "defect"),
    [
        (b"", "empty_file"),
        (b" \n", "empty_file"),
        (json.dumps(tree(), ensure_ascii=False).encode("cp949"), "wrong_encoding"),
        ('{"a": "\ufffd"}'.encode(), "replacement_characters"),
        (b'{"a": ', "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"a": ' + b"7" * 5000 + b"}", "broken_json"),
        (b'{"a": "\\ud800"}', "bad_characters"),
        (b'{"a": "' + b"x" * 10_001 + b'\\u0041"}', "too_long"),
        (b"[]", "wrong_structure"),
        (b'{"a": 1}', "wrong_structure"),
        (json.dumps({"데이터셋 정보": {"데이터셋 상세설명": {}}}).encode(), "wrong_structure"),
    ],
)
def test_unreadable_files_are_named_with_their_defect(tmp_path: Path, content: bytes, defect: str) -> None:
    (tmp_path / "1.json").write_bytes(content)
    with pytest.raises(LabelFault) as caught:
        read_label(tmp_path / "1.json")
    assert caught.value.defect == defect
    assert isinstance(caught.value, InputError)
    assert "1.json" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LabelFault, match=r"none\.json"):
        read_label(tmp_path / "none.json")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["스타일", *GARMENT_TYPES, "색상", "소재", "X좌표", "Y좌표", "가로", "세로", "X좌표1", "Y좌표1"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(labelling=_JSON, boxes=_JSON, polygons=_JSON, about=_JSON)
def test_any_json_gives_a_label_or_an_input_error(labelling: Any, boxes: Any, polygons: Any, about: Any) -> None:
    content = tree()
    content["데이터셋 정보"]["데이터셋 상세설명"].update(
        {"라벨링": labelling, "렉트좌표": boxes, "폴리곤좌표": polygons}
    )
    content["이미지 정보"] = about
    try:
        label = parse_label(content, Path("1.json"))
    except LabelFault:
        return
    unknown_values(label)
    assert all(g.attributes or g.box or g.box_fault or g.outline or g.outline_fault for g in label.garments)


# ---------------------------------------------------------------------------------------------------- vocabulary


def test_table_sizes_are_the_published_ones() -> None:
    sizes = {name: len(values) for name, values in labels.VOCABULARY.items()}
    assert sizes["소재"] == 28
    assert sizes["색상"] == sizes["프린트"] == 21
    assert sizes["디테일"] == 40
    assert sizes["스타일"] == 23
    assert sizes["넥라인"] == 12
    assert sizes["옷깃"] == 10
    assert sizes["상의", "카테고리"] == sizes["아우터", "카테고리"] == 7


@pytest.mark.parametrize(
    ("garment_type", "attribute", "value"),
    [
        ("아우터", "기장", "노말"),
        ("상의", "넥라인", "홀터넥"),
        ("상의", "넥라인", "원숄더"),
        ("아우터", "옷깃", "테일러드칼라"),
    ],
)
def test_spelling_variants_are_known_but_kept(garment_type: str, attribute: str, value: str) -> None:
    label = parse_label(tree(None, None, **{garment_type: [{attribute: value}]}), Path("1"))
    assert unknown_values(label) == []
    assert label.garments[0].attributes[attribute] == value


def test_unknown_values_are_listed_and_nothing_fails() -> None:
    label = parse_label(tree(상의=[{"카테고리": "코트", "소재": ["면", "종이"], "무게": "1kg"}]), Path("1"))
    lines = "\n".join(unknown_values(label))
    assert "코트" in lines  # a coat is no 상의
    assert "종이" in lines
    assert "무게" in lines
    assert "면" not in lines
