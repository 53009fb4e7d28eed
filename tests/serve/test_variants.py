"""Several ways to search the same pictures: which one answers, and what cannot be one."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fastapi.testclient import TestClient
from little_service import COLOURS, ColourEncoder, gallery, picture, searcher
from runtime import tiny_export

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.runtime.alone import OneByOne
from clipdistill.search import Searcher
from clipdistill.serve.app import create_app
from clipdistill.serve.encoders import Leading
from clipdistill.serve.options import Options
from clipdistill.serve.variants import Variant
from clipdistill.stages.serve import Served, build_app

PNG = {"Content-Type": "image/png"}


def variant(searcher, factory="Flat", dim=None):
    """The same pictures in another index, or cut."""
    encoder, index = searcher.encoder, searcher.index
    rows = index.vectors()
    if dim is not None:
        encoder = Leading(encoder, dim)
        rows = rows[:, :dim] / np.linalg.norm(rows[:, :dim], axis=1, keepdims=True)
    built = VectorIndex.build(rows, index.ids, factory=factory, encoder=encoder.fingerprint)
    return Variant(Searcher(encoder, built), model_bytes=2_345_678)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = gallery(tmp_path_factory.mktemp("shop") / "goods")
    main = searcher(folder, ColourEncoder())
    ways = {
        "8-Flat": Variant(main),
        "8-SQ8": variant(main, "SQ8"),
        "4-Flat": variant(main, dim=4),
        "8-Flat-2": Variant(searcher(folder, ColourEncoder(turn=0.5))),
    }
    first, *more = ways.values()
    app = create_app(first, variants=more, compared=("teacher", searcher(folder, ColourEncoder(turn=0.8))))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, ways


def pairs(body):
    return [(hit["key"], hit["score"]) for hit in body["hits"]]


@pytest.mark.parametrize("name", ["8-Flat", "8-SQ8", "4-Flat", "8-Flat-2", None])
def test_the_variant_that_is_named_answers(shop, name):
    client, ways = shop
    own = ways[name or "8-Flat"].searcher
    asked = {} if name is None else {"variant": name}
    body = client.post("/search", json={"text": "a red thing", "k": 7, **asked}).json()
    assert pairs(body) == [(hit.key, hit.score) for hit in own.by_text("a red thing", 7)]
    assert (body["model"], body["variant"], body["compared"]) == ("student", name or "8-Flat", None)
    data = picture(COLOURS["blue"], 2)
    body = client.post("/search", params={"k": 5, **asked}, content=data, headers=PNG).json()
    assert pairs(body) == [(hit.key, hit.score) for hit in own.by_picture(Picture("x", data=data), 5)]
    assert (
        client.post("/search", json={"text": "red", "compare": True, **asked}).json()["compared"]["model"] == "teacher"
    )


def test_they_are_listed_from_the_smallest_index_to_the_largest(shop):
    client, ways = shop
    main, other = client.get("/info").json()["models"]
    assert main["variant"] == "8-Flat" and "variants" not in other
    listed = {each["name"]: each for each in main["variants"]}
    assert set(listed) == set(ways)
    sizes = [each["bytes_per_vector"] for each in main["variants"]]
    assert sizes == sorted(sizes)
    for name, each in listed.items():
        index = ways[name].searcher.index
        assert (each["dim"], each["factory"]) == (index.dim, index.factory)
        assert each["bytes_per_vector"] == round(index.bytes_per_vector, 1)
        assert each["index_megabytes"] == round(index.bytes_per_vector * 32 / 1e6, 6)
        assert each["model_megabytes"] == (2.346 if name in ("8-SQ8", "4-Flat") else None)
    body = client.get("/openapi.json").json()["paths"]["/search"]["post"]
    assert {each["name"] for each in body["parameters"]} == {"k", "compare", "variant"}
    assert "variant" in body["requestBody"]["content"]["application/json"]["schema"]["properties"]
    series = client.get("/metrics").text
    assert 'clipdistill_index_vectors{model="student"} 32.0' in series
    assert 'clipdistill_index_vectors{model="student 8-SQ8"} 32.0' in series


BAD = [
    "64-Flat",
    "",
    "8-flat",
    "8-Flat\0",
    "../8-Flat",
    "x" * 100_000,
    "\ud800",
    5,
    ["8-Flat"],
    {"name": "8-Flat"},
    True,
]


@pytest.mark.parametrize("given", BAD, ids=lambda value: str(value)[:12].encode("ascii", "replace").decode())
def test_an_unknown_variant_is_refused_by_every_door(shop, given):
    client, _ = shop
    data = json.dumps({"text": "red", "variant": given})
    answers = [client.post("/search", content=data, headers={"Content-Type": "application/json"})]
    if isinstance(given, str) and given.isascii():
        query = {"variant": given[:5000]}
        answers.append(client.post("/search", params=query, content=picture(COLOURS["red"]), headers=PNG))
    for answer in answers:
        assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json"), answer.text
        assert "variant: " in answer.json()["detail"]
        assert len(answer.text) < 600
    if given == "8-flat":
        assert "did you mean '8-Flat'?" in answers[0].json()["detail"]


def test_embeddings_have_the_width_that_is_asked_for(shop):
    client, ways = shop
    for dim, name in ((8, "8-Flat"), (4, "4-Flat"), (None, "8-Flat")):
        body = client.post("/v1/embeddings", json={"input": "a red thing", "dimensions": dim}).json()
        row = np.array(body["data"][0]["embedding"], np.float32)
        np.testing.assert_array_equal(row, ways[name].searcher.encoder.encode_texts(["a red thing"])[0])
    refused = client.post("/v1/embeddings", json={"input": "red", "dimensions": 5})
    assert (refused.status_code, refused.json()["detail"]) == (422, "dimensions: student has 8 or 4, not 5")
    other = client.post("/v1/embeddings", json={"input": "red", "dimensions": 4, "model": "teacher"})
    assert other.json()["detail"] == "dimensions: teacher has 8, not 4"


def test_the_leading_entries_are_made_unit_again():
    encoder = ColourEncoder()
    cut = Leading(encoder, 3)
    whole = encoder.encode_texts(["red", "two blue things"]).astype(np.float64)[:, :3]
    wanted = whole / np.sqrt((whole**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(cut.encode_texts(["red", "two blue things"]), wanted, atol=1e-6)
    pictures = [Picture("x", data=picture(COLOURS["red"]))]
    assert cut.encode_images(pictures).shape == (1, 3)
    assert cut.fingerprint != encoder.fingerprint
    for dim in (0, 8, 9, -1):
        with pytest.raises(ConfigError, match=f"--dim {dim}: must be from 1 to 7"):
            Leading(encoder, dim)


def test_variants_of_other_pictures_and_too_many_are_refused(tmp_path):
    main = searcher(gallery(tmp_path / "goods", each=2), ColourEncoder())
    fewer = VectorIndex.build(main.index.vectors()[:5], main.index.ids[:5], encoder=main.encoder.fingerprint)
    with pytest.raises(ConfigError, match=r"indexes other pictures than the first \(5 rows, 16 there\)"):
        create_app(main, variants=[Variant(Searcher(main.encoder, fewer))])
    with pytest.raises(ConfigError, match="17 variants are too many; at most 16"):
        create_app(main, variants=[Variant(main)] * 16)


def test_a_text_tower_alone_refuses_pictures_in_words(tmp_path):
    folder = gallery(tmp_path / "goods", each=2)
    main, other = searcher(folder, ColourEncoder()), searcher(folder, ColourEncoder(turn=0.8))
    data = picture(COLOURS["red"])
    with TestClient(create_app(main, compared=("teacher", other), texts_alone=["student"])) as client:
        assert [model["pictures"] for model in client.get("/info").json()["models"]] == [False, True]
        for answer in (
            client.post("/search", content=data, headers=PNG),
            client.post("/v1/embeddings", json={"input": ["red", {"image": "iVBORw0KGgo="}]}),
        ):
            assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
            assert answer.json()["detail"].startswith("student takes words alone")
        assert client.post("/search", json={"text": "red", "compare": True}).json()["compared"]["hits"]
    with TestClient(create_app(main, compared=("teacher", other), texts_alone=["teacher"])) as client:
        body = client.post("/search?compare=true", content=data, headers=PNG).json()
        assert body["hits"] and body["compared"] is None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two exports of the same pictures, with indexes of several sizes, and one with a text tower alone."""
    folder = tmp_path_factory.mktemp("variants")
    pictures, keys = tiny_export.pictures(12), [f"{number}.png" for number in range(12)]
    for name, encoder in (("small", tiny_export.ENCODER), ("smaller", "d" * 64)):
        tiny_export.write(folder / name, encoder=encoder)
        rows = RuntimeEncoder.load(folder / name, threads=1).encode_images(pictures)
        for factory in ("Flat", "SQ8"):
            VectorIndex.build(rows, keys, factory=factory, encoder=encoder).save(folder / f"{name}-{factory}")
    tiny_export.write(folder / "words", pictures=False)
    VectorIndex.build(rows, keys, encoder=tiny_export.TEACHER).save(folder / "words-Flat")
    return folder


