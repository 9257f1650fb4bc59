"""How a key of a recipe is declared: its default, one sentence for people, and who needs it."""

from dataclasses import field
from typing import Any, Literal

Level = Literal["common", "more", "expert"]


def setting(default: Any, sentence: str, level: Level = "more") -> Any:
    """A field of a configuration's dataclass. sentence: what it does, as help and docs show it."""
    return field(default=default, metadata={"sentence": sentence, "level": level})
