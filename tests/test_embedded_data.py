"""The data set in data/: whole, as its README says, and split as SHA-256 says."""

import hashlib
import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
COUNTS = {"train": 4071, "val": 518, "test": 534, "unseen": 1350}
LICENCES = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent-flat": "MIT", "fluent-3d": "MIT"}


def rows(split, columns=("key", "captions", "concept", "style", "licence")):
    return pq.read_table(DATA / "emoji" / f"{split}.parquet", columns=list(columns)).to_pylist()


@pytest.fixture(scope="module")
def emoji():
    return {split: rows(split) for split in COUNTS}


def share(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") / 2**256


def test_every_data_file_has_the_listed_checksum_and_is_listed():
    lines = (DATA / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    assert len(listed) == len(lines)
    for name, digest in listed.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name
    found = {path for path in DATA.rglob("*") if path.is_file() and path.suffix not in {".md", ".py", ".pyc", ".toml"}}
    assert {path.relative_to(DATA).as_posix() for path in found} - {"SHA256SUMS"} == set(listed)


def test_the_folder_stays_small():
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert size < 30e6


@pytest.mark.parametrize("split", COUNTS)
def test_counts_and_order(emoji, split):
    keys = [row["key"] for row in emoji[split]]
    assert len(keys) == COUNTS[split]
    assert keys == sorted(set(keys))


def test_readme_states_the_counts():
    table = (DATA / "README.md").read_text(encoding="utf-8")
    for split, count in COUNTS.items():
        assert re.search(rf"\| `{split}` +\| +{count:,} +\|", table), split


def test_the_splits_follow_from_sha256_alone(emoji):
    for split, found in emoji.items():
        for row in found:
            place = share(row["key"])
            known = "train" if place < 0.8 else "val" if place < 0.9 else "test"
            assert split == ("unseen" if share(row["concept"]) < 0.2 else known), row["key"]


def test_no_unseen_concept_or_caption_is_in_another_split(emoji):
    def gather(splits, what):
        return {value for split in splits for row in emoji[split] for value in what(row)}

    for what in (lambda row: [row["concept"]], lambda row: row["captions"]):
        unseen, known = gather(["unseen"], what), gather(["train", "val", "test"], what)
        assert unseen
        assert not unseen & known


def test_rows_hold_what_the_readme_says(emoji):
    for row in (row for found in emoji.values() for row in found):
        assert row["key"] == f"{row['style']}/{row['concept']}"
        assert row["licence"] == LICENCES[row["style"]]
        label, *rest = row["captions"]
        assert label
        assert all(caption.startswith(f"{label}, ") for caption in rest)
        assert len(rest) <= 1
        assert not re.search(r"1f3f[b-f]|1f1[e-f][0-9a-f]-", row["concept"]), "a skin tone or a flag"


def test_the_captions_of_a_known_emoji(emoji):
    found = {row["key"]: row for part in emoji.values() for row in part}
    assert found["noto/1f913"]["captions"] == [
        "nerd face",
        "nerd face, brainy, clever, expert, face, geek, gifted, glasses, intelligent, nerd, smart",
    ]
    assert "twemoji/2764" in found, "the presentation selector is dropped"


@pytest.mark.parametrize("split", COUNTS)
def test_pictures_decode_at_96_pixels_on_white(split):
    for row in rows(split, ["key", "image"])[::5]:
        picture = Image.open(io.BytesIO(row["image"]["bytes"]), formats=["WEBP"])
        picture.load()
        assert (picture.size, picture.mode) == ((96, 96), "RGB"), row["key"]
        assert row["image"]["path"] == f"{row['key']}.webp"
        assert picture.convert("L").getextrema()[0] < 240, f"{row['key']} is blank"


def test_two_styles_of_one_concept_are_different_pictures():
    digests = [hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows("unseen", ["image"])]
    assert len(set(digests)) > 0.98 * len(digests)


def test_schema_is_what_datasets_reads_as_pictures():
    schema = pq.read_schema(DATA / "emoji" / "val.parquet")
    assert schema.names == ["key", "image", "captions", "concept", "style", "licence"]
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(schema.field("captions").type.value_type) == "string"
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["image"] == {"_type": "Image"}


def test_row_groups_are_small_enough_to_stream():
    meta = pq.ParquetFile(DATA / "emoji" / "train.parquet").metadata
    assert max(meta.row_group(number).num_rows for number in range(meta.num_row_groups)) <= 512


def test_phrases_are_short_distinct_and_no_caption(emoji):
    texts = pq.read_table(DATA / "phrases" / "phrases.parquet")["text"].to_pylist()
    captions = {caption.lower() for part in emoji.values() for row in part for caption in row["captions"]}
    lowered = {text.lower() for text in texts}
    assert len(texts) == len(lowered) == 10_000
    assert texts == sorted(texts)
    assert not lowered & captions
    assert max(len(text.split()) for text in texts) <= 25
    assert all(text == text.strip() and text for text in texts)


def test_licences_and_credits_are_there():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    texts = {path.name: path.read_text(encoding="utf-8") for path in (DATA / "licences").glob("*.txt")}
    for name, words in {
        "Apache-2.0.txt": "Version 2.0, January 2004",
        "CC-BY-4.0.txt": "Attribution 4.0 International",
        "MIT-emojibase.txt": "Miles Johnson",
        "MIT-fluentui-emoji.txt": "Microsoft Corporation",
        "MIT-lobehub.txt": "LobeHub",
        "Unicode-3.0.txt": "UNICODE LICENSE V3",
        "WordNet.txt": "Princeton",
    }.items():
        assert words in texts[name], name
    for credit in ("Noto Emoji", "Twemoji", "CC-BY-4.0", "Fluent Emoji", "Emojibase", "WordNet", "all-MiniLM-L6-v2"):
        assert credit in notice
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text(encoding="utf-8")
