"""The page of `mixlab ui` in a real browser; see test_page.py for what it needs."""

import concurrent.futures
import contextlib
import itertools
import json
import shutil
import threading
import time

import pytest
from PIL import Image

import mixlab
from mixlab.report.screen import Screen
from mixlab.training.run_folder import list_runs
from tests.serving.test_page import CHROMIUM, LOOKS, browser, keep, look_over, page_at  # noqa: F401
from tests.serving.test_server import TOKEN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of digits, one of two colors, and a study."""
    folder = tmp_path_factory.mktemp("trained")
    colors = folder / "two colors"
    for number, name in enumerate(("red", "blue", "red", "blue") * 10):
        place = colors / name / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (name == "red" and 200 + number, 0, name == "blue" and 200 + number)).save(
            place
        )
    options = {"screen": Screen(quiet=True)}
    for seed, steps in ((0, 120), (1, 40)):
        run = folder / "runs" / f"digits-of-a-long-name_{seed}"
        mixlab.train("digits", "digits", run=run, steps=steps, seed=seed, **options)
    mixlab.train(str(colors), "digits", run=folder / "runs" / "colors", steps=20, **options)
    figures = folder / "studies" / "filters" / "figures"
    figures.mkdir(parents=True)
    Image.new("RGB", (40, 30), "teal").save(figures / "stem.png")
    (figures.parent / "filters.csv").write_text("layer,opposed\n1,0.5\n")
    return folder


@pytest.fixture
def place(trained, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "place")


@contextlib.contextmanager
def ui_at(place, port=0, **options):
    from mixlab.serving.listen import make_server
    from mixlab.serving.ui import create_ui

    found = concurrent.futures.Future()
    app = create_ui(place / "runs", place / "studies", list_runs, {"shuffle": "DATA"}, **options)
    server = make_server(app, host="127.0.0.1", port=port, started=found.set_result)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield found.result(timeout=60)
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def unfinished(place, name):
    """A run that has not written its end yet."""
    run = shutil.copytree(place / "runs" / "colors", place / "runs" / name)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["event"] != "end"))
    return run


def names(page):
    return page.locator("#runs th").all_inner_texts()


def choose(page, *wanted):
    for name in wanted:
        page.check(f"input[aria-label='Choose {name}']")


def test_runs_are_compared_and_accuracy_comes_first(browser, trained):  # noqa: F811
    rows = {row["run"].rpartition("/")[2]: row for row in list_runs(trained / "runs")}
    first, second = "digits-of-a-long-name_0", "digits-of-a-long-name_1"
    with ui_at(trained, token=TOKEN) as port:
        options = {"locale": "en-US", "expected": ["401 (Unauthorized)"]}  # before the token is given
        with page_at(browser, f"http://127.0.0.1:{port}", **options) as page:
            page.fill("#token", TOKEN)
            page.press("#token", "Enter")
            page.wait_for_selector("#runs tr:nth-child(3)")
            assert "mixlab study shuffle DATA" in page.inner_text("#studies")
            page.click("#studies summary")
            page.wait_for_selector("#studies td:has-text('0.5')")
            page.locator("#studies img").scroll_into_view_if_needed()  # loaded when it is seen
            page.wait_for_timeout(500)
            assert page.evaluate("document.querySelector('#studies img').naturalWidth") == 40
            choose(page, first)
            page.wait_for_selector("#one-title:not(:empty)")
            with page.context.expect_page() as opened:
                page.click("#report a", modifiers=["Control"])
            opened.value.wait_for_selector("h1")
            choose(page, second)
            page.wait_for_selector("#differences tr")
            assert page.inner_text("#results th:nth-child(2)") == "Test accuracy"
            by_accuracy = sorted((first, second), key=lambda name: -rows[name]["test_top1"])
            assert page.locator("#results tbody th").all_inner_texts() == by_accuracy
            gap = rows[by_accuracy[1]]["test_top1"] - rows[by_accuracy[0]]["test_top1"]
            assert page.locator("#results td:nth-child(3)").all_inner_texts() == [
                "best",
                f"{100 * gap:.1f} points",
            ]
            shown = page.locator("#results td:nth-child(2)").all_inner_texts()
            assert shown[0].startswith(f"{100 * rows[by_accuracy[0]]['test_top1']:.2f}% (")
            keys = page.locator("#differences th[scope=row]").all_inner_texts()
            assert {"seed", "steps"} <= set(keys)
            assert "optimizer.lr" not in keys
            assert page.locator("#top1 path.line").count() == 2
            assert page.locator("#confusion tbody tr").count() == 10
            choose(page, "colors")
            page.wait_for_selector("#results tbody tr:nth-child(3)")
            differences = page.locator("#results td:nth-child(3)").all_inner_texts()
            assert differences.count("best") == 2  # of other data, so of another best
            assert page.is_hidden("#confusion")
            page.click("#none")
            assert page.is_hidden("#compare")


def test_runs_show_data_model_and_date_and_can_be_found(browser, place):  # noqa: F811
    unfinished(place, "half")
    (place / "runs" / "half" / "environment.json").unlink()
    with ui_at(place) as port:
        address = f"http://127.0.0.1:{port}"
        with page_at(browser, address, locale="en-US", timezone_id="Asia/Seoul") as page:
            page.wait_for_selector("#runs tr:nth-child(4)")
            colors = page.locator("#runs tr:has(th:text-is('colors')) td").all_inner_texts()
            environment = json.loads((place / "runs" / "colors" / "environment.json").read_text())
            at = time.mktime(time.strptime(environment["started"][:19], "%Y-%m-%dT%H:%M:%S"))
            offset = environment["started"][19:]
            seconds = (int(offset[1:3]) * 3600 + int(offset[3:5]) * 60) * (-1 if offset[0] == "-" else 1)
            seoul = time.strftime("%Y-%m-%d %H:%M", time.localtime(at - seconds + 9 * 3600))
            assert colors[3:6] == ["two colors", "mixer_pico2", seoul]
            assert "last change" in page.inner_text("#runs tr:has-text('half')")
            page.select_option("#filter-data", "two colors")
            assert {name.split("\n")[0] for name in names(page)} == {"colors", "half"}
            page.select_option("#filter-state", "unfinished")
            assert page.inner_text("#count") == "1 of 4 shown"
            page.select_option("#filter-state", "")
            page.select_option("#filter-data", "")
            page.fill("#search", "LONG digits")
            assert len(names(page)) == 2
            page.fill("#search", "")
            page.select_option("#filter-model", "mixer_pico2")
            assert len(names(page)) == 4
            page.click("th button[data-key=steps]")
            steps = [int(text) for text in page.locator("#runs td:nth-child(8)").all_inner_texts()]
            assert steps == sorted(steps)
            page.click("th button[data-key=steps]")
            assert page.get_attribute("th:has([data-key=steps])", "aria-sort") == "descending"
            assert names(page)[0] == "digits-of-a-long-name_0"
            for descending in (False, True):
                page.click("th button[data-key=started]")
                dates = page.locator("#runs td:nth-child(7)").all_inner_texts()
                assert dates[-1] == "–"  # what is not known comes last either way
                assert dates[:-1] == sorted(dates[:-1], reverse=descending)


def test_the_page_asks_again_after_the_server_was_away(browser, place):  # noqa: F811
    options = {"locale": "en-US", "expected": ["ERR_CONNECTION_REFUSED"]}
    with contextlib.ExitStack() as later:
        with ui_at(place) as port:
            page = later.enter_context(page_at(browser, f"http://127.0.0.1:{port}", **options))
            page.clock.install()
            page.reload()
            page.wait_for_selector("#runs tr:nth-child(3)")
        page.clock.fast_forward(15_000)  # nothing trains
        page.wait_for_selector("#status:has-text('The server does not answer. Trying again in 30 s.')")
        page.clock.fast_forward(30_000)
        page.wait_for_selector("#status:has-text('Trying again in 60 s.')")
        page.clock.fast_forward(60_000)
        page.wait_for_selector("#status:has-text('Trying again in 60 s.')")
        assert len(names(page)) == 3  # what was known stays
        unfinished(place, "new")
        with ui_at(place, port):
            page.clock.fast_forward(60_000)
            page.wait_for_selector("#runs tr:nth-child(4)")
            assert page.inner_text("#status") == ""


def test_the_page_asks_fast_while_something_trains_and_never_while_nobody_looks(browser, place):  # noqa: F811
    run = unfinished(place, "half")
    (run / "metrics.jsonl").touch()
    with ui_at(place) as port, page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page:
        page.clock.install()
        page.reload()
        page.wait_for_selector("#runs tr:nth-child(4)")
        page.focus("input[aria-label='Choose half']")
        page.keyboard.press("Space")
        page.wait_for_selector("#one-title:has-text('half')")
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        with (run / "metrics.jsonl").open("a") as log:
            row = {
                "event": "validation",
                "step": 900,
                "epoch": 45.0,
                "loss": 0.1,
                "top1": 0.875,
                "seconds": 9.0,
            }
            log.write(json.dumps(row) + "\n")
        page.clock.fast_forward(3_000)
        page.wait_for_selector("#runs tr:has-text('half') td:text-is('900')")
        page.wait_for_selector("#top1 svg[aria-valuemax='45']")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Choose half"
        assert any(url.endswith("/api/runs") for url in asked)
        page.wait_for_timeout(300)
        show = "isHidden => { Object.defineProperty(document, 'hidden', { value: isHidden, configurable: true });"
        show += " document.dispatchEvent(new Event('visibilitychange')) }"
        page.evaluate(show, True)
        asked.clear()
        page.clock.fast_forward(600_000)
        page.wait_for_timeout(500)
        assert asked == []
        page.evaluate(show, False)
        page.wait_for_timeout(500)
        assert any(url.endswith("/api/runs") for url in asked)


def test_charts_have_rounded_ticks_values_and_smoothing(browser, trained):  # noqa: F811
    name = "digits-of-a-long-name_0"
    log = (trained / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, log) if row["event"] == "train"]
    with ui_at(trained) as port, page_at(browser, f"http://127.0.0.1:{port}", locale="en-US") as page:
        page.wait_for_selector("#runs tr:nth-child(3)")
        choose(page, name)
        page.wait_for_selector("#loss svg")
        for chart in ("#top1", "#loss"):
            texts = page.locator(f"{chart} svg text").all_text_contents()
            values = [
                float(text.removesuffix("%")) for text in texts if text.endswith("%") == (chart == "#top1")
            ]
            assert len(values) >= 3
            gaps = {round(b - a, 6) for a, b in itertools.pairwise(values) if b > a}
            assert all(f"{gap:e}"[0] in "125" for gap in gaps), values
        box = page.locator("#loss svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 5, box["y"] + 50)
        said = page.inner_text("#loss .values")
        assert f"{name}: {rows[-1]['loss']:.3f}" in said
        page.mouse.move(0, 0)
        page.focus("#loss svg")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        value = page.get_attribute("#loss svg", "aria-valuetext")
        assert f"{name}: {rows[1]['loss']:.3f}" in value
        raw = page.get_attribute("#loss path.line", "d")
        page.fill("#smoothing", "0.8")
        page.wait_for_selector("#loss path.faint", state="attached")
        assert page.get_attribute("#loss path.faint", "d") == raw
        assert page.get_attribute("#loss path.line", "d") != raw
        weights = [0.8 ** (len(rows) - 1 - i) for i in range(len(rows))]  # debiased by their sum
        smoothed = sum(w * row["loss"] for w, row in zip(weights, rows, strict=True)) / sum(weights)
        page.focus("#loss svg")
        page.keyboard.press("End")
        assert f"(smoothed {smoothed:.3f})" in page.inner_text("#loss .values")


def test_ticks_are_rounded_whatever_the_range(browser, trained):  # noqa: F811
    with ui_at(trained) as port, page_at(browser, f"http://127.0.0.1:{port}") as page:
        for low, high, expected in (
            (0.19, 0.81, [0, 0.2, 0.4, 0.6, 0.8, 1]),
            (1, 1, [0.98, 1]),
            (0, 0, [-0.2, 0]),
            (0, 10.25, [0, 5, 10, 15]),
            (0.0123, 0.0187, [0.012, 0.014, 0.016, 0.018, 0.02]),
            (1200, 98000, [0, 20000, 40000, 60000, 80000, 100000]),
        ):
            code = f"import('/chart.js').then(({{ ticks }}) => ticks({low}, {high}).all)"
            assert page.evaluate(code) == pytest.approx(expected)


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: f"{look['locale'][:2]}-{look['viewport']['width']}")
def test_the_page_is_for_every_reader_on_every_screen(browser, place, look):  # noqa: F811
    unfinished(place, "half")
    damaged = unfinished(place, "damaged-run-with-a-long-name-of-many-parts")
    (damaged / "metrics.jsonl").write_text("{broken\n{}\n")
    name = f"ui-{look['locale'][:2]}-{look['viewport']['width']}"
    with ui_at(place) as port, page_at(browser, f"http://127.0.0.1:{port}", **look) as page:
        page.wait_for_selector("#runs tr:nth-child(5)")
        look_over(page, f"{name}-none")
        boxes = page.locator("#runs input")
        boxes.nth(0).check()
        page.wait_for_selector("#one-title:not(:empty)")
        page.click("#studies summary")
        page.wait_for_selector("#studies td")
        look_over(page, f"{name}-one")
        boxes.nth(1).check()
        boxes.nth(2).check()
        page.wait_for_selector("#results tbody tr:nth-child(3)")
        page.fill("#smoothing", "0.5")
        look_over(page, f"{name}-three")
        boxes.nth(0).uncheck()
        page.wait_for_selector("#results tbody tr:nth-child(3)", state="detached")
        look_over(page, f"{name}-two")
        assert page.get_attribute("html", "lang") == look["locale"][:2]
