"""The layout ``sentence_transformers``: what ``SentenceTransformer`` loads, of its built-in modules alone.

A student that can be a CLIPModel is one module over the same files. Of any other the two towers are routes of their
own: its texts through CLIP's text transformer, its pictures through timm's network, each with what follows it as dense
layers. A text tower alone is the texts' route without a router, and ends in its teacher's space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipdistill.core import files
from clipdistill.formats import clip_towers
from clipdistill.formats.clip_model import clip_gaps, write_clip_model
from clipdistill.formats.hub_files import CONFIG, processor_faults, special_ids, write_config
from clipdistill.formats.timm_wrapper import Linear, timm_tower
from clipdistill.towers.student import DualEncoder

MODULES, WEIGHTS = "modules.json", "model.safetensors"
_BERT, _MODEL, _NORMALIZE, _ROUTER = (
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Normalize",
    "router_config.json",
)
FILES = (MODULES, _MODEL, f"{_NORMALIZE}/{CONFIG}")
_TYPES = "sentence_transformers.base.modules"
_TRANSFORMER, _DENSE = f"{_TYPES}.transformer.Transformer", f"{_TYPES}.dense.Dense"
_ROUTES, _NORMALIZES = f"{_TYPES}.router.Router", f"{_TYPES}.normalize.Normalize"
_EMBEDDING = "sentence_embedding"
_CLIP = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}
_FORWARD = {"method": "forward", "method_output_name": "pooler_output"}

Route = list[tuple[str, str]]
"""The folders of a route's modules, each with its type."""

USE = (
    "sentence-transformers:\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
    'model = SentenceTransformer("FOLDER")\n'
    'texts = model.encode(["a red bicycle"])  # unit rows; pictures, where it takes them: PIL images in the list\n```'
)
"""How the layout is used, for the model card."""


def sentence_transformers_faults(student: DualEncoder) -> Iterator[str]:
    """Why sentence-transformers' own modules could not be a student, one sentence each."""
    gaps = list(clip_towers.text_gaps(student.model.text))
    if student.preprocess is not None and not _is_clip(student):
        tower = timm_tower(student)
        gaps += [tower] if isinstance(tower, str) else []
    for gap in gaps:
        yield (
            f"export.layouts: sentence_transformers: its built-in modules cannot be this student: {gap}: "
            "leave sentence_transformers out, and use onnx"
        )


def write_sentence_transformers(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """Write a student's towers as modules of sentence-transformers, in float32.

    Args:
        student: A student without :func:`sentence_transformers_faults`.
        folder: The export, aside, with the tokenizer's files.
        precisions: Of the other layouts; this one has its weights as they were trained.
    """
    if student.preprocess is None:
        modules = _text_route(student, folder)
    elif _is_clip(student):
        write_clip_model(student, folder, precisions)
        _write_transformer(folder, _CLIP)
        modules = [("", _TRANSFORMER)]
    else:
        _write_router(folder, {"text": _text_route(student, folder), "image": _image_route(student, folder)})
        modules = [("", _ROUTES)]
    modules.append((_NORMALIZE, _NORMALIZES))
    (folder / _NORMALIZE).mkdir()
    files.write_json(folder / _NORMALIZE / CONFIG, {"module_input_name": _EMBEDDING, "module_output_name": _EMBEDDING})
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": kind} for place, (path, kind) in enumerate(modules)
    ]
    files.write_json(folder / MODULES, listed)
    files.write_json(folder / _MODEL, {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"})


def _is_clip(student: DualEncoder) -> bool:
    """Whether a student with both towers can be a CLIPModel, its preprocessing included."""
    preprocess = student.preprocess
    return preprocess is not None and not [*clip_gaps(student), *processor_faults(preprocess, "")]


def _text_route(student: DualEncoder, folder: Path) -> Route:
    """CLIP's text transformer, pooled at the end token, and its projection as a dense layer."""
    text, place = student.model.text, folder / "text_0_Transformer"
    place.mkdir()
    student.tokenizer.save(place)
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32"}
    write_config(place, {**config, **clip_towers.text_config(text), **special_ids(student.tokenizer)})
    weights = {f"text_model.{name}": value for name, value in clip_towers.text_weights(text).items()}
    save_file(weights, place / WEIGHTS, metadata={"format": "pt"})
    _write_transformer(place, {"text": _FORWARD})
    to_teacher = None
    if student.searches is not None and student.projection is not None:
        to_teacher = student.projection.get_parameter("text.weight")
    last = Linear(clip_towers.text_projection(text, to_teacher), None)
    return [(place.name, _TRANSFORMER), *_denses(folder, "text", (last,))]


def _image_route(student: DualEncoder, folder: Path) -> Route:
    """The network of timm up to its pooled output, and what follows it as dense layers.

    Raises:
        ValueError: If the student has :func:`sentence_transformers_faults`.
    """
    tower = timm_tower(student)
    if isinstance(tower, str):
        raise ValueError(tower)
    place = folder / "image_0_Transformer"
    place.mkdir()
    write_config(place, tower.config)
    save_file(dict(tower.weights), place / WEIGHTS, metadata={"format": "pt"})
    _write_transformer(place, {"image": _FORWARD})
    return [(place.name, _TRANSFORMER), *_denses(folder, "image", tower.head)]


def _denses(folder: Path, side: str, layers: Sequence[Linear]) -> Route:
    route: Route = []
    for number, layer in enumerate(layers, 1):
        place = folder / f"{side}_{number}_Dense"
        place.mkdir()
        outputs, inputs = layer.weight.shape
        config: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "bias": layer.bias is not None}
        config |= {"module_input_name": _EMBEDDING, "module_output_name": _EMBEDDING}
        files.write_json(place / CONFIG, {**config, "activation_function": layer.activation})
        weights = {"linear.weight": layer.weight, **({} if layer.bias is None else {"linear.bias": layer.bias})}
        save_file(weights, place / WEIGHTS, metadata={"format": "pt"})
        route.append((place.name, _DENSE))
    return route


def _write_transformer(folder: Path, modalities: dict[str, Any]) -> None:
    values = {"transformer_task": "feature-extraction", "modality_config": modalities, "module_output_name": _EMBEDDING}
    files.write_json(folder / _BERT, values)


def _write_router(folder: Path, routes: dict[str, Route]) -> None:
    values = {
        "types": {path: kind for route in routes.values() for path, kind in route},
        "structure": {name: [path for path, _ in route] for name, route in routes.items()},
        "parameters": {
            "default_route": "text",
            "allow_empty_key": True,
            "route_mappings": {f"(None, {name!r})": name for name in routes},
        },
    }
    files.write_json(folder / _ROUTER, values)
