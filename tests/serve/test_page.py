"""The search page in a real browser: type, drop, paste, choose, compare, walk by keys, and how it fails."""

import base64
import os
import shutil
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest
import uvicorn
from little_service import COLOURS, ColourEncoder, gallery, picture, searcher

from clipdistill.data.records import Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.search import Searcher
from clipdistill.serve.app import create_app
from clipdistill.serve.encoders import Leading
from clipdistill.serve.options import Options
from clipdistill.serve.thumbnails import PictureFolder
from clipdistill.serve.variants import Variant

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DROP = """([base64, type, name]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, {type}));
  return data;
}"""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        words = f"no Chromium on this machine (looked for {', '.join(NAMES)})"
        if os.environ.get("CLIPDISTILL_REQUIRE_BROWSER"):
            pytest.fail(f"{words}, and CLIPDISTILL_REQUIRE_BROWSER is set. Install it: apt-get install chromium")
        pytest.skip(words)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Service:
    """A real server on a free port, in a thread."""

    def __init__(self, app):
        config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"

    def stop(self):
        self._server.should_exit = True
        self._thread.join(20)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = gallery(tmp_path_factory.mktemp("shop") / "goods")
    main = searcher(folder, ColourEncoder())
    app = create_app(
        main,
        Options(body_bytes=200_000, text_chars=200, pixels=10**6),
        compared=("teacher", searcher(folder, ColourEncoder(turn=0.8))),
        pictures=PictureFolder(folder),
    )
    service = Service(app)
    yield service, main
    service.stop()


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A service of three sizes of one model, beside another."""
    folder = gallery(tmp_path_factory.mktemp("sizes") / "goods")
    main = searcher(folder, ColourEncoder())
    rows, ids, print_ = main.index.vectors(), main.index.ids, main.encoder.fingerprint
    packed = VectorIndex.build(rows, ids, factory="PQ4x4fs,Refine(SQ8)", encoder=print_)
    cut = Leading(main.encoder, 3)
    narrow = Searcher(cut, VectorIndex.build(cut.cut(rows), ids, factory="SQ8", encoder=cut.fingerprint))
    ways = [Variant(Searcher(main.encoder, packed), 12_340_000), Variant(narrow, 9_100_000)]
    other = searcher(folder, ColourEncoder(turn=0.8))
    app = create_app(
        Variant(main, 12_340_000), variants=ways, compared=("teacher", other), pictures=PictureFolder(folder)
    )
    service = Service(app)
    yield service, {"8-Flat": main, "8-PQ4x4fs,Refine(SQ8)": ways[0].searcher, "3-SQ8": narrow}
    service.stop()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A service of a text tower alone."""
    folder = gallery(tmp_path_factory.mktemp("words") / "goods", each=2)
    main = searcher(folder, ColourEncoder())
    service = Service(create_app(main, pictures=PictureFolder(folder), texts_alone=["student"]))
    yield service, main
    service.stop()


@pytest.fixture
def page(browser, shop):
    yield from opened_page(browser, shop[0])


@pytest.fixture
def sized(browser, sizes):
    yield from opened_page(browser, sizes[0])


@pytest.fixture
def wordy(browser, words):
    yield from opened_page(browser, words[0])


def opened_page(browser, service):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(10_000)
    opened.faults, opened.asked = [], []
    opened.on("pageerror", lambda fault: opened.faults.append(str(fault)))
    opened.on("console", lambda said: opened.faults.append(said.text) if "Content Security" in said.text else None)
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(service.address)
    opened.wait_for_selector("#about:not(:empty)")
    yield opened
    assert opened.faults == []
    home = (service.address, "data:", f"blob:{service.address}")
    assert [url for url in opened.asked if not url.startswith(home)] == []
    context.close()


def keys(page, side="section:first-child"):
    return page.locator(f"#found {side} .key").all_inner_texts()


def search(page, text):
    page.fill("#text", text)
    page.wait_for_function("() => /results? in/.test(document.getElementById('status').textContent)")
    page.wait_for_selector("#found:not(.stale) .card")


def drop(page, data, kind="image/png", name="it.png"):
    transfer = page.evaluate_handle(DROP, [base64.b64encode(data).decode(), kind, name])
    for event in ("dragenter", "dragover"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})
    assert page.is_visible("#drop")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    assert page.is_hidden("#drop")


def test_typing_shows_results_with_their_pictures_and_the_time_it_took(page, shop):
    assert page.inner_text("#about") == "student · 32 pictures · 8 dimensions"
    assert page.is_visible("#empty")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("a blue thing", delay=15)
    # The results of the first letters may come before the last ones are typed
    page.wait_for_function("() => location.hash === '#q=a+blue+thing' && !document.querySelector('.stale')")
    page.wait_for_function("() => / ms, /.test(document.getElementById('status').textContent)")
    page.wait_for_function("() => document.querySelectorAll('#found .key').length === 48")
    assert keys(page) == [hit.key for hit in shop[1].by_text("a blue thing", 24)]
    assert page.inner_text("#found .score >> nth=0") == f"{shop[1].by_text('a blue thing', 1)[0].score:.3f}"
    page.wait_for_function("() => document.querySelector('#found img').naturalWidth === 48")
    assert len([url for url in page.asked if url.endswith("/search")]) < len("a blue thing")  # not one a letter


