"""Which language a text is in, by py3langid (Lui and Baldwin, "langid.py", ACL 2012).

140 languages, offline.
"""

from __future__ import annotations

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

__all__ = ["UNDETERMINED", "main_language", "require_languages"]

UNDETERMINED = "und"
# A language less probable than this is none: a few words, numbers, code.
_LEAST_PROBABILITY = 0.5
_ENOUGH = 500  # characters


def main_language(text: str) -> str:
    """ISO 639 code of its first 500 characters, "en"; `UNDETERMINED` where none is likely."""
    text = text[:_ENOUGH]
    if not any(character.isalpha() for character in text):
        return UNDETERMINED
    # lone surrogates, which JSON can hold, are in no language
    language, probability = _identifier().classify(text.encode("utf-8", "replace").decode())
    return str(language) if probability >= _LEAST_PROBABILITY else UNDETERMINED


def require_languages(given: tuple[str, ...]) -> None:
    """Check codes that a user gave.

    Raises:
        ValueError: one that no text could be found to be in.
    """
    if isinstance(given, str):
        raise ValueError(f'languages is {given!r}; give a tuple of codes, such as ("{given}",)')
    known = _identifier().labels if given else []
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"languages has {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
