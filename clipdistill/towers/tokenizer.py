"""The student's tokenizer: one ``tokenizer.json``, the same in training, in search and in every exported layout.

Numpy and ``tokenizers`` only, so that a runtime without torch uses this very code.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from clipdistill.core import files, fingerprint
from clipdistill.core.errors import ConfigError, DataError

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SPECIAL = {"pad_token": PAD, "bos_token": START, "eos_token": END}

_CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

_TEXTS_AT_ONCE = 1 << 16

Tokens = npt.NDArray[np.int64]


class StudentTokenizer:
    """Texts to rows of token ids: start, pieces, end, padding.

    Padding has id 0 and the end token the largest id, because open_clip pools a causal tower at the largest id.

    Args:
        backend: A tokenizer whose vocabulary has :data:`PAD` first and :data:`START`, :data:`END` last.
        context_length: The most tokens that a text may have, start and end included.

    Raises:
        DataError: If the special tokens are not where they must be, or the context has no room for a text.
    """

    def __init__(self, backend: Tokenizer, context_length: int) -> None:
        self.vocab_size: int = backend.get_vocab_size()
        ids = [backend.token_to_id(token) for token in (PAD, START, END)]
        if ids != [0, self.vocab_size - 2, self.vocab_size - 1]:
            raise DataError(
                f"tokenizer: {PAD}, {START}, {END} must have the ids 0, {self.vocab_size - 2}, {self.vocab_size - 1}; "
                f"found {ids}. Only a tokenizer that clipdistill made can be a student's"
            )
        if context_length < 3:
            raise DataError(f"tokenizer: a context of {context_length} tokens has no room for a text; at least 3")
        self.context_length = context_length
        self.pad_id, self.start_id, self.end_id = ids
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.enable_truncation(context_length)

    def encode(self, texts: Sequence[str], *, cut: bool = True) -> Tokens:
        """Turn texts into token ids.

        A text that is too long loses its last pieces, never its end token. A lone surrogate, which is no character,
        becomes U+FFFD.

        Args:
            texts: What to encode; an empty text is start and end alone.
            cut: Whether rows are only as long as the longest text of this call, which gives a causal tower pooled at
                the end token the same embedding; otherwise they are as long as the context.

        Returns:
            int64 of shape [texts, length], padded with 0.
        """
        rows = [encoding.ids for encoding in self._backend.encode_batch_fast([characters(text) for text in texts])]
        length = max(map(len, rows), default=1) if cut else self.context_length
        tokens = np.zeros((len(rows), length), np.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        return tokens

    def by_length(self, texts: Sequence[str], batch: int) -> Iterator[tuple[npt.NDArray[np.intp], Tokens]]:
        """Texts as batches of like length, so that little of a batch is padding.

        Args:
            texts: What to encode.
            batch: The most texts in a batch.

        Yields:
            The places of the batch's texts in ``texts``, and their tokens [texts, length] up to the last end token.

        Raises:
            ValueError: If ``batch`` is below 1.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1: got {batch}")
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            tokens = self.encode(texts[first : first + _TEXTS_AT_ONCE])
            lengths = _lengths(tokens)
            order = np.argsort(lengths, kind="stable")
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                yield first + rows, np.ascontiguousarray(tokens[rows, : int(lengths[rows].max())])

    def mask(self, tokens: Tokens) -> Tokens:
        """Which tokens are a text's own, its end token included: int64 [texts, length] of 1, and 0 for padding."""
        return (np.arange(tokens.shape[1]) < _lengths(tokens)[:, None]).astype(np.int64)

    def pieces(self, text: str) -> list[str]:
        """The pieces of one text as the vocabulary spells them, start and end included."""
        return list(self._backend.encode(characters(text)).tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, the rules and the context length."""
        return fingerprint.of_value(json.loads(self._backend.to_str()))

    def save(self, folder: Path) -> None:
        """Write the files that transformers, open_clip and fastembed read a tokenizer from.

        Args:
            folder: An existing folder.
        """
        config: dict[str, Any] = {
            **_SPECIAL,
            "model_max_length": self.context_length,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            "truncation_side": "right",
        }
        values = (json.loads(self._backend.to_str()), config, _SPECIAL)
        for name, value in zip(FILES, values, strict=True):
            files.write_json(folder / name, value)

    @staticmethod
    def load(folder: Path) -> StudentTokenizer:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: If a file is missing or not a student's tokenizer.
        """
        try:
            backend = Tokenizer.from_str((folder / FILES[0]).read_text(encoding="utf-8"))
            context_length = int(files.read_json(folder / FILES[1])["model_max_length"])
        except FileNotFoundError as fault:
            raise DataError(f"{folder}: no {Path(str(fault.filename)).name}: not a student's folder") from fault
        except Exception as fault:  # the Rust library raises plain Exception on a file that it cannot parse
            raise DataError(f"{folder}: its tokenizer cannot be read: {fault}") from fault
        return StudentTokenizer(backend, context_length)


def _lengths(tokens: Tokens) -> npt.NDArray[np.intp]:
    """How many tokens each text has: the end token's id is the largest; a text may spell out the padding's name."""
    return np.asarray(tokens.argmax(axis=1) + 1)


def default_backend() -> Tokenizer:
    """CLIP's own byte-level BPE, which open_clip ships: the vocabulary for a teacher whose tokenizer is not known."""
    return Tokenizer.from_str(_clip_state())


@cache
def _clip_state() -> str:
    from open_clip.tokenizer import SimpleTokenizer

    return str(teacher_backend(SimpleTokenizer()).to_str())


def teacher_backend(tokenizer: Any) -> Tokenizer:
    """The ``tokenizers`` form of an open_clip tokenizer, its own text cleaning included.

    Equal on ordinary text. What open_clip does through ``ftfy`` and ``html`` (mojibake, entities, full-width letters,
    ligatures) has no such form and is left out, but for curly quotes.

    Args:
        tokenizer: open_clip's SimpleTokenizer, HFTokenizer or SigLipTokenizer.

    Raises:
        ConfigError: If it is none of these.
    """
    inner = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
    if inner is not None:
        backend = Tokenizer.from_str(inner.to_str())
        own = [backend.normalizer] if backend.normalizer is not None else []
    elif hasattr(tokenizer, "bpe_ranks") and hasattr(tokenizer, "byte_encoder"):
        backend, own = _clip_backend(tokenizer), []
    else:
        raise ConfigError(
            f"teacher.model: its tokenizer ({type(tokenizer).__name__}) has no tokenizers form; take another teacher, "
            "or adopt this one's embeddings (teacher.embeddings): the student then gets CLIP's vocabulary"
        )
    backend.normalizer = normalizers.Sequence([*_cleaning(tokenizer), *own])
    backend.no_padding()
    backend.no_truncation()
    return backend


def _clip_backend(tokenizer: Any) -> Tokenizer:
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    backend = Tokenizer(models.BPE(vocab=dict(tokenizer.encoder), merges=merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _cleaning(tokenizer: Any) -> list[Any]:
    """What open_clip does to a text before its tokenizer sees it, by the name of the tokenizer's cleaning function."""
    quotes = [normalizers.Replace(Regex("[‘’‚‛]"), "'"), normalizers.Replace(Regex("[“”„‟]"), '"')]
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    default = "_clean_canonicalize" if type(tokenizer).__name__ == "SigLipTokenizer" else "_clean_whitespace"
    name = getattr(getattr(tokenizer, "clean_fn", None), "__name__", default)
    between: list[Any] = []
    if name == "_clean_canonicalize":
        marks = "".join(f"\\{mark}" for mark in string.punctuation)
        between = [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{marks}]"), "")]
    if name in ("_clean_canonicalize", "_clean_lower"):
        between.append(normalizers.Lowercase())
    return [*quotes, normalizers.NFC(), *between, *spaces]


def characters(text: str) -> str:
    """The text without lone surrogates, which UTF-8 and so the tokenizer cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