def test_a_reloaded_address_searches_again(page, shop):
    page.goto(shop[0].address + "#q=green")
    page.reload()
    page.wait_for_selector("#found .card")
    assert page.input_value("#text") == "green"
    assert keys(page)[0].startswith("goods/green/")


def test_the_models_are_shown_side_by_side_with_what_they_share(page):
    search(page, "red orange")
    page.select_option("#k", "10")
    page.wait_for_function("() => document.querySelectorAll('#found .key').length === 20")
    one, two = keys(page), keys(page, "section.other")
    assert page.locator("#found h2").all_inner_texts()[1].startswith("teacher")
    assert one != two
    assert f"{len(set(one) & set(two))} of 10 in both" in page.inner_text("#status")
    marked = page.locator("#found section:first-child .card:has(.both) .key").all_inner_texts()
    assert marked == [key for key in one if key in two]
    page.uncheck("#compare")
    page.wait_for_selector("#found.one")
    assert len(keys(page)) == 10
    assert page.locator("section.other").count() == 0


def test_a_dropped_a_pasted_and_a_chosen_picture_find_themselves(page):
    for number, way in enumerate(("drop", "paste", "choose")):
        data, name = picture(COLOURS["violet"], number), f"goods/violet/{number}.png"
        if way == "drop":
            drop(page, data)
        elif way == "paste":
            transfer = page.evaluate_handle(DROP, [base64.b64encode(data).decode(), "image/png", "it.png"])
            page.evaluate(
                "(d) => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: d, cancelable: true}))",
                transfer,
            )
        else:
            page.set_input_files("#file", {"name": "it.png", "mimeType": "image/png", "buffer": data})
        page.wait_for_function("(key) => document.querySelector('#found .key')?.textContent === key", arg=name)
        assert page.is_visible("#query")
        assert page.is_hidden("#text")
        assert page.inner_text("#found .score >> nth=0") == "1.000"


def test_a_result_searches_for_pictures_like_it(page):
    search(page, "yellow")
    page.click("#found .card >> nth=0")
    page.wait_for_function("() => document.getElementById('named').textContent.startsWith('goods/yellow/')")
    page.wait_for_selector("#found:not(.stale) .card")
    assert all(key.startswith("goods/yellow/") for key in keys(page)[:2])


def test_the_keyboard_is_enough(page):
    search(page, "grey")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.title").startswith(keys(page)[0])
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.title").startswith(keys(page)[1])
    page.keyboard.press("ArrowDown")
    below = page.evaluate("document.activeElement.querySelector('.line span').textContent")
    assert int(below) > 2
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("/")
    page.keyboard.type("black")
    page.wait_for_function("() => document.querySelector('#found .key').textContent.startsWith('goods/black')")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#query:visible")
    page.keyboard.press("Escape")
    assert page.is_visible("#empty")
    assert page.is_visible("#text")
    assert page.locator(".card").count() == 0


def test_what_is_refused_is_said_and_the_next_search_works(page):
    drop(page, b"no picture at all")
    page.wait_for_selector("#problem:visible")
    assert page.inner_text("#what") == "That cannot be searched"
    assert "not a picture" in page.inner_text("#why")
    drop(page, picture(COLOURS["red"]) + b"\0" * 300_000)
    page.wait_for_function("() => document.getElementById('what').textContent === 'Too large'")
    page.keyboard.press("Escape")
    page.fill("#text", "x" * 300)
    page.wait_for_function("() => document.getElementById('why').textContent.includes('300 characters')")
    search(page, "red")
    assert page.is_hidden("#problem")


def test_a_full_service_and_one_that_is_gone_are_said(page):
    problem = '{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"ask again in 4 s"}'
    page.route(
        "**/search", lambda route: route.fulfill(status=503, content_type="application/problem+json", body=problem)
    )
    page.fill("#text", "red")
    page.wait_for_selector("#problem:visible")
    assert (page.inner_text("#what"), page.inner_text("#why")) == ("The service is busy", "ask again in 4 s")
    page.unroute("**/search")
    page.route("**/search", lambda route: route.abort())
    page.fill("#text", "blue")
    page.wait_for_function("() => document.getElementById('what').textContent === 'The service does not answer'")
    page.unroute("**/search")
    search(page, "green")
    assert page.is_hidden("#problem")


