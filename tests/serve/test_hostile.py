"""What nobody should send: always a 4xx with a problem, never a 5xx, never a word of the server's inside."""

import base64
import io
import json
import struct
import zlib

import pytest
from fastapi.testclient import TestClient
from little_service import COLOURS, ColourEncoder, gallery, picture, searcher
from PIL import Image

from clipdistill.serve.app import create_app
from clipdistill.serve.options import Options
from clipdistill.serve.thumbnails import PictureFolder

JSON = {"Content-Type": "application/json"}
PNG = {"Content-Type": "image/png"}
OPTIONS = Options(body_bytes=3_000_000, pixels=100_000, inputs=20, buffered_bytes=4_000_000)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = gallery(tmp_path_factory.mktemp("shop") / "goods", each=2)
    return folder, searcher(folder, ColourEncoder())


@pytest.fixture(scope="module")
def client(shop):
    app = create_app(shop[1], OPTIONS, pictures=PictureFolder(shop[0]))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def refused(answer, status, words=""):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["status"] == status
    assert words in body["detail"]
    assert "Traceback" not in answer.text
    assert "clipdistill/" not in answer.text
    assert len(answer.text) < 1000


def bomb(width, height):
    """A PNG of a few bytes whose header claims so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def gif_with_broken_pixels():
    out = io.BytesIO()
    Image.new("L", (20, 20)).save(out, "JPEG")
    return out.getvalue()[:-60]


NOT_PICTURES = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am a picture", "not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    "pdf": (b"%PDF-1.7", "not a picture"),
    "cut": (picture(COLOURS["red"])[:60], ""),
    "cut jpeg": (gif_with_broken_pixels(), "truncated"),
    "bomb": (bomb(60_000, 60_000), "too many pixels"),
    "claims": (bomb(300, 300), ""),
    "webp bomb": (
        b"RIFF" + (22).to_bytes(4, "little") + b"WEBPVP8X" + b"\x0a\0\0\0" + b"\0" * 4 + b"\xff" * 6,
        "too many",
    ),
    "head alone": (b"\x89PNG\r\n\x1a\n", "picture"),
    "tiff": (b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 400, ""),
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_what_is_no_picture_is_refused_by_every_door(client, name):
    data, words = NOT_PICTURES[name]
    refused(client.post("/search", content=data, headers=PNG), 422, words)
    packed = base64.b64encode(data).decode()
    refused(client.post("/v1/embeddings", json={"input": [{"image": packed}]}), 422, words)


BAD_SEARCHES = {
    "k 0": ({"text": "red", "k": 0}, "k: "),
    "k -1": ({"text": "red", "k": -1}, "k: "),
    "k 10^9": ({"text": "red", "k": 10**9}, "1000"),
    "k 10^400": ({"text": "red", "k": 10**400}, "k: "),
    "k text": ({"text": "red", "k": "5"}, "k: "),
    "k float": ({"text": "red", "k": 5.5}, "k: "),
    "k null": ({"text": "red", "k": None}, "k: "),
    "k true": ({"text": "red", "k": True}, "k: "),
    "empty": ({"text": ""}, "empty"),
    "blank": ({"text": " \n\t "}, "empty"),
    "1 MB": ({"text": "x" * 1_000_000}, "1000000 characters; at most 4096"),
    "no text": ({"k": 4}, "text: "),
    "text list": ({"text": ["red"]}, "text: "),
    "text null": ({"text": None}, "text: "),
    "unknown": ({"text": "red", "top_k": 4}, "top_k: "),
    "surrogate key": ({"text": "red", "\ud800": 4}, ""),
    "long key": ({"text": "red", "y" * 100_000: 4}, ""),
    "many keys": ({"text": "red"} | {f"z{n}": n for n in range(5000)}, ""),
}


@pytest.mark.parametrize("name", BAD_SEARCHES)
def test_a_search_out_of_bounds_is_refused(client, name):
    body, words = BAD_SEARCHES[name]
    data = json.dumps(body)  # with escapes: the client's own encoder refuses what an attacker sends
    refused(client.post("/search", content=data, headers=JSON), 422, words)


@pytest.mark.parametrize(
    "query", ["k=0", "k=1001", "k=1000000000", "k=x", "k=", "k=" + "9" * 5000, "top=4", "compare=7"]
)
def test_a_picture_search_out_of_bounds_is_refused(client, query):
    refused(client.post(f"/search?{query}", content=picture(COLOURS["red"]), headers=PNG), 422)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "line 1"),
        (b"\xff\xfe\x00\xd8", "not valid JSON"),
        (b'{"text": "red", "k": ' + b"9" * 6000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "object"),
        (b'"red"', "object"),
        (b"NaN", "object"),
    ],
)
@pytest.mark.parametrize("route", ["/search", "/v1/embeddings"])
def test_what_is_no_json_object_is_refused(client, route, data, words):
    refused(client.post(route, content=data, headers=JSON), 400, words)


def test_half_a_surrogate_pair_is_no_text(client):
    body = b'{"text": "red \\ud83d"}'
    refused(client.post("/search", content=body, headers=JSON), 422, "not valid Unicode")


BAD_INPUTS = {
    "nothing": ({}, "input: "),
    "empty list": ({"input": []}, "0 items"),
    "too many": ({"input": ["x"] * 21}, "21 items; from 1 to 20"),
    "millions": ({"input": [1] * 900_000}, "900000 items"),
    "tokens": ({"input": [[1, 2, 3]]}, "input: must be a text"),
    "number": ({"input": 4}, "input: must be a text"),
    "null": ({"input": None}, "input: must be a text"),
    "empty text": ({"input": ["red", ""]}, "input[1]: the text is empty"),
    "long text": ({"input": "x" * 5000}, "input[0]: the text has 5000 characters"),
    "both": ({"input": {"text": "a", "image": "b"}}, "input: must be a text"),
    "broken base64": ({"input": {"image": "%%%"}}, "input[0]: not valid base64"),
    "bad padding": ({"input": {"image": "abcde"}}, "not valid base64"),
    "not ascii": ({"input": {"image": "äöü"}}, "not valid base64"),
    "empty image": ({"input": {"image": ""}}, "the picture is empty"),
    "address": ({"input": {"image": "http://127.0.0.1:22/x.png"}}, "addresses are not fetched"),
    "file": ({"input": {"image": "file:///etc/passwd"}}, "addresses are not fetched"),
    "data of text": ({"input": {"image": "data:text/html;base64,AAAA"}}, "data:image"),
    "broken data": ({"input": "data:image/png;base64,%%%"}, "not valid base64"),
    "format": ({"input": "red", "encoding_format": "hex"}, "encoding_format"),
    "dimensions": ({"input": "red", "dimensions": 4}, "student has 8, not 4"),
    "unknown": ({"input": "red", "batch": 4}, "batch: "),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_cannot_be_embedded_are_refused(client, name):
    body, words = BAD_INPUTS[name]
    refused(client.post("/v1/embeddings", json=body), 422, words)


def test_an_unknown_model_is_refused_with_the_nearest(client):
    refused(client.post("/v1/embeddings", json={"input": "red", "model": "studnet"}), 404, "did you mean 'student'?")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "imagepng"]
)
def test_other_media_types_are_refused(client, kind):
    refused(client.post("/search", content=b'{"text": "red"}', headers={"Content-Type": kind}), 415, "application/json")
    refused(client.post("/v1/embeddings", content=b"{}", headers={"Content-Type": kind}), 415)


def test_bodies_over_the_cap_are_refused_with_and_without_a_length(client):
    large = b" " * (OPTIONS.body_bytes + 1)
    refused(client.post("/search", content=large, headers=JSON), 413, "larger than the 3000000 bytes")
    refused(client.post("/search", content=iter([large[:1_600_000]] * 2), headers=PNG), 413)
    refused(client.post("/search", content=iter([large] * 30), headers=PNG), 413)
    refused(client.post("/search", content=b"", headers={**PNG, "Content-Length": "9" * 15}), 413)
    just = b'{"text": "red"}' + b" " * (OPTIONS.body_bytes - 15)
    assert client.post("/search", content=just, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/search", 405),
        ("PUT", "/search", 405),
        ("DELETE", "/items/goods/red/0.png", 405),
        ("POST", "/", 405),
        ("BREW", "/search", 405),
        ("POST", "/search/", 404),
        ("GET", "/docs", 404),
        ("GET", "/items/", 404),
        ("GET", "/items/goods/red/9.png", 404),
        ("GET", "/items/red/0.png", 404),  # a file that is there, under a name that is no key
        ("GET", "/items/../../../etc/passwd", 404),
        ("GET", "/items/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/items//etc/passwd", 404),
        ("GET", "/items/a%00b", 404),
        ("GET", "/items/%ff%fe", 404),
        ("GET", "/items/" + "x" * 5000, 404),
    ],
)
def test_unknown_routes_methods_and_items_are_refused(client, method, path, status):
    refused(client.request(method, path), status)


def test_an_indexed_picture_that_is_gone_or_broken_is_refused(tmp_path):
    folder = gallery(tmp_path / "goods", each=1)
    made = searcher(folder, ColourEncoder())
    (folder / "red/0.png").unlink()
    (folder / "blue/0.png").write_bytes(b"no longer a picture")
    (folder / "green/0.png").unlink()
    (folder / "green/0.png").symlink_to(__file__)
    with TestClient(create_app(made, pictures=PictureFolder(folder)), raise_server_exceptions=False) as client:
        refused(client.get("/items/goods/red/0.png"), 404)
        refused(client.get("/items/goods/green/0.png"), 404)
        refused(client.get("/items/goods/blue/0.png"), 422, "not a picture")
    with TestClient(create_app(made), raise_server_exceptions=False) as client:
        refused(client.get("/items/goods/grey/0.png"), 404)
        assert client.post("/search", json={"text": "red", "k": 1}).json()["hits"][0]["item"] is None


def test_a_fault_of_ours_is_a_problem_that_tells_nothing(tmp_path, caplog):
    folder = gallery(tmp_path / "goods", each=1)
    made = searcher(folder, ColourEncoder())

    def fails(texts, batch=256):
        raise RuntimeError("/secret/path is broken")

    made.encoder.encode_texts = fails
    with TestClient(create_app(made), raise_server_exceptions=False) as client:
        answer = client.post("/search", json={"text": "red"})
        assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "secret" not in answer.text
        assert "/secret/path is broken" in caplog.text
        assert client.post("/search", content=picture(COLOURS["red"]), headers=PNG).status_code == 200
        assert 'route="/search",status="500"' in client.get("/metrics").text
