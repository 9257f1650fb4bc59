"""The page of `mixlab serve` in a real browser: Debian's chromium, driven by Playwright; axe-core judges it.

Skipped where they are missing: `pip install playwright axe-playwright-python`, `apt install chromium`.
MIXLAB_SCREENSHOTS=DIR keeps images of what was seen.
"""

import contextlib
import csv
import importlib.util
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.models.catalog import create_model, settings_of
from mixlab.serving.predict import load
from tests.serving.test_server import TOKEN, ask, picture, run, serving  # noqa: F401  run is a fixture

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def page_at(browser, address, expected=(), **options):
    """A page that complains of everything: errors, and requests to anywhere else."""
    context = browser.new_context(accept_downloads=True, **options)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "blob:")) else problems.append(request.url),
    )
    page.goto(address)
    yield page
    context.close()
    assert [problem for problem in problems if not any(text in problem for text in expected)] == []


def keep(page, name):
    if "MIXLAB_SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["MIXLAB_SCREENSHOTS"]) / f"{name}.png", full_page=True)


# Words of cells that stand on two lines. A name may break after a hyphen, as in a book.
BROKEN_WORDS = """() => [...document.querySelectorAll("th, td")].flatMap(cell => {
  const found = [], walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    for (const word of node.data.matchAll(/[^\\s-]+/g)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].filter(box => box.width).map(box => Math.round(box.top)));
      if (lines.size > 1) found.push(word[0]);
    }
  }
  return found;
})"""
LOOKS = [
    {"locale": "en-US", "color_scheme": "light", "viewport": {"width": 1280, "height": 800}},
    {"locale": "en-US", "color_scheme": "dark", "viewport": {"width": 390, "height": 800}},
    {"locale": "ko-KR", "color_scheme": "light", "viewport": {"width": 390, "height": 800}},
    {"locale": "ko-KR", "color_scheme": "dark", "viewport": {"width": 1280, "height": 800}},
]