def test_the_answer_to_an_older_question_never_replaces_a_newer_one(page, shop):
    shop[1].encoder.open.clear()
    page.fill("#text", "red")
    page.wait_for_timeout(300)
    page.fill("#text", "blue")
    page.wait_for_timeout(300)
    shop[1].encoder.open.set()
    page.wait_for_selector("#found:not(.stale) .card")
    page.wait_for_timeout(200)
    assert keys(page)[0].startswith("goods/blue/")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_fits_its_width_in_light_and_dark(page, width, scheme, tmp_path):
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    folder = os.environ.get("CLIPDISTILL_SCREENSHOTS", str(tmp_path))
    for name in ("empty", "compared", "single", "picture", "problem"):
        if name == "compared":
            search(page, "red orange")
        elif name == "single":
            page.uncheck("#compare")
            page.wait_for_selector("#found.one")
        elif name == "picture":
            drop(page, picture(COLOURS["orange"], 1), name="a picture with quite a long name of its own.png")
            page.wait_for_selector("#found:not(.stale) .card")
        elif name == "problem":
            drop(page, b"no picture at all", name="notes.txt")
            page.wait_for_selector("#problem:visible")
            page.wait_for_selector("#shown", state="hidden")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.wait_for_timeout(150)
        page.screenshot(path=f"{folder}/{name}-{width}-{scheme}.png")


def answered(page, keys):
    page.wait_for_function(
        "(keys) => JSON.stringify([...document.querySelectorAll('#found section:first-child .key')]"
        ".map((each) => each.textContent)) === JSON.stringify(keys)",
        arg=keys,
    )


def test_the_slider_chooses_among_the_sizes(sized, sizes):
    _, ways = sizes
    listed = [
        each["name"] for each in sized.evaluate("fetch('info').then((one) => one.json())")["models"][0]["variants"]
    ]
    assert set(listed) == set(ways)
    slider = sized.get_by_role("slider", name="Size")
    assert slider.get_attribute("max") == "2"
    assert listed[int(slider.input_value())] == "8-Flat"  # the first that was given, wherever it stands
    assert sized.locator("#sizes option").count() == 3
    sized.uncheck("#compare")
    search(sized, "a red thing and a violet one")
    slider.focus()
    sized.keyboard.press("Home")
    for place, name in enumerate(listed):
        if place:
            sized.keyboard.press("ArrowRight")
        index = ways[name].index
        said = sized.inner_text("#size")
        assert said.startswith(f"{index.dim} dims, {index.factory}, ")
        assert "B/vector, index " in said and " kB" in said and said.endswith(" MB")
        assert slider.get_attribute("aria-valuetext") == said
        answered(sized, [hit.key for hit in ways[name].by_text("a red thing and a violet one", 24)])
        assert sized.evaluate("document.activeElement.id") == "variant"
    sized.keyboard.press("ArrowLeft")
    sized.keyboard.press("/")
    assert sized.evaluate("document.activeElement.id") == "text"


def test_a_dropped_picture_is_searched_for_in_the_chosen_size(sized, sizes):
    slider = sized.get_by_role("slider", name="Size")
    slider.focus()
    sized.keyboard.press("Home")
    data = picture(COLOURS["violet"], 1)
    with sized.expect_request("**/search?*") as asked:
        drop(sized, data)
    name = sized.evaluate("variant().name")
    assert parse_qs(urlsplit(asked.value.url).query)["variant"] == [name]
    answered(sized, [hit.key for hit in sizes[1][name].by_picture(Picture("x", data=data), 24)])


def test_without_sizes_there_is_no_slider(page):
    assert page.is_hidden("#varying")
    with page.expect_request("**/search") as asked:
        search(page, "red")
    assert "variant" not in asked.value.post_data_json


def test_a_text_tower_alone_offers_no_pictures_and_says_why(wordy, words):
    assert wordy.is_hidden("#choose")
    assert wordy.is_hidden("#dropping")
    assert wordy.inner_text("#invitation") == "Type a few words."
    search(wordy, "green")
    assert keys(wordy) == [hit.key for hit in words[1].by_text("green", 24)]
    assert wordy.locator("#found button.card").count() == 0
    wordy.wait_for_function("() => document.querySelector('#found img').naturalWidth === 48")
    before = len(wordy.asked)
    transfer = wordy.evaluate_handle(DROP, [base64.b64encode(picture(COLOURS["red"])).decode(), "image/png", "it.png"])
    for event in ("dragenter", "dragover", "drop"):
        wordy.dispatch_event("body", event, {"dataTransfer": transfer})
        assert wordy.is_hidden("#drop")
    wordy.wait_for_selector("#problem:visible")
    assert "takes words alone" in wordy.inner_text("#why")
    assert [url for url in wordy.asked[before:] if "search" in url] == []
    wordy.fill("#text", "blue")
    wordy.wait_for_selector("#problem", state="hidden")
    wordy.keyboard.press("ArrowDown")
    assert wordy.evaluate("document.activeElement.title").startswith("goods/blue/")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_the_slider_fits_its_width(sized, width, scheme, tmp_path):
    sized.set_viewport_size({"width": width, "height": 844})
    sized.emulate_media(color_scheme=scheme)
    sized.get_by_role("slider", name="Size").focus()
    sized.keyboard.press("Home")
    search(sized, "red orange")
    assert sized.evaluate("document.documentElement.scrollWidth") <= width
    sized.wait_for_timeout(150)
    folder = os.environ.get("CLIPDISTILL_SCREENSHOTS", str(tmp_path))
    sized.screenshot(path=f"{folder}/sizes-{width}-{scheme}.png")
