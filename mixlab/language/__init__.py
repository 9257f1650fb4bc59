"""Sentences in the language of the reader: the English text is the key, a table beside this file has its translation.

`tell("{n} files are left out", n=3)` is the sentence now; a `Sentence` is the same, kept until it is known for whom.
Both speak the language of the `speaking` that they are read in, English outside of any.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

from mixlab.language import korean_data, korean_report, korean_training

Language = Literal["en", "ko"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
KOREAN = korean_data.SENTENCES | korean_report.SENTENCES | korean_training.SENTENCES
WORDS = korean_data.WORDS | korean_report.WORDS  # what stands alone, or within sentences
_now: ContextVar[Language] = ContextVar("language", default="en")


class Sentence:
    """A sentence without its language. values: numbers and texts for its places; of `one`, `many` and other Sentences
    the translation stands there."""

    def __init__(self, english: str, /, **values: Any) -> None:
        self.english, self.values = english, values

    def __str__(self) -> str:
        if _now.get() == "en" or self.english not in KOREAN:
            return self.english.format(**self.values)
        values = {key: word(value) if key in ("one", "many") else value for key, value in self.values.items()}
        # Korean counts images in sheets, other things in pieces.
        values["unit"] = "장" if values.get("many", "이미지") == "이미지" else "개"
        return particles(KOREAN[self.english].format(**values))


def tell(english: str, /, **values: Any) -> str:
    """The sentence in the language of now. values: as for `Sentence`."""
    return str(Sentence(english, **values))


def word(english: str) -> str:
    """A word that comes from elsewhere, such as a modality's name; itself where it has no translation."""
    return WORDS.get(english, english) if _now.get() == "ko" else english


@contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Inside, sentences are in this language."""
    token = _now.set(language)
    try:
        yield
    finally:
        _now.reset(token)


def language() -> Language:
    """The language of now."""
    return _now.get()


def language_of(environment: Mapping[str, str] = os.environ) -> Language:
    """The language of the locale: Korean where LC_ALL, else LC_MESSAGES, else LANG begins with `ko`."""
    names = (environment.get(key) for key in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "ko" if next((name for name in names if name), "").startswith("ko") else "en"


_CHOICE = re.compile(r"(.)([”’\"'`)]*)(을\(를\)|이\(가\)|은\(는\)|과\(와\)|\(으\)로)")
_ENDS = dict(zip("0136", "ㅇㄹㅁㄱ", strict=True)) | {"7": "ㄹ", "8": "ㄹ"}  # of the Korean names of digits


def particles(text: str) -> str:
    """Korean with each 을(를), 이(가), 은(는), 과(와) and (으)로 as the sound before it asks.

    After Latin letters both forms stay.
    """

    def choose(found: re.Match[str]) -> str:
        last, closing, both = found.groups()
        if "가" <= last <= "힣":
            final = (ord(last) - ord("가")) % 28  # 0: none, 8: rieul, which takes 로 as a vowel does
            is_open, is_rieul = final == 0, final == 8
        elif last.isdecimal():
            is_open, is_rieul = last not in _ENDS, _ENDS.get(last) == "ㄹ"
        else:
            return found[0]
        if both == "(으)로":
            return last + closing + ("로" if is_open or is_rieul else "으로")
        return last + closing + (both[2] if is_open else both[0])

    return _CHOICE.sub(choose, text)
