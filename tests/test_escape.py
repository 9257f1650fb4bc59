"""Text from outside where it is shown: nothing hidden, nothing run, nothing of this machine."""

import pytest

from mixlab.escape import for_csv, for_markdown, from_csv, lines, visible, visible_values, without_places


def test_what_is_not_seen_or_moves_others_is_shown_as_an_escape():
    assert visible("a\x1b[31mb\u202ec\nd\udcff\u2028\ue000") == r"a\x1b[31mb\u202ec\nd\udcff\u2028\ue000"
    assert lines("a\nb\x07") == "a\nb\\x07"
    assert visible_values({"a\x1b": ["\u202e", 1, None]}) == {r"a\x1b": [r"\u202e", 1, None]}


@pytest.mark.parametrize("name", ["Apfel", "사과", "تفاحة", "นก", "👨‍👩‍👧", "naïve café", "می‌خواهم"])
def test_names_of_any_language_stay_as_they_are(name):
    assert visible(name) == name


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\ta", "'a", "''", "'=a", "a", "", "a=1", "\nx"])
def test_a_cell_is_no_formula_and_comes_back(text):
    assert not for_csv(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert from_csv(for_csv(text)) == text


def test_markdown_shows_what_is_there():
    shown = for_markdown("<img src=x onerror=1> `a` [b](c) **d** | #\n- e")
    assert shown == r"\<img src=x onerror=1\> \`a\` \[b\](c) \*\*d\*\* \| \#\\n- e"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/my data/set", "set"),
        ("~/runs/a", "a"),
        ("C:\\Users\\me\\x", "x"),
        ("wds:/data/shards", "wds:shards"),
        ("file:///home/me/x.npz", "x.npz"),
        ("full (/home/me/runs/x/metrics.jsonl:3); do it", "full (metrics.jsonl:3); do it"),
        ("images/s, 1/2 and runs/a", "images/s, 1/2 and runs/a"),
        ("https://storage.googleapis.com/a/b.npz", "https://storage.googleapis.com/a/b.npz"),
        ("digits", "digits"),
    ],
)  # fmt: skip
def test_of_a_path_the_last_part_stays(text, expected):
    assert without_places({"a": [text, 1]}) == {"a": [expected, 1]}
