"""Measuring in turns."""

from mixlab.studies.turns import alternate


def test_works_take_turns_and_the_first_turn_does_not_count():
    order = []
    times = alternate([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert order == ["a", "b"] * 4
    assert [len(found) for found in times] == [3, 3]
