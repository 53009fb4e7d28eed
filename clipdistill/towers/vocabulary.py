"""A student's vocabulary out of its teacher's: the pieces that the texts use, and bytes for everything else.

Most of a small text tower is its token table, so the table keeps only what is used. No text may become unknown by
that: every family of tokenizers gets a fallback to the 256 bytes, in the way that the family knows.

===============  ===========================================================================================
byte-level BPE   the 256 byte symbols (CLIP, GPT-2), with the family's prefix and end-of-word forms
other BPE        the tokens ``<0x00>`` to ``<0xFF>`` and ``byte_fallback`` (Gemma, SigLIP 2)
Unigram          the same (T5, SigLIP)
WordPiece        every word is first spelled in byte symbols, so that those 256 suffice (BERT, MiniLM)
===============  ===========================================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from tokenizers import Tokenizer

from clipdistill.core.errors import ConfigError
from clipdistill.towers.tokenizer import END, PAD, START, characters

Json = dict[str, Any]

_TEXTS_AT_ONCE = 10_000
# WordPiece tries every end of a word from every start, which is cubic in a word's length: longer words are cut. No
# natural word has so many bytes, and BERT itself gives up on words of more than 100 characters.
_LONGEST_WORD = 64
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Vocabulary:
    """A pruned vocabulary.

    Attributes:
        backend: The tokenizer, ready for :class:`~clipdistill.towers.tokenizer.StudentTokenizer`.
        teacher_ids: For each of its ids the teacher's id of the same piece, or None where the teacher has none.
    """

    backend: Tokenizer
    teacher_ids: list[int | None]


def prune(backend: Tokenizer, texts: Iterable[str], *, size: int | None = None, minimum_count: int = 1) -> Vocabulary:
    """Keep the pieces that the texts use, most frequent first, and enough besides that no text is ever unknown.

    A text whose pieces were all kept is cut into the same pieces as before. Ids: padding 0, the kept pieces in the
    order of the teacher's ids, the bytes that the teacher has no piece for, start, and end as the largest.

    Args:
        backend: The teacher's tokenizer, as :func:`~clipdistill.towers.tokenizer.teacher_backend` gives it.
        texts: The texts that the student is made for.
        size: The most entries of the vocabulary, special tokens and bytes included; None keeps all that is used.
        minimum_count: Pieces that occur less often are not kept.

    Raises:
        ConfigError: If the tokenizer is of a type without a fallback, or ``size`` is too small for the fallback.
    """
    state: Json = json.loads(backend.to_str())
    family = _family(state)
    smallest = len(family.base) + 3
    if size is not None and size < smallest:
        raise ConfigError(f"student.vocab_size: {size} is too small: the bytes alone take {smallest}; set it higher")
    special = {token["id"] for token in state["added_tokens"]}
    counts = {number: count for number, count in _used(backend, texts).items() if number not in special}
    spelled = {
        number: piece for piece, number in family.ids.items() if number in counts and counts[number] >= minimum_count
    }
    wanted = [spelled[number] for number in sorted(spelled, key=lambda number: (-counts[number], number))]
    kept = _fitting(wanted, family, None if size is None else size - 3) - {PAD, START, END}
    known = sorted((piece for piece in kept if piece in family.ids), key=family.ids.__getitem__)
    names = [PAD, *known, *(piece for piece in family.base if piece not in family.ids), START, END]
    pruned = {**state, **family.parts(state, names), **_frame(names)}
    teacher_ids = [None, *(family.ids.get(name) for name in names[1:-2]), None, None]
    return Vocabulary(Tokenizer.from_str(json.dumps(pruned)), teacher_ids)


def _used(backend: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for part in _parts(texts):
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for text in texts:
        part.append(characters(text))
        if len(part) == _TEXTS_AT_ONCE:
            yield part
            part = []
    yield part


def _fitting(wanted: Sequence[str], family: _Family, limit: int | None) -> set[str]:
    """The base, and the wanted pieces in their order with all they are made of, as far as there is room."""
    kept = set(family.base)
    for piece in [*wanted, *family.spare(wanted)]:
        added = family.needs(piece) - kept
        if limit is None or len(kept) + len(added) <= limit:
            kept |= added
    return kept


def _frame(names: Sequence[str]) -> Json:
    """The parts of a ``tokenizer.json`` that are the same for every family: special tokens and how they are put."""
    ids = {token: names.index(token) for token in (PAD, START, END)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (START, END))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "added_tokens": [
            {"id": number, "content": token, **plain} for token, number in sorted(ids.items(), key=_second)
        ],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first, end],
            "pair": [start, first, end, second, end],
            "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (START, END)},
        },
        "truncation": None,
        "padding": None,
    }


def _second(item: tuple[str, int]) -> int:
    return item[1]


class _Family(Protocol):
    """What pruning must know of one type of tokenizer."""

    @property
    def ids(self) -> dict[str, int]:
        """The teacher's id of each piece, by the piece's spelling in the student's vocabulary."""
        ...

    @property
    def base(self) -> list[str]:
        """The pieces that are always kept, so that every text can be spelled."""
        ...

    def needs(self, piece: str) -> set[str]:
        """The piece, and all pieces without which the tokenizer could not arrive at it."""
        ...

    def spare(self, wanted: Sequence[str]) -> list[str]:
        """Further pieces worth keeping after the wanted ones."""
        ...

    def parts(self, state: Json, names: Sequence[str]) -> Json:
        """The changed parts of the ``tokenizer.json``, for a vocabulary of these names."""
        ...


