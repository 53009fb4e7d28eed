"""Draw the emoji data set: ``data/emoji/{train,val,test,unseen}.parquet``.

Run: ``python data/builder/build_emoji.py --tarballs FOLDER``. The tarballs are fetched into the folder where missing.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cairosvg
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sources import EMOJIBASE, FLUENT_3D, FLUENT_FLAT, NOTO, TWEMOJI, fetch, members, read_json, share

SIDE = 96
QUALITY = 80
UNSEEN_SHARE = 0.2
# Emojibase's groups: 2 holds skin tones and hair, 9 the flags; the letters that flags are spelt with have none.
LEFT_OUT_GROUPS = (2, 9, None)
STYLES = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent-flat": "MIT", "fluent-3d": "MIT"}
VALUE = {"dtype": "string", "_type": "Value"}
# `Sequence` rather than `List`: every version of HF `datasets` understands it.
FEATURES = {
    "key": VALUE,
    "image": {"_type": "Image"},
    "captions": {"feature": VALUE, "_type": "Sequence"},
    "concept": VALUE,
    "style": VALUE,
    "licence": VALUE,
}
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("captions", pa.list_(pa.string())),
        ("concept", pa.string()),
        ("style", pa.string()),
        ("licence", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def concept_of(hexcode: str) -> str:
    """The name that an emoji has in every source: lower case, without the presentation selector FE0F."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_concepts(tarball: Path) -> dict[str, list[str]]:
    """Each concept's captions, from Emojibase: the label, and the label with its tags. No flags, no skin tones."""
    captions = {}
    for emoji in read_json(tarball, "en/data.json"):
        if emoji.get("group") in LEFT_OUT_GROUPS:
            continue
        texts = [emoji["label"], ", ".join([emoji["label"], *emoji.get("tags", [])])]
        captions[concept_of(emoji["hexcode"])] = list(dict.fromkeys(texts))
    return captions


def draw_icon(icon: dict[str, Any], pack: dict[str, Any]) -> Image.Image:
    """One Iconify icon, drawn to fit the square, on white."""
    box = [icon.get(name, pack.get(name, default)) for name, default in [("left", 0), ("top", 0), ("width", 16)]]
    box.append(icon.get("height", pack.get("height", 16)))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )
    png = cairosvg.svg2png(svg.encode(), output_width=SIDE, output_height=SIDE, background_color="white")
    return Image.open(io.BytesIO(png)).convert("RGB")


def draw_pack(tarball: Path, concepts: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of an Iconify pack, one for each concept that it has."""
    pack = read_json(tarball, "icons.json")
    names = {concept_of(code): name for code, name in sorted(read_json(tarball, "chars.json").items())}
    for concept in sorted(concepts & names.keys()):
        yield concept, draw_icon(pack["icons"][names[concept]], pack)


def read_rendered(tarball: Path, concepts: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of the 3D pack, which ships them rendered, on white and reduced to the square."""
    seen = set()
    for name, data in sorted(members(tarball, ".webp")):
        concept = concept_of(Path(name).stem)
        if concept in concepts and concept not in seen:
            seen.add(concept)
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            ground = Image.new("RGBA", (max(picture.size),) * 2, "white")
            ground.alpha_composite(picture, tuple((max(picture.size) - length) // 2 for length in picture.size))
            yield concept, ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def split_of(concept: str, key: str) -> str:
    """Which split a picture belongs to, from SHA-256 alone: the concept's decides `unseen`, the key's the others."""
    if share(concept) < UNSEEN_SHARE:
        return "unseen"
    place = share(key)
    return "train" if place < 0.8 else "val" if place < 0.9 else "test"


def make_row(style: str, concept: str, captions: list[str], picture: Image.Image) -> dict[str, Any]:
    """One row of the table, with the picture as WebP bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    key = f"{style}/{concept}"
    return {
        "key": key,
        "image": {"bytes": buffer.getvalue(), "path": f"{key}.webp"},
        "captions": captions,
        "concept": concept,
        "style": style,
        "licence": STYLES[style],
    }


def build(tarballs: Path, out: Path) -> Counter[str]:
    """Write the four parquet files into ``out`` and return how many rows each has."""
    captions = read_concepts(fetch(EMOJIBASE, tarballs))
    packs = {"noto": NOTO, "twemoji": TWEMOJI, "fluent-flat": FLUENT_FLAT}
    drawn = {style: draw_pack(fetch(source, tarballs), set(captions)) for style, source in packs.items()}
    drawn["fluent-3d"] = read_rendered(fetch(FLUENT_3D, tarballs), set(captions))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": [], "unseen": []}
    for style, pictures in drawn.items():
        for concept, picture in pictures:
            row = make_row(style, concept, captions[concept], picture)
            splits[split_of(concept, row["key"])].append(row)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema=SCHEMA)
        pq.write_table(table, out / f"{name}.parquet", row_group_size=512, compression="none", use_dictionary=False)
    return Counter({name: len(rows) for name, rows in splits.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tarballs", type=Path, required=True, help="folder of npm tarballs, filled where missing")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "emoji")
    arguments = parser.parse_args()
    print(dict(build(arguments.tarballs, arguments.out)))