def served(made, **more):
    return replace(Served(made / "small", made / "small-Flat", threads=1), **more)


def test_indexes_widths_and_exports_are_served_from_their_folders(made):
    given = served(
        made, indexes=(made / "small-SQ8",), dims=(4,), variants=(f"{made / 'smaller'}={made / 'smaller-SQ8'}",)
    )
    whole = RuntimeEncoder.load(made / "small", threads=1)
    with TestClient(build_app(given, Options())) as client:
        main = client.get("/info").json()["models"][0]
        size = sum(path.stat().st_size for path in (made / "small/onnx").iterdir())
        assert {each["name"] for each in main["variants"]} == {"6-Flat", "6-SQ8", "6-SQ8-2", "4-Flat"}
        assert {each["model_megabytes"] for each in main["variants"]} == {round(size / 1e6, 3)}
        own = {
            "6-SQ8": Searcher(whole, VectorIndex.load(made / "small-SQ8", encoder=whole.fingerprint)),
            "4-Flat": variant(
                Searcher(whole, VectorIndex.load(made / "small-Flat", encoder=whole.fingerprint)), dim=4
            ).searcher,
            "6-SQ8-2": Searcher(
                RuntimeEncoder.load(made / "smaller", threads=1),
                VectorIndex.load(made / "smaller-SQ8", encoder="d" * 64),
            ),
        }
        for name, searcher in own.items():
            body = client.post("/search", json={"text": tiny_export.TEXTS[4], "k": 12, "variant": name}).json()
            assert pairs(body) == [(hit.key, hit.score) for hit in searcher.by_text(tiny_export.TEXTS[4], 12)]


