"""How a key of a recipe is declared: its default, one sentence for people, and who needs it."""

from dataclasses import field
from typing import Any, Literal

Level = Literal["common", "more", "expert"]


def setting(default: Any, sentence: str, level: Level = "more", *, is_weights: bool = False) -> Any:
    """A field of a configuration's dataclass. sentence: what it does, as help and docs show it.

    is_weights: it names weights, by a path or a published name.
    """
    return field(default=default, metadata={"sentence": sentence, "level": level, "is_weights": is_weights})
