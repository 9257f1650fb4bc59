"""Small pieces of the sentences that people read."""


def counted(number: int, one: str, many: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {one if number == 1 else many}"


def with_article(kind: str) -> str:
    """`number` -> `a number`; `text`, `numbers` and choices such as `adamw|sgd` as they are."""
    return {"number": "a number", "integer": "an integer", "HxW": "a size HxW"}.get(kind, kind)


def install_hint(extra: str) -> str:
    """How to install what an extra of pyproject.toml brings: from a clone, since mixlab is on no index."""
    return f"in mixlab's folder: pip install '.[{extra}]'"
