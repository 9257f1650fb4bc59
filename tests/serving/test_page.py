"""The page of `mixlab serve` and `mixlab ui` in a real browser: Debian's chromium, driven by Playwright.

Skipped where either is missing: `pip install playwright`, `apt install chromium`. MIXLAB_SCREENSHOTS=DIR keeps
pictures of what was seen.
"""

import concurrent.futures
import contextlib
import csv
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from PIL import Image

import mixlab
from mixlab.report.screen import Screen
from mixlab.serving.predict import load
from mixlab.training.run_folder import list_runs
from tests.serving.test_server import TOKEN, picture, run, serving  # noqa: F401  run is a fixture

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


@pytest.fixture
def files(tmp_path):
    paths = []
    for seed in range(3):
        path = tmp_path / f"picture {seed}.png"
        path.write_bytes(picture(seed, size=(60 + 40 * seed, 50)))
        paths.append(str(path))
    return paths


def test_pictures_get_bars_a_map_a_table_and_a_csv(browser, run, files, tmp_path):  # noqa: F811
    with serving(run) as (port, _):
        address = f"http://127.0.0.1:{port}"
        with page_at(browser, address, locale="en-US") as page:
            page.wait_for_selector("#facts:not(:empty)")
            assert "5 classes" in page.inner_text("#facts")
            page.set_input_files("#files", files)
            page.wait_for_selector("#rows tr:nth-child(3)")
            page.wait_for_selector("#status:has-text('3 pictures done')")
            expected = load(run).predict(files)
            first = expected[0]["predictions"]
            assert page.locator("#bars .label").all_inner_texts() == [guess["label"] for guess in first]
            shown = [f"{100 * guess['probability']:.1f} %" for guess in first]
            assert page.locator("#bars .value").all_inner_texts() == shown
            page.click("#explain")
            page.wait_for_selector("#map-text:not(:empty)")
            assert first[0]["label"] in page.inner_text("#map-text") or "changes nothing" in page.inner_text(
                "#map-text"
            )
            keep(page, "serve-light")
            page.click("th button[data-key=probability]")
            values = [
                float(text.removesuffix(" %"))
                for text in page.locator("#rows td:nth-child(4)").all_inner_texts()
            ]
            assert values == sorted(values)
            page.click("th button[data-key=probability]")
            assert page.get_attribute("th:nth-child(4)", "aria-sort") == "descending"
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
            assert "Drop pictures" in page.inner_text("#drop")


def test_a_file_that_is_no_picture_is_named(browser, run, tmp_path):  # noqa: F811
    (tmp_path / "broken.png").write_bytes(b"no picture")
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


def test_runs_are_compared_in_the_browser(browser, tmp_path):
    from mixlab.serving.listen import make_server
    from mixlab.serving.ui import create_ui

    for seed in (0, 1):
        mixlab.train(
            "digits",
            "digits",
            run=tmp_path / "runs" / f"run-{seed}",
            screen=Screen(quiet=True),
            steps=120,
            seed=seed,
        )
    port = concurrent.futures.Future()
    figures = tmp_path / "studies" / "filters" / "figures"
    figures.mkdir(parents=True)
    Image.new("RGB", (40, 30), "teal").save(figures / "stem.png")
    (figures.parent / "filters.csv").write_text("layer,opposed\n1,0.5\n")
    app = create_ui(tmp_path / "runs", tmp_path / "studies", list_runs, {"shuffle": "DATA"}, token=TOKEN)
    server = make_server(app, host="127.0.0.1", port=0, started=port.set_result)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        address = f"http://127.0.0.1:{port.result(timeout=60)}"
        with page_at(browser, address, expected=["401 (Unauthorized)"]) as page:  # before the token is given
            page.fill("#token", TOKEN)
            page.press("#token", "Enter")
            page.wait_for_selector("#runs tr:nth-child(2)")
            assert "mixlab study shuffle DATA" in page.inner_text("#studies")
            page.click("#studies summary")
            page.wait_for_selector("#studies td:has-text('0.5')")
            page.locator("#studies img").scroll_into_view_if_needed()  # loaded when it is seen
            page.wait_for_timeout(500)
            assert page.evaluate("document.querySelector('#studies img').naturalWidth") == 40
            page.check("input[aria-label='Choose run-0']")
            page.wait_for_selector("#one-title:not(:empty)")
            with page.context.expect_page() as opened:
                page.click("#report a", modifiers=["Control"])
            opened.value.wait_for_selector("h1")
            page.check("input[aria-label='Choose run-1']")
            page.wait_for_selector("#differences tr")
            keys = page.locator("#differences td:first-child").all_inner_texts()
            assert "seed" in keys
            assert "test accuracy" in keys
            assert "optimizer.lr" not in keys
            assert page.locator("#top1 path").count() == 2
            assert page.locator("#confusion tbody tr").count() == 10
            keep(page, "ui")
    finally:
        server.should_exit = True
        thread.join(timeout=60)