def test_what_cannot_be_a_variant_is_refused_before_it_is_served(made):
    cases = [
        ({"dims": (6,)}, ConfigError, "--dim 6: must be from 1 to 5"),
        ({"index": made / "small-SQ8", "dims": (4,)}, DataError, "keeps its vectors compressed"),
        ({"indexes": (made / "smaller-Flat",)}, MismatchError, "encoder does not match"),
        ({"variants": (str(made / "smaller"),)}, ConfigError, "smaller holds none"),
        ({"variants": (f"{made / 'nothing'}={made / 'smaller-Flat'}",)}, ConfigError, "nothing: not a folder"),
        ({"variants": (f"{made / 'words'}={made / 'words-Flat'}",)}, ConfigError, "has a text tower alone"),
        ({"teacher_index": made / "small-Flat"}, ConfigError, "--teacher-index: give --teacher too"),
        ({"teacher": made, "compare": made / "smaller"}, ConfigError, "give one of the two"),
        ({"teacher": made}, ConfigError, "no run's folder"),
    ]
    for changes, kind, words in cases:
        with pytest.raises(kind, match=words):
            build_app(served(made, **changes), Options())


def test_an_export_of_a_text_tower_alone_says_so(made):
    with TestClient(build_app(served(made, export=made / "words", index=made / "words-Flat"), Options())) as client:
        assert client.get("/info").json()["models"][0]["pictures"] is False
        assert client.post("/search", content=picture(COLOURS["red"]), headers=PNG).status_code == 422
        assert len(client.post("/search", json={"text": "a red cat", "k": 3}).json()["hits"]) == 3


def test_int8_goes_one_by_one_in_every_variant(made):
    class Counted:
        dim, fingerprint, seen = 8, "f", []

        def encode_texts(self, texts, batch=256):
            self.seen.append(batch)
            return np.eye(8, dtype=np.float32)[: len(texts)]

    encoder = Counted()
    Leading(OneByOne(encoder), 4).encode_texts(["a", "b"])
    assert encoder.seen == [1]
