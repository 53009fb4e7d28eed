"""A web bundle on a static host in a real headless Chromium: search, pictures to the bit, refusals, and the gate."""

import base64
import functools
import http.server
import io
import json
import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image
from training import little

from clipdistill.core.errors import ConfigError, DataError, MismatchError, MissingExtraError, ParityError
from clipdistill.data.pictures import decode
from clipdistill.formats import Gallery, Probe, export, layouts, parity, verify, web, web_vendor
from clipdistill.formats.probe import expected_rows
from clipdistill.formats.readers import read_web
from clipdistill.stages import export as stage
from clipdistill.towers.preprocess import Preprocess

pytestmark = pytest.mark.slow
PAIRS = tiny.pairs(30)
PICTURES = tuple(pair.picture for pair in PAIRS)
LONG = " ".join(["red bicycle"] * 40)
TEXTS = ["", "a", *(pair.captions[0] for pair in PAIRS[:12]), LONG, "don’t “Café” ½ 3rd <|endoftext|> 日本", "\ud800 x"]
DROP = """([base64, type, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], name, {type}));
  return data;
}"""


def absent(words, variable):
    if os.environ.get(variable):
        pytest.fail(f"{words}, and {variable} is set")
    pytest.skip(words)


@pytest.fixture(scope="module")
def scripts():
    """npm's packages, from the cache or, once, from npm: no test waits long for a network."""
    if read_web.browser() is None:
        absent("no Chromium on this machine", "CLIPDISTILL_REQUIRE_BROWSER")
    try:
        return web_vendor.vendored(seconds=60)
    except MissingExtraError as fault:
        return absent(str(fault), "CLIPDISTILL_REQUIRE_NPM")


@pytest.fixture(scope="module")
def made(scripts, tmp_path_factory):
    student, folder = little.student("test_vit"), tmp_path_factory.mktemp("export") / "made"
    gallery = Gallery("tiny", tuple(pair.key for pair in PAIRS), student.encode_images(PICTURES), PICTURES, 48)
    report = export(
        student, folder, ("onnx", "web"), ("fp32", "int8"), probe=Probe.of(student, TEXTS, PICTURES),
        gallery=gallery,
    )  # fmt: skip
    return student, folder, report


