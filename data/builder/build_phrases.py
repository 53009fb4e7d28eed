"""Choose the unpaired English texts from WordNet: ``data/phrases/phrases.parquet``.

Run: ``python data/builder/build_phrases.py --tarballs FOLDER``, after ``build_emoji.py`` (whose captions are left out).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sources import WORDNET, fetch, members

# How many texts of each form. Captions are labels and comma-separated words, so half of the texts look like that.
QUOTAS = {"named gloss": 3500, "gloss": 2500, "synonyms": 2000, "multi-word": 2000}
MOST_WORDS = 12
# A word is everyday where this many glosses of other entries use it, or where WordNet's sense counts have seen it.
LEAST_USES = 3
PLAIN = re.compile(r"[a-z][a-z' -]*")
# Pointers of entries that are left out: a named instance (a person, a city), and a usage (slang, slurs, trade names).
LEFT_OUT_POINTERS = {"@i", ";u"}
# ... as are entries that would have no place in an example: marked as coarse, or about sex or excrement.
COARSE = re.compile(
    r"\b(slurs?|offensive|obscen|vulgar|derogat|disparag|sex(?!t)|intercourse|genital|penis|clitoris|coitus|copulat|orgasm"
    r"|whore|prostitut|rape\b|bastard|retard|fuck|shit|defecat|feces|excrement)"
)
SCHEMA = pa.schema(
    [("text", pa.string())],
    metadata={"huggingface": json.dumps({"info": {"features": {"text": {"dtype": "string", "_type": "Value"}}}})},
)


@dataclass(frozen=True)
class Synset:
    """One WordNet entry: its words, and its gloss without examples and remarks in brackets."""

    offset: str
    words: tuple[str, ...]
    gloss: str


def parse(line: str) -> Synset | None:
    """The entry of one line of a ``data.*`` file; None for licence lines, names, slang and odd letters."""
    if line.startswith(" "):
        return None
    head, _, tail = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    if LEFT_OUT_POINTERS & set(fields) or COARSE.search(line.replace("_", " ").lower()):
        return None
    if not all(PLAIN.fullmatch(word) for word in words):
        return None
    gloss = re.sub(r"\([^)]*\)", " ", re.split(r'[;"]', tail)[0])
    return Synset(f"{fields[2]}{fields[0]}", words, " ".join(gloss.split()).strip(" ,:"))


def read_synsets(files: dict[str, bytes]) -> list[Synset]:
    """All entries of the nouns, verbs and adjectives that are written in plain lower-case letters."""
    lines = (line for kind in ("noun", "verb", "adj") for line in files[f"dict/data.{kind}"].decode().splitlines())
    return [synset for synset in map(parse, lines) if synset is not None]


def counted_words(files: dict[str, bytes]) -> set[str]:
    """The words with a sense that was seen in WordNet's sense-tagged texts."""
    rows = (line.split() for line in files["dict/index.sense"].decode().splitlines())
    return {key.split("%")[0].replace("_", " ") for key, _, _, count in rows if int(count) > 0}


def everyday(synsets: list[Synset], counted: set[str]) -> list[Synset]:
    """The entries whose first word is in everyday use; see ``LEAST_USES``."""
    uses: Counter[str] = Counter()
    for synset in synsets:
        words = re.findall(r"[a-z'-]+", synset.gloss.lower())
        runs = {" ".join(words[at : at + size]) for size in (1, 2, 3) for at in range(len(words) - size + 1)}
        uses.update(runs - set(synset.words))
    return [synset for synset in synsets if synset.words[0] in counted or uses[synset.words[0]] >= LEAST_USES]


def texts_of(synset: Synset) -> Iterator[tuple[str, str]]:
    """The texts that one entry can give, each with its form's name."""
    named = f"{synset.words[0]}, {synset.gloss}"
    if len(synset.gloss.split()) >= 2 and len(named.split()) <= MOST_WORDS:
        yield "named gloss", named
        yield "gloss", synset.gloss
    if len(synset.words) > 1:
        yield "synonyms", ", ".join(synset.words[:6])
    for word in synset.words:
        if " " in word:
            yield "multi-word", word


def choose(synsets: Iterable[Synset], captions: set[str]) -> list[str]:
    """The chosen texts, sorted: of each form the quota with the smallest SHA-256, none equal to a caption.

    Args:
        synsets: The entries to draw from.
        captions: Captions of the picture data in lower case; a text equal to one of them is left out.
    """
    forms: dict[str, set[str]] = {form: set() for form in QUOTAS}
    for synset in synsets:
        for form, text in texts_of(synset):
            forms[form].add(text)
    chosen: dict[str, str] = {}  # by the text in lower case, so that no two differ by case alone
    for form, quota in QUOTAS.items():
        free = [text for text in forms[form] if text.lower() not in captions and text.lower() not in chosen]
        free.sort(key=lambda text: hashlib.sha256(text.encode("utf-8")).hexdigest())
        kept = {text.lower(): text for text in free[:quota]}
        print(f"{form}: {len(kept)} of {len(free)}")
        chosen.update(kept)
    return sorted(chosen.values())


def read_captions(emoji: Path) -> set[str]:
    """Every caption of every split, in lower case."""
    columns = [pq.read_table(path, columns=["captions"])["captions"] for path in sorted(emoji.glob("*.parquet"))]
    return {caption.lower() for column in columns for row in column.to_pylist() for caption in row}


def build(tarballs: Path, emoji: Path, out: Path) -> int:
    """Write the phrases' table and return its number of rows."""
    files = dict(members(fetch(WORDNET, tarballs), "data.noun", "data.verb", "data.adj", "index.sense"))
    synsets = everyday(read_synsets(files), counted_words(files))
    texts = choose(synsets, read_captions(emoji))
    out.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts}, schema=SCHEMA)
    pq.write_table(table, out, row_group_size=4096, compression="snappy", use_dictionary=False)
    return len(texts)


if __name__ == "__main__":
    data = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tarballs", type=Path, required=True, help="folder of npm tarballs, filled where missing")
    parser.add_argument("--emoji", type=Path, default=data / "emoji")
    parser.add_argument("--out", type=Path, default=data / "phrases" / "phrases.parquet")
    arguments = parser.parse_args()
    print(build(arguments.tarballs, arguments.emoji, arguments.out))