def _family(state: Json) -> _Family:
    model = state["model"]
    kind = model.get("type")
    if kind == "BPE":
        return _Bpe.of(state)
    if kind == "WordPiece":
        return _WordPiece.of(model)
    if kind == "Unigram":
        return _Unigram.of(model)
    raise ConfigError(
        f"teacher.model: a tokenizer of type {kind} cannot be pruned (BPE, WordPiece and Unigram can); choose another "
        "teacher, or adopt this one's embeddings (teacher.embeddings): the student then gets CLIP's vocabulary"
    )


@dataclass(frozen=True)
class _Bpe:
    """Byte pairs, merged in the order of their ranks (Sennrich et al., 2016)."""

    ids: dict[str, int]
    base: list[str]
    ranks: dict[tuple[str, str], int]
    prefix: str
    suffix: str
    byte_level: bool

    @staticmethod
    def of(state: Json) -> _Bpe:
        model = state["model"]
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        byte_level = '"ByteLevel"' in json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
        forms = [(before, after) for before in dict.fromkeys(("", prefix)) for after in dict.fromkeys(("", suffix))]
        symbols = [before + symbol + after for before, after in forms for symbol in _SYMBOLS]
        ranks = {(first, second): rank for rank, (first, second) in enumerate(model["merges"])}
        base = symbols if byte_level else list(_BYTE_TOKENS)
        return _Bpe(model["vocab"], base, ranks, prefix, suffix, byte_level)

    def needs(self, piece: str) -> set[str]:
        """What the merging passes through: the pieces on this piece's own way, since no merge crosses its ends."""
        symbols = self._symbols(piece)
        seen = {piece, *(symbol for symbol in symbols if symbol in self.ids)}
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            place = list(pairwise(symbols)).index(pair)
            symbols[place : place + 2] = [self._joined(*pair)]
            seen.add(symbols[place])
        return seen

    def spare(self, wanted: Sequence[str]) -> list[str]:
        return []

    def parts(self, state: Json, names: Sequence[str]) -> Json:
        kept = set(names)
        merges = [pair for pair in self.ranks if pair[0] in kept and pair[1] in kept and self._joined(*pair) in kept]
        changed: Json = {"vocab": {name: number for number, name in enumerate(names)}, "merges": merges}
        if not self.byte_level:
            changed["byte_fallback"] = True
        return {"model": {**state["model"], **changed, "unk_token": PAD, "dropout": None}}

    def _joined(self, first: str, second: str) -> str:
        return first + second.removeprefix(self.prefix)

    def _symbols(self, piece: str) -> list[str]:
        body = piece.removeprefix(self.prefix).removesuffix(self.suffix)
        if not body:
            return [piece]
        symbols = [self.prefix + character for character in body]
        if not (self.prefix and piece.startswith(self.prefix)):
            symbols[0] = body[0]
        if self.suffix and piece.endswith(self.suffix):
            symbols[-1] += self.suffix
        return symbols


@dataclass(frozen=True)
class _WordPiece:
    """Longest match first, from the left (Wu et al., 2016), here on words that are spelled in byte symbols."""

    ids: dict[str, int]
    base: list[str]

    @staticmethod
    def of(model: Json) -> _WordPiece:
        prefix = model["continuing_subword_prefix"]
        vocabulary = {piece: number for piece, number in model["vocab"].items() if piece != model["unk_token"]}
        ids = {_in_symbols(piece, prefix): number for piece, number in vocabulary.items()}
        return _WordPiece(ids, [before + symbol for before in ("", prefix) for symbol in _SYMBOLS])

    def needs(self, piece: str) -> set[str]:
        return {piece}

    def spare(self, wanted: Sequence[str]) -> list[str]:
        return []

    def parts(self, state: Json, names: Sequence[str]) -> Json:
        spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pattern = {"Regex": f".{{1,{_LONGEST_WORD}}}"}
        shorten = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        own = [] if state["pre_tokenizer"] is None else [state["pre_tokenizer"]]
        changed = {"vocab": {name: number for number, name in enumerate(names)}, "unk_token": PAD}
        return {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*own, spell, shorten]},
            "model": {**state["model"], **changed, "max_input_chars_per_word": 2 * _LONGEST_WORD},
        }


@dataclass(frozen=True)
class _Unigram:
    """The likeliest cut into pieces (Kudo, 2018)."""

    ids: dict[str, int]
    base: list[str]
    scores: dict[str, float]

    @staticmethod
    def of(model: Json) -> _Unigram:
        ids = {piece: number for number, (piece, _) in enumerate(model["vocab"]) if number != model["unk_id"]}
        return _Unigram(ids, list(_BYTE_TOKENS), dict(model["vocab"]))

    def needs(self, piece: str) -> set[str]:
        return {piece}

    def spare(self, wanted: Sequence[str]) -> list[str]:
        return [one for one in dict.fromkeys("".join(wanted)) if one in self.ids]

    def parts(self, state: Json, names: Sequence[str]) -> Json:
        lowest = min(self.scores.values(), default=0.0)
        vocabulary = [[name, self.scores.get(name, lowest)] for name in names]
        return {"model": {**state["model"], "vocab": vocabulary, "unk_id": 0, "byte_fallback": True}}


def _symbols() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(0x100 + hidden.index(byte)) for byte in range(256)]


_SYMBOLS = _symbols()


def _in_symbols(piece: str, prefix: str) -> str:
    body = piece.removeprefix(prefix)
    return (prefix if body != piece else "") + "".join(_SYMBOLS[byte] for byte in body.encode("utf-8"))