@pytest.fixture(scope="module")
def host(made):
    """A host of files and nothing else, one folder above the export."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(made[1].parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture(scope="module")
def browser(scripts):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=read_web.browser(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, host):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(30_000)
    opened.faults, opened.asked = [], []
    opened.on("pageerror", lambda fault: opened.faults.append(str(fault)))
    opened.on("console", lambda said: opened.faults.append(said.text) if "Content Security" in said.text else None)
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(f"{host}made/web/")
    yield opened
    assert opened.faults == []
    assert [url for url in opened.asked if not url.startswith((host, "data:", f"blob:{host}"))] == []
    opened.close()


def keys(page):
    return page.locator("#found .key").all_inner_texts()


def drop(page, data, kind="image/png"):
    transfer = page.evaluate_handle(DROP, [base64.b64encode(data).decode(), kind, "it.png"])
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})


def test_what_is_written_and_how_it_compares(made):
    student, folder, report = made
    values = json.loads((folder / "manifest.json").read_text())
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(values["files"]) == found - {"manifest.json"}
    assert set(web.paths(("image", "text"), ())) <= set(values["needs"]) <= found
    one = {each.reading: each for each in report.parities}["web"]
    assert one.library.startswith("transformers.js 4.3.1 in Chromium ")
    assert (one.towers["text"]["rows"], one.towers["image"]["rows"]) == (len(TEXTS), 8)
    assert min(values["worst_cosine"] for values in one.towers.values()) >= one.bar == 0.995
    assert one.recall["gallery_overlap10"] >= 0.9
    assert 0 < one.recall["first_result_s"] < 60
    assert 0.5 < one.recall["preprocess_cosine"] <= 1.0001
    text = (folder / "README.md").read_text()
    assert "static host" in text and "first_result_s" in text and 'dtype: "fp32"' in text
    notice = (folder / "web/vendor/NOTICE.txt").read_text()
    assert "@huggingface/transformers@4.3.1" in notice and "Permission is hereby granted" in notice
    for path in (folder / "web").glob("*.*"):
        assert b"http" not in path.read_bytes().replace(b"http-equiv", b"").replace(b"http://www.w3.org", b""), path
    vectors, wanted = web.bundle_vectors(folder), student.encode_images(PICTURES)
    assert (vectors * wanted).sum(axis=1).min() > 0.9999


def test_it_is_checked_again(made):
    again = {one.reading: one for one in verify(made[1]).parities}["web"]
    assert again.towers["image"]["rows"] == again.towers["text"]["rows"] == 8
    assert again.recall["gallery_overlap10"] >= 0.9


def test_words_are_typed_and_a_picture_is_dropped(made, page, tmp_path):
    student, folder, _ = made
    page.wait_for_selector("#about:not(:empty)")
    assert page.inner_text("#about") == "tiny · 30 pictures · 16 dimensions"
    page.fill("#text", "red bicycle")
    page.wait_for_selector("#found:not(.stale) .card")
    page.wait_for_function("() => document.querySelector('#found img').naturalWidth > 30")
    vector = page.evaluate("async (text) => Array.from(await (await engine).embedText(text))", "red bicycle")
    assert float(np.dot(vector, student.encode_texts(["red bicycle"])[0])) >= 0.995
    scores = web.bundle_vectors(folder) @ np.array(vector, np.float32)
    assert keys(page) == [PAIRS[row].key for row in np.argsort(-scores, kind="stable")[:24]]
    assert page.inner_text("#found .score >> nth=0") == f"{scores.max():.3f}"
    page.screenshot(path=f"{os.environ.get('CLIPDISTILL_SCREENSHOTS', tmp_path)}/web-words.png")
    page.select_option("#k", "10")
    page.wait_for_function("() => document.querySelectorAll('#found .key').length === 10")
    drop(page, PICTURES[7].read())
    page.wait_for_function("(key) => document.querySelector('#found .key')?.textContent === key", arg=PAIRS[7].key)
    assert float(page.inner_text("#found .score >> nth=0")) >= 0.998
    page.click("#found .card >> nth=1")  # its thumbnail is searched with
    page.wait_for_function("() => document.getElementById('named').textContent !== 'it.png'")
    page.wait_for_selector("#found:not(.stale) .card")
    page.screenshot(path=f"{os.environ.get('CLIPDISTILL_SCREENSHOTS', tmp_path)}/web-picture.png")


def test_until_it_is_loaded_it_says_so_and_keeps_the_question(browser, host):
    page = browser.new_page()
    held = []
    page.route("**/vectors.bin", lambda route: held.append(route))
    page.goto(f"{host}made/web/")
    page.fill("#text", "red")
    page.wait_for_timeout(300)
    assert page.inner_text("#status") == "Loading the search…"
    assert page.locator(".card").count() == 0
    held[0].continue_()
    page.wait_for_selector("#found .card")
    assert "results in" in page.inner_text("#status")
    page.close()


def test_what_cannot_be_searched_is_said_and_the_next_search_works(page):
    page.wait_for_selector("#about:not(:empty)")
    drop(page, b"no picture at all")
    page.wait_for_selector("#problem:visible")
    assert page.inner_text("#what") == "That cannot be searched"
    page.evaluate("() => { clear(); }")
    page.fill("#text", "x" * 5000)
    page.wait_for_function("() => document.getElementById('what').textContent === 'Too large'")
    assert "5000 characters; at most 4096" in page.inner_text("#why")
    page.fill("#text", "red")
    page.wait_for_selector("#found:not(.stale) .card")
    assert page.is_hidden("#problem")


@pytest.mark.parametrize("lost", ["vectors.bin", "text_model_quantized.onnx", "transformers.min.js"])
def test_a_file_that_the_host_lacks_is_said(browser, host, lost):
    page = browser.new_page()
    page.route(f"**/{lost}", lambda route: route.fulfill(status=404, body="gone"))
    page.goto(f"{host}made/web/")
    page.wait_for_selector("#problem:visible", timeout=30_000)
    assert page.inner_text("#what") == "The search could not be loaded"
    assert page.inner_text("#why")
    page.close()


PREPARED = [
    ((37, 91), Preprocess(size=(32, 32))),
    ((300, 20), Preprocess(size=(32, 32), resize_mode="longest", interpolation="bilinear", fill_color=77)),
    ((5, 7), Preprocess(size=(32, 32), interpolation="bilinear")),
    ((1, 1), Preprocess(size=(32, 32), resize_mode="squash")),
    ((3, 200), Preprocess(size=(24, 40))),
    ((640, 479), Preprocess(size=(48, 48), resize_mode="squash", interpolation="bilinear")),
    ((33, 32), Preprocess(size=(32, 32))),
    ((64, 64), Preprocess(size=(32, 78), resize_mode="squash")),
    ((90, 400), Preprocess(size=(48, 48), resize_mode="squash")),
    ((60, 33), Preprocess(size=(32, 32), resize_mode="longest")),
]


def test_pictures_are_prepared_as_in_training_to_the_bit(page):
    script = """async ([data, width, height, preprocess]) => {
      const {fitted, normalised} = await import("./pixels.js");
      const bytes = Uint8ClampedArray.from(atob(data), (one) => one.charCodeAt(0));
      const pixels = fitted({data: bytes, width, height}, preprocess);
      return [Array.from(pixels), Array.from(normalised(pixels, preprocess))];
    }"""
    for number, ((width, height), preprocess) in enumerate(PREPARED):
        noise = np.random.default_rng(number).integers(0, 2, (height, width, 3), np.uint8) * 255
        whole = np.dstack([noise, np.full((height, width), 255, np.uint8)])
        given = [base64.b64encode(whole.tobytes()).decode(), width, height, preprocess.to_open_clip()]
        pixels, values = page.evaluate(script, given)
        wanted = preprocess.pixels(Image.fromarray(noise))
        np.testing.assert_array_equal(np.array(pixels, np.uint8).reshape(wanted.shape), wanted, str(preprocess))
        np.testing.assert_allclose(
            np.array(values).reshape(3, *preprocess.size), preprocess(Image.fromarray(noise)), atol=1e-6
        )


def encoded(image, form, **more):
    out = io.BytesIO()
    image.save(out, form, **more)
    return out.getvalue()


def test_pictures_are_decoded_upright_and_on_white(page):
    colours = np.kron(np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8), np.ones((16, 16, 1), np.uint8))
    turned = Image.Exif()
    turned[274] = 6
    pictures = {
        "alpha": encoded(Image.fromarray(colours, "RGBA"), "PNG"),
        "palette": encoded(Image.fromarray(colours[..., :3]).quantize(16), "PNG"),
        "grey": encoded(Image.fromarray(colours[..., 0]), "PNG"),
        "turned": encoded(Image.fromarray(colours[..., :3]), "JPEG", exif=turned, quality=95, subsampling=0),
    }
    script = """async ([data, most]) => {
      const {decoded} = await import("./pixels.js");
      const found = await decoded(new Blob([Uint8Array.from(atob(data), (one) => one.charCodeAt(0))]), most);
      return [found.width, found.height, Array.from(found.data)];
    }"""
    for name, data in pictures.items():
        width, height, values = page.evaluate(script, [base64.b64encode(data).decode(), 10**6])
        wanted = np.array(decode(data, 10**6, name)).astype(int)
        found = np.array(values).reshape(height, width, 4)[..., :3]
        assert found.shape == wanted.shape, name
        assert np.abs(found - wanted).max() <= (1 if name != "turned" else 4), name
    with pytest.raises(Exception, match="80 x 48 pixels; at most 100 are read"):
        page.evaluate(script, [base64.b64encode(pictures["alpha"]).decode(), 100])


def test_the_export_itself_is_what_transformers_js_loads(made, page):
    """By its own classes, names of precisions, tokenizer and image processor, from the folder that holds the card."""
    student = made[0]
    script = """async (text) => {
      const {AutoTokenizer, AutoImageProcessor, CLIPTextModelWithProjection, env} =
        await import("./vendor/transformers.min.js");
      await import("./engine.js");
      env.localModelPath = "/";
      const tokens = (await AutoTokenizer.from_pretrained("made"))([text, "a"], {padding: true, truncation: true});
      const found = {size: (await AutoImageProcessor.from_pretrained("made")).size};
      for (const dtype of ["fp32", "q8"]) {
        const model = await CLIPTextModelWithProjection.from_pretrained("made", {dtype, device: "wasm"});
        found[dtype] = (await model(tokens)).text_embeds.tolist();
      }
      return found;
    }"""
    found, wanted = page.evaluate(script, "a red bicycle"), student.encode_texts(["a red bicycle", "a"])
    assert found["size"] == {"shortest_edge": 32}
    for dtype, bar in (("fp32", 0.99999), ("q8", 0.995)):
        assert (np.array(found[dtype]) * wanted).sum(axis=1).min() >= bar
    assert found["q8"] != found["fp32"]


@pytest.mark.parametrize(
    ("module", "was", "now", "message"),
    [
        (
            "pixels.js",
            "/ std[channel]",
            "/ std[channel] + 1.5",
            r"worst cosine image 0\.\d+ of 8 rows; at least 0\.995",
        ),
        (
            "engine.js",
            ".text_embeds.data",
            ".nothing.data",
            "transformers.js cannot load or run it: in Chromium: TypeErr",
        ),
    ],
)
def test_a_bundle_that_embeds_otherwise_is_refused(made, tmp_path, module, was, now, message):
    student, folder, _ = made
    shutil.copytree(folder / "web", tmp_path / "web")
    text = (folder / "web" / module).read_text()
    assert text.count(was) == 1
    (tmp_path / "web" / module).write_text(text.replace(was, now))
    probe = Probe.of(student, TEXTS, PICTURES)
    (reading,) = layouts.readings_of(("web",), ())
    with pytest.raises(ParityError, match=message):
        parity.measure(reading, tmp_path, probe, expected_rows(student, probe))


def test_a_gallery_that_is_not_whole_is_refused():
    rows = np.eye(3, 4, dtype=np.float32)
    with pytest.raises(DataError, match="2 different keys, 3 vectors"):
        Gallery("x", ("a", "b", "a"), rows)
    with pytest.raises(DataError, match="1 pictures"):
        Gallery("x", ("a", "b", "c"), rows, PICTURES[:1], 64)
    assert list(web.gallery_faults(("onnx",), None, 4)) == []
    assert "none are given" in next(web.gallery_faults(("web",), None, 4))
    assert "4 wide, and the student's 16" in next(web.gallery_faults(("web",), Gallery("x", ("a", "b", "c"), rows), 16))


def test_codes_are_the_nearest_of_255():
    rows = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    codes, scales = web.quantised(rows)
    assert np.abs(codes.astype(int)).max(axis=1).tolist() == [127] * 50
    assert (np.abs(codes * scales[:, None] - rows) <= scales[:, None] * 0.5001).all()


def test_thumbnails_beyond_their_bound_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "_THUMBNAIL_BYTES", 1000)
    rows = np.eye(30, dtype=np.float32)
    gallery = Gallery("x", tuple(pair.key for pair in PAIRS), rows, PICTURES, 32)
    with pytest.raises(DataError, match=r"of 30 thumbnails have 1\d\d\d bytes, and all may have 1000"):
        web._write_thumbnails(gallery, 10**6, tmp_path / "thumbs")


def test_more_pictures_than_a_browser_is_to_load_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(stage, "indexed_pairs", lambda workspace, data: PAIRS)
    config = SimpleNamespace(export=SimpleNamespace(layouts=("web",), web_vectors=29))
    with pytest.raises(ConfigError, match=r"30 pictures are indexed, and a bundle searches 29 at most .*index\.sets"):
        stage._searched(SimpleNamespace(config=config), None)
    config.export.web_vectors = 30
    assert stage._searched(SimpleNamespace(config=config), None) == PAIRS


def test_without_a_browser_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts.web, "browser", lambda: None)
    student = little.student("test_vit")
    gallery = Gallery("x", ("a",), np.eye(1, 16, dtype=np.float32))
    with pytest.raises(MissingExtraError, match=r"Chromium is not installed.*CLIPDISTILL_BROWSER.*leave web out"):
        export(student, tmp_path / "made", ("web",), probe=Probe.of(student, ["a"], PICTURES[:1]), gallery=gallery)
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_than_the_pinned_ones_are_refused_with_both_digests(tmp_path):
    for one in web_vendor.packages():
        (tmp_path / one.tarball).write_bytes(b"not the tarball")
    with pytest.raises(MismatchError, match=r"integrity does not match: expected sha512-5\+voSeUC.*found sha512-"):
        web_vendor.vendored(tmp_path)


def test_missing_tarballs_are_named_with_the_command(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"export\.web_vendor: .*transformers-4\.3\.1\.tgz: not there.*npm pack"):
        web_vendor.vendored(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"Npm is not there either.*run: npm pack .*onnxruntime-web@1\.31"):
        web_vendor.vendored()
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho npm error network is down >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(MissingExtraError, match="Npm could not fetch it: npm error network is down"):
        web_vendor.vendored()
    npm.write_text(
        '#!/bin/sh\nfor folder in "$@"; do [ -d "$folder" ] && break; done\n'
        ': > "$folder/huggingface-transformers-4.3.1.tgz"\n'
    )
    with pytest.raises(MismatchError, match="integrity"):
        web_vendor.vendored()
    assert not list((tmp_path / "clipdistill/npm").glob("*.tgz"))
    assert web_vendor.main(["5"]) == 1
