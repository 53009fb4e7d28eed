"""The endpoints, held against the searcher itself."""

import base64
import io
import json

import numpy as np
import pytest
from fastapi.testclient import TestClient
from little_service import COLOURS, ColourEncoder, gallery, picture, searcher
from PIL import Image

from clipdistill.core.errors import ConfigError
from clipdistill.data.records import Picture
from clipdistill.serve.app import create_app
from clipdistill.serve.options import Options
from clipdistill.serve.thumbnails import PictureFolder, PictureTable, Thumbnails


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = gallery(tmp_path_factory.mktemp("shop") / "goods")
    return folder, searcher(folder, ColourEncoder()), searcher(folder, ColourEncoder(turn=0.8))


@pytest.fixture(scope="module")
def client(shop):
    folder, main, other = shop
    app = create_app(
        main,
        compared=("teacher", other),
        pictures=PictureFolder(folder),
        count_tokens=lambda texts: sum(len(text.split()) for text in texts),
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def shown(hits):
    return [{"rank": h.rank, "key": h.key, "score": h.score, "item": f"/items/{h.key}"} for h in hits]


def test_a_text_finds_what_the_searcher_finds(client, shop):
    body = client.post("/search", json={"text": "a red thing", "k": 5}).json()
    assert body["hits"] == shown(shop[1].by_text("a red thing", 5))
    assert (body["model"], body["compared"]) == ("student", None)
    assert all(hit["key"].startswith("goods/red/") for hit in body["hits"][:3])
    assert body["latency_ms"]["encode"] > 0
    assert body["latency_ms"]["search"] > 0
    assert len(client.post("/search", json={"text": "red"}).json()["hits"]) == 10
    assert len(client.post("/search", json={"text": "red", "k": 1000}).json()["hits"]) == 32


def test_a_picture_finds_what_the_searcher_finds_and_itself_first(client, shop):
    data = picture(COLOURS["blue"], 2)
    found = client.post("/search?k=3", content=data, headers={"Content-Type": "image/png"}).json()
    assert found["hits"] == shown(shop[1].by_picture(Picture("x", data=data), 3))
    assert found["hits"][0]["key"] == "goods/blue/2.png"


@pytest.mark.parametrize("by", ["text", "picture"])
def test_the_other_model_answers_beside(client, shop, by):
    data = picture(COLOURS["green"], 1)
    if by == "text":
        body = client.post("/search", json={"text": "green", "k": 4, "compare": True}).json()
        wanted = shop[2].by_text("green", 4)
    else:
        kind = {"Content-Type": "image/png"}
        body = client.post("/search?k=4&compare=true", content=data, headers=kind).json()
        wanted = shop[2].by_picture(Picture("x", data=data), 4)
    assert body["compared"]["model"] == "teacher"
    assert body["compared"]["hits"] == shown(wanted)
    assert body["compared"]["hits"] != body["hits"]


def vectors(body):
    return np.array([row["embedding"] for row in body["data"]], np.float32)


def test_embeddings_of_texts_are_the_encoders_own(client, shop):
    texts = ["a red thing", "two blue things"]
    body = client.post("/v1/embeddings", json={"input": texts, "model": "student", "user": "u"}).json()
    np.testing.assert_array_equal(vectors(body), shop[1].encoder.encode_texts(texts))
    assert [row["index"] for row in body["data"]] == [0, 1]
    assert (body["object"], body["model"]) == ("list", "student")
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    one = client.post("/v1/embeddings", json={"input": "a red thing", "encoding_format": "base64"}).json()
    packed = np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(packed, vectors(body)[0])
    other = client.post("/v1/embeddings", json={"input": texts, "model": "teacher"}).json()
    np.testing.assert_array_equal(vectors(other), shop[2].encoder.encode_texts(texts))


def test_embeddings_of_texts_and_pictures_keep_their_order(client, shop):
    red, blue = picture(COLOURS["red"]), picture(COLOURS["blue"], form="JPEG")
    packed = [base64.b64encode(data).decode() for data in (red, blue)]
    mixed = ["one", {"image": packed[0]}, {"text": "two"}, f"data:image/jpeg;base64,{packed[1]}"]
    encoder = shop[1].encoder
    got = vectors(client.post("/v1/embeddings", json={"input": mixed}).json())
    np.testing.assert_array_equal(got[[0, 2]], encoder.encode_texts(["one", "two"]))
    np.testing.assert_array_equal(got[[1, 3]], encoder.encode_images([Picture("", data=d) for d in (red, blue)]))
    alone = client.post("/v1/embeddings", json={"input": {"image": f"data:image/png;base64,{packed[0]}"}}).json()
    np.testing.assert_array_equal(vectors(alone)[0], got[1])
    assert alone["usage"]["total_tokens"] == 0


def test_the_models_and_what_is_served_are_listed(client):
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["student", "teacher"]
    info = client.get("/info").json()
    main, other = info["models"]
    assert other == {"name": "teacher", "dim": 8, "vectors": 32, "pictures": True}
    variants = [{"name": "8-Flat", "dim": 8, "factory": "Flat", "index_megabytes": 0.001069, "model_megabytes": None}]
    assert [
        {name: value for name, value in each.items() if name != "bytes_per_vector"} for each in main["variants"]
    ] == variants
    assert main["variants"][0]["bytes_per_vector"] == round(32 + 45 / 32, 1)  # a vector, and its share of the header
    assert main["variant"] == "8-Flat"
    assert info["thumbnails"] is True
    assert client.get("/healthz").json() == {"status": "ok"}


def test_thumbnails_are_small_jpegs_of_indexed_pictures(client):
    answer = client.get("/items/goods/red/1.png")
    assert answer.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("JPEG", (48, 40))
        assert np.abs(np.asarray(image)[0, 0].astype(int) - COLOURS["red"]).max() < 12


def test_openapi_describes_every_endpoint_and_its_references_resolve(client):
    text = client.get("/openapi.json").text
    found = json.loads(text)
    assert set(found["paths"]) == {
        "/search", "/v1/embeddings", "/v1/models", "/items/{key}", "/info", "/healthz", "/metrics",
    }  # fmt: skip
    content = found["paths"]["/search"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["properties"]["k"]["maximum"] == 1000
    assert "image/*" in content
    for part in text.split('"$ref":"')[1:]:
        name = part.partition('"')[0].removeprefix("#/components/schemas/")
        assert name in found["components"]["schemas"]


def test_metrics_count_answers_and_batches_and_no_stranger_adds_series(client):
    client.post("/search", json={"text": "a secret query"})
    client.get("/no/such/route/4711")
    client.request("BREW", "/search")
    text = client.get("/metrics").text
    assert 'clipdistill_requests_total{method="POST",route="/search",status="200"}' in text
    assert 'route="unmatched",status="404"' in text
    assert 'method="other"' in text
    assert 'clipdistill_index_vectors{model="teacher"} 32.0' in text
    assert 'clipdistill_batch_items_count{model="student",tower="text"}' in text
    assert not any(word in text for word in ("secret", "4711", "BREW", "goods"))


def test_every_answer_carries_the_security_headers(client):
    for answer in (client.get("/"), client.get("/nothing"), client.post("/search", json={"text": "red"})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_needs_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    addresses = [part.split("'")[0] for part in answer.text.split("http")[1:]]
    assert addresses == ["://www.w3.org/2000/svg"]  # the name of SVG, which is not fetched


def test_a_host_that_is_not_ours_is_refused(shop):
    options = Options(hosts=("localhost", "::1"))
    with TestClient(create_app(shop[1], options), base_url="http://localhost:81") as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz", headers={"Host": "[::1]:81"}).status_code == 200
        refused = client.get("/healthz", headers={"Host": "evil.example"})
        assert (refused.status_code, refused.headers["content-type"]) == (421, "application/problem+json")


def test_both_models_need_names_and_bounds_must_make_sense(shop):
    with pytest.raises(ConfigError, match="both models are called 'student'"):
        create_app(shop[1], compared=("student", shop[2]))
    with pytest.raises(ConfigError) as fault:
        Options(batch=0, window_ms=-1, waiting=3)
    assert [text.split(":")[0] for text in fault.value.faults] == ["serve.batch", "serve.window_ms", "serve.waiting"]


def test_a_folder_gives_out_nothing_from_outside(tmp_path):
    (tmp_path / "goods/in").mkdir(parents=True)
    data = picture(COLOURS["red"])
    for name in ("secret.png", "goods/in/a.png", "goods/B.JPG", "goods/in/trap.png.txt"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "goods/out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "goods/up").symlink_to(tmp_path)
    (tmp_path / "goods/same.png").symlink_to(tmp_path / "goods/in/a.png")
    (tmp_path / "goods/loop.png").symlink_to(tmp_path / "goods/loop.png")
    folder = PictureFolder(tmp_path / "goods")
    for key in ("in/a.png", "in/a", "goods/in/a.png", "goods/in/a", "B", "same", "in/../in/a.png"):
        assert folder.find(key).read() == data, key
    outside = ["../secret.png", "../secret", "out.png", "out", "up/secret.png", str(tmp_path / "secret.png"), "loop"]
    for key in [*outside, "", "in", "a\0b", "x" * 5000, "goods", "goods/", "goods/../../secret.png"]:
        assert folder.find(key) is None, key
    with pytest.raises(ConfigError, match="not a folder"):
        PictureFolder(tmp_path / "nothing")


def test_thumbnails_are_bounded_in_size_and_kept_in_bounded_memory():
    table = PictureTable(
        {name: Picture(name, data=picture(COLOURS["red"], n, (900, 300))) for n, name in enumerate("abc")}
    )
    made = Thumbnails(table, side=64, pixels=10**6, cache_bytes=1)
    first = made.jpeg("a")
    with Image.open(io.BytesIO(first)) as image:
        assert image.size == (64, 21)
    assert made._kept == {}
    size = len(first)
    made = Thumbnails(table, side=64, pixels=10**6, cache_bytes=2 * size + 40)
    for key in "abac":
        made.jpeg(key)
    assert list(made._kept) == ["a", "c"]
    assert made._size == sum(map(len, made._kept.values()))
    assert made.jpeg("d") is None