def look_over(page, name):
    """What is wrong with the page as it stands, for any reader."""
    keep(page, name)
    assert page.evaluate(BROKEN_WORDS) == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    axe = importlib.util.find_spec("axe_playwright_python")
    if axe is None:
        pytest.skip("there is no axe-playwright-python")
    page.evaluate((Path(axe.origin).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run()")
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A model that says the same of every image, of eight classes."""
    model = create_model("mixer_pico4", num_classes=8, image_size=24)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    folder = tmp_path_factory.mktemp("plain")
    weights = Weights(
        model=model,
        model_settings=settings_of(model.config),
        preprocess=ImagePreprocess(image_size=(24, 24)),
        class_names=tuple(f"kind-{number}" for number in range(8)),
        provenance={},
    )
    save_weights(folder, weights)
    return folder


@pytest.fixture
def files(tmp_path):
    paths = []
    for seed in range(3):
        path = tmp_path / f"image {seed}.png"
        path.write_bytes(picture(seed, size=(60 + 40 * seed, 50)))
        paths.append(str(path))
    return paths


def test_pictures_get_bars_a_map_a_table_and_a_csv(browser, run, files, tmp_path):  # noqa: F811
    with serving(run) as (port, _):
        address = f"http://127.0.0.1:{port}"
        with page_at(browser, address, locale="en-US") as page:
            page.wait_for_selector("#facts:not(:empty)")
            assert "5 classes" in page.inner_text("#first-classes")
            page.set_input_files("#files", files)
            page.wait_for_selector("#rows tr:nth-child(3)")
            page.wait_for_selector("#status:has-text('3 images done')")
            expected = load(run).predict(files)
            first = expected[0]["predictions"]
            assert page.locator("#bars .label").all_inner_texts() == [guess["label"] for guess in first]
            shown = [f"{100 * guess['probability']:.1f}%" for guess in first]
            assert page.locator("#bars .value").all_inner_texts() == shown
            page.click("#explain")
            page.wait_for_selector("#map-text:not(:empty)")
            assert first[0]["label"] in page.inner_text("#map-text")
            keep(page, "serve-light")
            page.click("th button[data-key=probability]")
            shown = page.locator("#rows td:nth-child(3)").all_inner_texts()
            values = [float(text.removesuffix("%")) for text in shown]
            assert values == sorted(values)
            page.click("th button[data-key=probability]")
            assert page.get_attribute("#many th:nth-child(3)", "aria-sort") == "descending"
            with page.expect_download() as download:
                page.click("#csv")
            download.value.save_as(tmp_path / "out.csv")
            with (tmp_path / "out.csv").open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == 15
            assert rows[0]["label"] == first[0]["label"]
            page.focus("#rows tr:nth-child(2) button")
            page.keyboard.press("Enter")
            assert page.inner_text("#one-title") != ""
            page.click("#clear")
            assert page.is_hidden("#many")


def test_it_speaks_korean_in_the_dark_on_a_telephone(browser, run, files):  # noqa: F811
    with serving(run) as (port, _):
        options = {"locale": "ko-KR", "color_scheme": "dark", "viewport": {"width": 360, "height": 700}}
        with page_at(browser, f"http://127.0.0.1:{port}", **options) as page:
            page.wait_for_selector("#facts:not(:empty)")
            assert page.get_attribute("html", "lang") == "ko"
            assert re.search("[가-힣]", page.inner_text("#drop"))
            page.set_input_files("#files", files)
            page.wait_for_selector("#rows tr:nth-child(3)")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            keep(page, "serve-dark-korean-telephone")
            page.select_option("#language", "en")
            assert "Drop images" in page.inner_text("#drop")


def test_a_file_that_is_no_picture_is_named(browser, run, tmp_path):  # noqa: F811
    (tmp_path / "broken.png").write_bytes(b"no image")
    with serving(run) as (port, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        page.set_input_files("#files", [str(tmp_path / "broken.png")])
        page.wait_for_selector("#status:has-text('broken.png')")
        assert page.get_attribute("#status", "class") == "bad"
        context.close()


def test_the_page_asks_for_a_token(browser, run, files):  # noqa: F811
    with serving(run, token=TOKEN) as (port, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_selector("#token-form:not([hidden])")
        page.fill("#token", TOKEN)
        page.press("#token", "Enter")
        page.wait_for_selector("#facts:not(:empty)")
        assert page.is_hidden("#token-form")
        page.set_input_files("#files", files[:1])
        page.wait_for_selector("#bars li")
        context.close()


def test_rows_come_one_by_one_and_classes_are_counted(browser, run, files):  # noqa: F811
    with serving(run) as (port, _), page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page:
        page.wait_for_selector("#facts:not(:empty)")
        held, last = [], Path(files[2]).read_bytes()

        def hold_the_last(route):
            held.append(route) if route.request.post_data_buffer == last else route.continue_()

        page.route("**/predict*", hold_the_last)
        page.set_input_files("#files", files)
        page.wait_for_selector("#status:has-text('2 of 3 done')")
        labels = page.locator("#rows td:nth-child(2)")
        assert [text == "..." for text in labels.all_inner_texts()] == [False, False, True]
        assert page.locator("#bars li").count() == 5  # the first of them is shown already
        held[0].continue_()
        page.wait_for_selector("#status:has-text('3 images done')")
        counts = Counter(row["predictions"][0]["label"] for row in load(run).predict(files))
        assert Counter(labels.all_inner_texts()) == counts
        shown = page.locator("#counts li").all_inner_texts()
        assert sorted(shown) == sorted(f"{label}: {number}" for label, number in counts.items())


def test_classes_are_shown_and_all_of_them_on_a_click(browser, plain_run, files):
    with (
        serving(plain_run) as (port, _),
        page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page,
    ):
        page.wait_for_selector("#facts:not(:empty)")
        assert (
            page.inner_text("#first-classes")
            == "8 classes: kind-0, kind-1, kind-2, kind-3, kind-4 and 3 more"
        )
        assert page.is_hidden("#all-classes")
        page.focus("#first-classes")
        page.keyboard.press("Enter")
        assert page.locator("#all-classes li").all_inner_texts() == [f"kind-{number}" for number in range(8)]


# The least fall of each color: what the page promises for every image.
SCALE = {
    0.5: "d7191c",
    0.2: "fd8d3c",
    0.05: "fecc5c",
    0.01: "ffffb2",
    -0.01: None,
    -0.05: "a6cee3",
    -2: "2c7fb8",
}


READ_MAP = """() => {
  const map = document.querySelector("#map");
  return [...map.getContext("2d").getImageData(0, 0, map.width, map.height).data];
}"""


def test_the_map_has_the_same_scale_for_every_image(browser, tmp_path):
    seen = set()
    with serving("mixer_cifar:cifar10") as (port, _), page_at(browser, f"http://127.0.0.1:{port}") as page:
        page.wait_for_selector("#facts:not(:empty)")
        for seed in (2, 6):
            pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
            file = tmp_path / f"blobs-{seed}.png"
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(file)
            page.set_input_files("#files", file)
            page.wait_for_selector(f"#one-title:has-text('{file.name}')")
            page.click("#explain")
            page.wait_for_selector("#map-legend:not([hidden])")
            drop = ask(port, "/occlusion", file.read_bytes())[2]["drop"]
            flat = [value for row in drop for value in row]
            expected = [
                next(color for least, color in SCALE.items() if value > least - 1e-9) for value in flat
            ]
            data = page.evaluate(READ_MAP)
            for cell, color in enumerate(expected):
                *rgb, alpha = data[4 * cell : 4 * cell + 4]
                assert (alpha == 0) == (color is None)
                if color is not None:
                    assert rgb == pytest.approx([int(color[i : i + 2], 16) for i in (0, 2, 4)], abs=2)
            seen |= set(expected)
            legend = page.inner_text("#scale")
            assert all(text in legend for text in ("1–5", "5–20", "20–50", "50–100", "lowers", "raises"))
            assert f"{100 * max(flat):.1f} points" in page.inner_text("#map-text")
            page.click("#map-legend summary")
            numbers = page.locator("#map-numbers td").all_inner_texts()
            assert [float(text) for text in numbers] == pytest.approx([100 * v for v in flat], abs=0.0501)
            page.click("#map-legend summary")
    assert len(seen) >= 6  # of the seven of SCALE


def test_where_no_part_matters_the_page_says_so(browser, plain_run, files):
    with (
        serving(plain_run) as (port, _),
        page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page,
    ):
        page.set_input_files("#files", files[0])
        page.click("#explain")
        page.wait_for_selector("#map-text:has-text('No single part matters')")
        assert set(page.evaluate(READ_MAP)) == {0}
        page.click("#explain")
        page.wait_for_selector("#map-legend", state="hidden")


def test_every_file_that_is_not_used_is_named_with_the_reason(browser, run, files, tmp_path):  # noqa: F811
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "clip.mp4").write_bytes(b"film")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "large.png").write_bytes(b"x" * 412_345)  # LIMITS.body_bytes is 300,000
    bad = ["notes.txt", "clip.mp4", "broken.png", "large.png"]
    with serving(run) as (port, _):
        options = {"locale": "en-US", "expected": ["415 (Unsupported"]}
        with page_at(browser, f"http://127.0.0.1:{port}", **options) as page:
            page.wait_for_selector("#limit:has-text('Up to 300 kB each.')")
            page.set_input_files("#files", [files[0], *(str(tmp_path / name) for name in bad)])
            page.wait_for_selector("#status:has-text('1 done, 4 not. notes.txt: not an image (text/plain)')")
            rows = {
                row.locator("td:nth-child(4)").inner_text(): row.locator("td:nth-child(2)").inner_text()
                for row in page.locator("#rows tr").all()
            }
            assert set(rows) == {Path(files[0]).name, *bad}
            assert rows["clip.mp4"] == "not an image (video/mp4)"
            assert rows["large.png"] == "too large: 412 kB, this server takes up to 300 kB"
            assert "not an image" in rows["broken.png"]
            assert page.inner_text("#counts .bad") == "could not be used: 4"
            with page.expect_download() as download:
                page.click("#csv")
            download.value.save_as(tmp_path / "out.csv")
            with (tmp_path / "out.csv").open(newline="", encoding="utf-8-sig") as file:
                errors = {row["path"]: row["error"] for row in csv.DictReader(file) if row["error"]}
            assert errors == {name: rows[name] for name in bad}
        status, _, answer = ask(port, "/predict", b"x" * 412_345)
        assert (status, answer["error"]["message"]) == (413, "the body is too large: at most 0.3 MB")


def test_more_images_than_the_page_takes_are_named_too(browser, run):  # noqa: F811
    content = picture(size=(8, 8))
    files = [{"name": f"{number}.png", "mimeType": "image/png", "buffer": content} for number in range(1003)]
    answer = {"predictions": [{"label": "a", "probability": 1.0}]}
    with serving(run) as (port, _), page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page:
        page.wait_for_selector("#facts:not(:empty)")
        page.route("**/predict*", lambda route: route.fulfill(json=answer))
        page.set_input_files("#files", files)
        said = "1000 done, 3 not. 1000.png: left out: the page takes 1,000 images"
        page.wait_for_selector(f"#status:has-text('{said}')", timeout=120_000)
        assert page.locator("#rows td.bad").count() == 3


def test_a_dropped_folder_gives_its_images(browser, run, files):  # noqa: F811
    folder = str(Path(files[0]).parent)
    with serving(run) as (port, _), page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page:
        page.wait_for_selector("#facts:not(:empty)")
        devtools = page.context.new_cdp_session(page)
        data = {"items": [], "files": [folder], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 300, "y": 200, "data": data}
            devtools.send("Input.dispatchDragEvent", event)
        page.wait_for_selector("#status:has-text('3 images done')")
        names = page.locator("#rows td:nth-child(4)").all_inner_texts()
        assert sorted(names) == [f"{Path(folder).name}/image {number}.png" for number in range(3)]


def test_the_camera_takes_a_photo_or_says_why_not(browser, run):  # noqa: F811
    flags = ["--no-sandbox", "--host-resolver-rules=MAP plain.example 127.0.0.1"]
    fake = "--use-fake-device-for-media-stream"
    hosts = ("127.0.0.1", "plain.example")
    cases = [
        ([], "127.0.0.1", [], "No camera was found."),
        ([fake], "127.0.0.1", [], "The camera was refused."),
        ([], "plain.example", [], "only over https or at localhost"),
        ([fake], "127.0.0.1", ["camera"], None),
    ]
    with serving(run, hosts=hosts) as (port, _):
        for more, host, allowed, message in cases:
            other = browser.browser_type.launch(executable_path=CHROMIUM, args=[*flags, *more])
            with page_at(other, f"http://{host}:{port}", locale="en-US", permissions=allowed) as page:
                page.wait_for_selector("#facts:not(:empty)")
                page.click("#camera")
                if message is None:
                    page.wait_for_selector("#camera:has-text('Stop the camera')")
                    page.click("#shoot")
                    page.wait_for_selector("#one-title:has-text('camera.jpg')")
                    assert page.is_hidden("#video")
                else:
                    page.wait_for_selector(f"#status.bad:has-text('{message}')")
            other.close()


def test_the_language_of_the_server_goes_before_that_of_the_browser(browser, run):  # noqa: F811
    with serving(run, language="ko") as (port, _), page_at(browser, f"http://127.0.0.1:{port}") as page:
        page.wait_for_selector("#facts:not(:empty)")
        assert page.get_attribute("html", "lang") == "ko"
        for script in ("page_texts", "ui_texts", "sound_texts"):
            texts = page.evaluate(
                f"import('/{script}.js').then(module => Object.values(module)[0]).then(texts => ['en', 'ko'].map("
                "name => [Object.keys(texts[name]), Object.values(texts[name]).map(String).join(' ')]))"
            )
            (english, _), (korean, words) = texts
            assert sorted(english) == sorted(korean)
            assert not re.search("사진|분류|실행|[0-9}] %", words)


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: f"{look['locale'][:2]}-{look['viewport']['width']}")
def test_the_page_is_for_every_reader_on_every_screen(browser, run, files, tmp_path, look):  # noqa: F811
    long = tmp_path / "a name that somebody gave it 2024-01-01 12.34.56_of_one_very_long_word.png"
    long.write_bytes(picture(5))
    (tmp_path / "broken.png").write_bytes(b"no image")
    name = f"serve-{look['locale'][:2]}-{look['viewport']['width']}"
    with serving(run) as (port, _):
        address = f"http://127.0.0.1:{port}"
        with page_at(browser, address, expected=["415 (Unsupported"], **look) as page:
            page.wait_for_selector("#facts:not(:empty)")
            look_over(page, f"{name}-empty")
            page.set_input_files("#files", files[0])
            page.click("#explain")
            page.wait_for_selector("#map-legend:not([hidden])")
            page.click("#map-legend summary")
            page.click("#first-classes")
            look_over(page, f"{name}-one")
            page.set_input_files("#files", [*files, str(long), str(tmp_path / "broken.png")])
            page.wait_for_selector("#status.bad")
            look_over(page, f"{name}-many")
            page.goto(f"{address}/docs")
            look_over(page, f"{name}-docs")


def test_the_keyboard_reaches_all_that_a_mouse_does(browser, run, files):  # noqa: F811
    with serving(run) as (port, _), page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page:
        page.set_input_files("#files", files)
        page.wait_for_selector("#status:has-text('3 images done')")
        page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.dataset.key"))
        assert {
            "language",
            "files",
            "camera",
            "explain",
            "csv",
            "clear",
            "label",
            "probability",
            "name",
        } <= reached
