"""The model card: what the student is, under which licences, how well it does, and how each consumer loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipdistill.formats.immich import immich_use
from clipdistill.formats.onnx import onnx_in_javascript
from clipdistill.formats.parity import Parity
from clipdistill.formats.sentence_transformers import USE as SENTENCE_TRANSFORMERS_USE
from clipdistill.formats.triton import triton_use
from clipdistill.formats.vectors import VECTORS_USE
from clipdistill.formats.web import WEB_USE

UNKNOWN = "unknown"
_LIBRARIES = (
    ("open_clip", "open_clip"),
    ("clip_model", "transformers"),
    ("sentence_transformers", "sentence-transformers"),
)


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside what is measured.

    Attributes:
        name: The student's.
        licence: The SPDX identifier of the student's licence; None: not stated.
        teacher: The teacher's name.
        teacher_licence: Its licence.
        data_licence: The training data's.
        report: The run's ``report.json``; empty where it was not evaluated.
    """

    name: str = "student"
    licence: str | None = None
    teacher: str | None = None
    teacher_licence: str | None = None
    data_licence: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


def card(facts: CardFacts, values: Mapping[str, Any], parities: Sequence[Parity], sizes: Mapping[str, int]) -> str:
    """The text of ``README.md``.

    Args:
        facts: What is known of the student.
        values: The manifest's values.
        parities: How each reading compares with the student.
        sizes: Bytes by file.
    """
    parts = [
        _header(facts, values),
        f"# {facts.name}\n\n{_intro(facts, values)}",
        _licences(facts),
        _figures(facts.report),
        _parity(parities),
        _use(values),
        _sizes(sizes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(facts: CardFacts, values: Mapping[str, Any]) -> str:
    whole = values["preprocess"] is not None
    entries: list[tuple[str, Any]] = [
        ("license", (facts.licence or UNKNOWN).lower()),
        ("library_name", next((name for layout, name in _LIBRARIES if layout in values["layouts"]), "onnx")),
        ("pipeline_tag", "zero-shot-image-classification" if whole else "feature-extraction"),
        ("tags", ["clip", "distillation", "retrieval", *(["onnx"] if "onnx" in values["layouts"] else [])]),
    ]
    # JSON's own strings and lists are YAML's too, whatever characters a name has
    return "\n".join(["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries), "---"])


def _intro(facts: CardFacts, values: Mapping[str, Any]) -> str:
    teacher = f", distilled from {facts.teacher}" if facts.teacher else ""
    if values["preprocess"] is None:
        what = (
            f"A text encoder{teacher}, whose embeddings search the teacher's own picture index ({values['dim']} wide)."
        )
    else:
        size = " x ".join(map(str, values["preprocess"]["size"]))
        what = f"A dual encoder of pictures ({size} px) and texts{teacher}; embeddings are {values['dim']} wide."
    return f"{what} Texts are cut to {values['context_length']} tokens. Every row it gives has unit length."


def _licences(facts: CardFacts) -> str:
    rows = (("student", facts.licence), ("teacher", facts.teacher_licence), ("training data", facts.data_licence))
    return _table("Licences", ("of", "licence"), [(name, value or "not stated") for name, value in rows])


def _figures(report: Mapping[str, Any]) -> str:
    """The exact figures of the student and its teacher, one a line with its interval; empty without an evaluation.

    Those of an approximate index are left to the report.
    """
    rows = [row for row in report.get("evaluation", {}).get("rows", []) if row["search"] == "exact"]
    titles = ("set", "direction", "query and gallery", "measure", "value", "95% interval", "queries", "gallery")
    lines = [
        (
            *(str(row[name]) for name in ("set", "direction", "pairing")),
            f"{row['measure']}@{row['k']}",
            f"{row['value']:.4f}",
            "-" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}",
            *(str(row[name]) for name in ("queries", "gallery")),
        )
        for row in rows
        if row["value"] is not None
    ]
    return _table("Measured by its run", titles, lines, "By exact search.") if lines else ""


def _parity(parities: Sequence[Parity]) -> str:
    lines = []
    for one in parities:
        recall = ", ".join(f"{name} {value:.4f}" for name, value in one.recall.items()) or "-"
        for tower, values in one.towers.items():
            cosine = f"{values['worst_cosine']:.7f}"
            lines.append((one.reading, one.library, tower, cosine, str(values["rows"]), f"{one.bar}", recall))
    text = (
        "Each layout was loaded by its consumer's own library, in a fresh process, and compared with the student. "
        "Of servers (immich, Triton) the protocol was followed with the libraries named; they were not run themselves."
    )
    if any("preprocess_cosine" in one.recall for one in parities):
        text += (
            " `preprocess_cosine` is the least of pictures that the library resized, cropped and normalised itself, "
            "which differs a little from the student's own way; no bar holds it."
        )
    titles = ("layout", "read by", "tower", "worst cosine", "rows", "at least", "further figures")
    return _table("Parity", titles, lines, text)


def _use(values: Mapping[str, Any]) -> str:
    parts = ["## Use"]
    if "open_clip" in values["layouts"]:
        parts.append(
            "open_clip:\n\n```python\nimport open_clip\n\n"
            'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")\n'
            'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n'
            'texts = model.eval().encode_text(tokenizer(["a red bicycle"]), normalize=True)\n```'
        )
    if "clip_model" in values["layouts"]:
        parts.append(
            "transformers:\n\n```python\nimport torch\nfrom transformers import CLIPModel, CLIPProcessor\n\n"
            'model = CLIPModel.from_pretrained("FOLDER").eval()\n'
            'processor = CLIPProcessor.from_pretrained("FOLDER")\n'
            'tokens = processor.tokenizer(["a red bicycle"], padding=True, truncation=True, return_tensors="pt")\n'
            "with torch.inference_mode():\n"
            "    texts = model.get_text_features(**tokens).pooler_output  # pictures: get_image_features\n"
            "texts = texts / texts.norm(dim=-1, keepdim=True)\n```"
        )
    if "sentence_transformers" in values["layouts"]:
        parts.append(SENTENCE_TRANSFORMERS_USE)
    if "onnx" in values["layouts"]:
        suffix = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}[values["precisions"][0]]
        parts.append(
            "ONNX Runtime (no torch):\n\n```python\nimport numpy as np\n"
            "import onnxruntime\nfrom tokenizers import Tokenizer\n\n"
            'tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")\n'
            f'session = onnxruntime.InferenceSession("FOLDER/onnx/text_model{suffix}.onnx")\n'
            'ids = np.array([tokenizer.encode("a red bicycle").ids])\n'
            '(texts,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})\n```'
        )
        parts.append(onnx_in_javascript(values["precisions"][0], values["context_length"]))
    if "immich" in values["layouts"]:
        parts.append(immich_use(values["dim"]))
    if "triton" in values["layouts"]:
        parts.append(triton_use(values["context_length"]))
    if "vectors" in values["layouts"]:
        parts.append(VECTORS_USE)
    if "web" in values["layouts"]:
        parts.append(WEB_USE)
    if values["index"] is not None:
        parts.append(_index_use(values["index"], "onnx" in values["layouts"]))
    return "\n\n".join(parts)


def _index_use(index: Mapping[str, Any], runtime: bool) -> str:
    """How the index in ``index/`` is searched."""
    what = f"The FAISS index in `index/` holds {index['vectors']} pictures ({index['factory']}) and their names"
    if not runtime:
        return f"{what}, by this very encoder."
    return (
        f"{what}. Search it over HTTP with `clipdistill serve FOLDER`, or without torch in Python:\n\n```python\n"
        "from clipdistill.retrieval.index import VectorIndex\nfrom clipdistill.runtime import RuntimeEncoder\n"
        "from clipdistill.search import Searcher\n\n"
        'encoder = RuntimeEncoder.load("FOLDER")\n'
        'index = VectorIndex.load("FOLDER/index", encoder=encoder.fingerprint)\n'
        'hits = Searcher(encoder, index).by_text("a red bicycle", 10)\n```'
    )


def _sizes(sizes: Mapping[str, int]) -> str:
    return _table("Files", ("file", "bytes"), [(name, f"{size:,}") for name, size in sorted(sizes.items())])


def _table(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], text: str = "") -> str:
    lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in (titles, *rows)]
    body = [f"| {lines[0]} |", "|" + "---|" * len(titles), *(f"| {line} |" for line in lines[1:])]
    return "\n".join([f"## {title}", "", *([text, ""] if text else []), *body])
