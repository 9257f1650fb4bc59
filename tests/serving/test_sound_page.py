"""The page of `mixlab serve` with a model of sounds, in a real browser; see test_page.py."""

import shutil

import numpy as np
import pytest

from mixlab.data.audio.decode import as_wav
from mixlab.data.audio.tones import tone
from mixlab.serving.predict import load
from tests.serving.test_page import LOOKS, READ_MAP, browser, look_over, page_at  # noqa: F401  browser is a fixture
from tests.serving.test_server import ask, picture, serving
from tests.serving.test_sound_server import RATE, sound_run, written  # noqa: F401  sound_run is a fixture

pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]
IS_LOADED = "() => document.querySelector('#player').readyState > 0"


@pytest.fixture
def clips(tmp_path):
    paths = []
    for row in range(3):
        path = tmp_path / f"clip {row}.wav"
        path.write_bytes(as_wav(tone(row, RATE), RATE))
        paths.append(str(path))
    return paths


def test_a_sound_gets_bars_its_picture_a_player_and_the_moments_that_matter(browser, sound_run, clips):  # noqa: F811
    with (
        serving(sound_run) as (port, _),
        page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page,
    ):
        page.wait_for_selector("#drop:has-text('Drop sounds')")
        assert page.is_hidden("#camera")
        assert "0.34 s at a time, of a sound at most 1.00 s" in page.inner_text("#facts")
        page.set_input_files("#files", clips)
        page.wait_for_selector("#status:has-text('3 sounds done')")
        first = load(sound_run).predict(clips)[0]["predictions"]
        assert page.locator("#bars .label").all_inner_texts() == [guess["label"] for guess in first]
        page.wait_for_function(IS_LOADED)
        seconds = page.evaluate("document.querySelector('#player').duration")
        assert seconds == pytest.approx(len(tone(0, RATE)) / RATE, abs=0.01)
        with open(clips[0], "rb") as file:
            content = file.read()
        view, map_ = ask(port, "/view", content)[2], ask(port, "/occlusion", content)[2]
        size = page.evaluate("[document.images[0].naturalWidth, document.images[0].naturalHeight]")
        assert size == [view["width"], view["height"]]
        page.click("#explain")
        page.wait_for_selector("#map-legend:not([hidden])")
        (drop,) = map_["drop"]
        best = int(np.argmax(drop))
        if drop[best] >= 0.01:
            start, end = (f"{part * map_['seconds'] / 16:.2f}" for part in (best, best + 1))
            assert f"from {start} to {end} s" in page.inner_text("#map-text")
        pixels = np.reshape(page.evaluate(READ_MAP), (1, 16, 4))
        assert [bool(alpha) for alpha in pixels[0, :, 3]] == [abs(value) >= 0.01 for value in drop]


def test_where_no_moment_matters_the_page_says_so(browser, sound_run, clips):  # noqa: F811
    answer = {"label": "a", "probability": 1.0, "drop": [[0.001] * 16], "seconds": 0.34}
    with (
        serving(sound_run) as (port, _),
        page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page,
    ):
        page.route("**/occlusion", lambda route: route.fulfill(json=answer))
        page.set_input_files("#files", clips[0])
        page.click("#explain")
        page.wait_for_selector("#map-text:has-text('No single part matters')")
        assert set(page.evaluate(READ_MAP)) == {0}


def test_what_a_browser_cannot_play_or_the_server_cannot_read_is_said(browser, sound_run, tmp_path):  # noqa: F811
    (tmp_path / "clip.aiff").write_bytes(written(tone(1, RATE), RATE, format="AIFF"))
    (tmp_path / "photo.png").write_bytes(picture())
    (tmp_path / "cut.wav").write_bytes(as_wav(tone(1, RATE), RATE)[:500])
    options = {"locale": "en-US", "expected": ["415 (Unsupported"]}
    with serving(sound_run) as (port, _), page_at(browser, f"http://127.0.0.1:{port}", **options) as page:
        page.set_input_files("#files", str(tmp_path / "clip.aiff"))
        page.wait_for_selector("#player-text:has-text('cannot play')")
        assert page.is_hidden("#player")
        assert page.locator("#bars li").count() == 5
        page.set_input_files("#files", [str(tmp_path / "photo.png"), str(tmp_path / "cut.wav")])
        page.wait_for_selector("#status:has-text('photo.png: not a sound (image/png)')")
        assert "cut off: 500 bytes" in page.inner_text("#rows")


def test_the_microphone_records_or_says_why_not(browser, sound_run):  # noqa: F811
    flags = ["--no-sandbox", "--host-resolver-rules=MAP plain.example 127.0.0.1"]
    fake = "--use-fake-device-for-media-stream"
    cases = [
        ([], "127.0.0.1", [], "No microphone was found."),
        ([fake], "127.0.0.1", [], "The microphone was refused."),
        ([], "plain.example", [], "only over https or at localhost"),
        ([fake], "127.0.0.1", ["microphone"], None),
    ]
    with serving(sound_run, hosts=("127.0.0.1", "plain.example")) as (port, _):
        for more, host, allowed, message in cases:
            other = browser.browser_type.launch(executable_path=CHROMIUM, args=[*flags, *more])
            with page_at(other, f"http://{host}:{port}", locale="en-US", permissions=allowed) as page:
                page.click("#record")
                if message is None:  # it ends by itself after the second that is heard
                    page.wait_for_selector("#record:has-text('Stop recording')")
                    page.wait_for_selector("#one-title:has-text('recording.wav')")
                    page.wait_for_function(IS_LOADED)
                    seconds = page.evaluate("document.querySelector('#player').duration")
                    assert seconds == pytest.approx(1.0, abs=0.01)
                    assert page.inner_text("#record") == "Record"
                else:
                    page.wait_for_selector(f"#status.bad:has-text('{message}')")
            other.close()


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: f"{look['locale'][:2]}-{look['viewport']['width']}")
def test_the_page_of_sounds_is_for_every_reader_on_every_screen(browser, sound_run, clips, look):  # noqa: F811
    name = f"sounds-{look['locale'][:2]}-{look['viewport']['width']}"
    with serving(sound_run) as (port, _), page_at(browser, f"http://127.0.0.1:{port}", **look) as page:
        page.wait_for_selector("#drop:not([hidden])")
        page.set_input_files("#files", clips)
        page.click("#explain")
        page.wait_for_selector("#map-legend:not([hidden])")
        page.click("#map-legend summary")
        look_over(page, name)
