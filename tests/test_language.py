"""Every sentence has its Korean, with the same places, and is spoken only where it is asked for."""

import ast
import re
from pathlib import Path
from string import Formatter

import pytest
from jinja2 import Environment, nodes

import mixlab
from mixlab.data.modality import MODALITIES
from mixlab.language import KOREAN, LANGUAGES, WORDS, Sentence, language_of, particles, speaking, tell, word

PACKAGE = Path(mixlab.__file__).parent


def sentences():
    """Every English text that the package gives to `tell` or `Sentence`, with where it stands."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("tell", "Sentence"):
                text = node.args[0]
                if path.parent.name == "language":
                    continue
                assert isinstance(text, ast.Constant), f"{path}:{node.lineno} gives no plain text"
                found[text.value] = f"{path}:{node.lineno}"
    for path in (PACKAGE / "report" / "templates").glob("*.html"):
        for call in Environment().parse(path.read_text()).find_all(nodes.Call):
            if getattr(call.node, "name", "") == "tell":
                found[call.args[0].as_const()] = str(path)
    return found


def places(text):
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def test_every_sentence_has_its_korean_and_none_is_left_over():
    assert len(sentences()) > 100
    assert sentences().keys() - KOREAN.keys() == set()
    assert KOREAN.keys() - sentences().keys() == set()


# The English has these, the Korean need not: which of two units it counts in, and a word that Korean puts otherwise.
FREE = {"millions", "ten_thousands", "many", "unit"}


@pytest.mark.parametrize("english", sorted(KOREAN))
def test_both_languages_have_the_same_places(english):
    korean = KOREAN[english]
    assert places(korean) - FREE == places(english) - FREE
    assert korean != english
    assert not re.search(r"[\d}] %", korean), "no space before %"


def test_what_modalities_are_called_has_its_korean():
    names = {text for name in MODALITIES for text in (MODALITIES[name].one, MODALITIES[name].many)}
    assert names - WORDS.keys() == set()


def test_a_sentence_is_spoken_when_it_is_read():
    kept = Sentence("{n:,} {many} are exact copies of others in the same split.", n=1200, many="images")
    english = str(kept)
    with speaking("ko"):
        assert re.search("이미지.*1,200장", str(kept))
        assert word("images") == "이미지"
        with speaking("en"):
            assert str(kept) == english
    assert str(kept) == english == "1,200 images are exact copies of others in the same split."


def test_what_has_no_korean_stays_as_it_is():
    with speaking("ko"):
        assert tell("{n} new words", n=3) == "3 new words"
        assert word("chickens") == "chickens"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("이미지을(를)", "이미지를"),
        ("3장을(를)", "3장을"),
        ("“고양이”이(가)", "“고양이”가"),
        ("클래스 3은(는)", "클래스 3은"),
        ("클래스 2은(는)", "클래스 2는"),
        ("cat과(와)", "cat과(와)"),
        ("“과일”(으)로", "“과일”로"),
        ("감(으)로", "감으로"),
        ("클래스 1(으)로", "클래스 1로"),
    ],
)
def test_particles_follow_the_sound_before_them(text, right):
    assert particles(text) == right


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "ko"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": ""}, "ko"),
    ],
)
def test_the_locale_says_the_language(environment, language):
    assert language_of(environment) == language
    assert language in LANGUAGES
