"""A decision of a plan replaced by a double."""

from collections.abc import Callable
from dataclasses import replace

from mixlab.planning import make_plan
from mixlab.planning.draft import Draft


def replace_decision(monkeypatch, name: str, double: Callable[[Draft], Draft]) -> None:
    """Let the decision called `name` be `double`."""
    decisions = tuple(double if one.__name__ == name else one for one in make_plan.DECISIONS)
    assert double in decisions
    monkeypatch.setattr(make_plan, "DECISIONS", decisions)


def steps_of(num_steps: int, *, deadline: float | None = None) -> Callable[[Draft], Draft]:
    """A double for `decide_steps`: so many, whatever the machine's speed."""

    def decide(draft: Draft) -> Draft:
        recipe = replace(draft.recipe, epochs=None)
        return replace(draft, recipe=recipe, deadline=deadline).with_steps(num_steps)

    return decide
