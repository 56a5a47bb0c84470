"""Which script a text is mostly written in; where one script means one language, that language."""

from __future__ import annotations

import numpy as np

__all__ = ["main_script"]

# First code point, last, name. Letters outside of these are "other".
_RANGES = (
    (0x41, 0x5A, "Latin"),
    (0x61, 0x7A, "Latin"),
    (0xC0, 0x24F, "Latin"),
    (0x370, 0x3FF, "Greek"),
    (0x400, 0x52F, "Cyrillic"),
    (0x530, 0x58F, "Armenian"),
    (0x590, 0x5FF, "Hebrew"),
    (0x600, 0x77F, "Arabic"),
    (0x900, 0x97F, "Devanagari"),
    (0x980, 0x9FF, "Bengali"),
    (0xB80, 0xBFF, "Tamil"),
    (0xC00, 0xC7F, "Telugu"),
    (0xE00, 0xE7F, "Thai"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Korean"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x3040, 0x30FF, "Japanese"),
    (0x3400, 0x4DBF, "Han"),
    (0x4E00, 0x9FFF, "Han"),
    (0xAC00, 0xD7AF, "Korean"),
)
_FIRST = np.array([first for first, _, _ in _RANGES])
_LAST = np.array([last for _, last, _ in _RANGES])
_NAMES = list(dict.fromkeys(name for _, _, name in _RANGES))
_NUMBER = np.array([_NAMES.index(name) for _, _, name in _RANGES])
# Kana in a text of Han characters make it Japanese, from this share on.
_KANA = 0.1


def main_script(text: str) -> str:
    """The script of most letters, "Chinese" for Han without kana, "none" without letters."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    at = np.searchsorted(_FIRST, points, "right") - 1
    at = at[(at >= 0) & (points <= _LAST[at])]
    if at.size == 0:
        return "other" if any(c.isalpha() for c in text) else "none"
    counts = np.bincount(_NUMBER[at], minlength=len(_NAMES))
    han, kana = counts[_NAMES.index("Han")], counts[_NAMES.index("Japanese")]
    if han and kana >= _KANA * (han + kana):
        counts[_NAMES.index("Japanese")], counts[_NAMES.index("Han")] = han + kana, 0
    name = _NAMES[int(counts.argmax())]
    return "Chinese" if name == "Han" else name
