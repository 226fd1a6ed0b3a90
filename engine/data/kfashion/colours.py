"""The sRGB colours of K-Fashion's colour names, the values of 색상 and 서브색상.

The 21 names are those of the reference lists; no source gives values. These are cloth as photographed, not the purest
shade of the name: indoors a black shirt is a dark grey, a white one a light grey, and denim counts as blue.
"""

COLOUR_ATTRIBUTE = "색상"

# name -> sRGB, 0 to 255
K_FASHION_COLOURS: dict[str, tuple[int, int, int]] = {
    "골드": (175, 140, 70),
    "그레이": (122, 122, 122),
    "그린": (40, 130, 70),
    "네온": (190, 255, 40),
    "네이비": (42, 48, 78),
    "라벤더": (160, 145, 185),
    "레드": (185, 40, 50),
    "민트": (150, 215, 195),
    "베이지": (196, 176, 148),
    "브라운": (92, 70, 58),
    "블랙": (38, 38, 40),
    "블루": (70, 105, 160),
    "스카이블루": (130, 165, 200),
    "실버": (172, 176, 184),
    "옐로우": (220, 185, 70),
    "오렌지": (225, 120, 50),
    "와인": (105, 30, 50),
    "카키": (108, 104, 82),
    "퍼플": (110, 60, 140),
    "핑크": (220, 130, 150),
    "화이트": (215, 214, 210),
}
