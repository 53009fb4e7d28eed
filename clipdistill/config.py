"""The configuration of a run: one TOML file, checked at birth, every fault reported at once.

Imports no torch: ``clipdistill --help`` and a faulty file answer at once.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from clipdistill.core import toml
from clipdistill.core.errors import ConfigError, suggest

Check = Callable[[Mapping[str, Any], Path], Iterable[str]]
Preset = Literal["default", "clip", "open_clip", "tinyclip", "fd", "clip_kd", "mobileclip"]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _as_names(value: Any) -> Any:
    """Let one name stand for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """A part of the configuration: strict, frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class SourceConfig(Section):
    """Where some of the pictures and texts are, and how to read them."""

    path: str
    """A folder, a file, a glob or a brace range: ``shards/{0000..0127}.tar``."""
    format: Literal["auto", "folder", "csv", "tsv", "jsonl", "parquet", "tar", "karpathy", "coco"] = "auto"
    image: str | None = None
    """The column of the picture (a path, bytes, or HF's {bytes, path}); none = detected."""
    captions: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = ()
    """The columns of the captions; empty = detected. A column may hold one text or a list."""
    key: str | None = None
    root: str | None = None
    """The folder that relative picture paths start from; none = the table's own."""
    separator: str | None = None
    split: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often this source's rows are drawn in training, against the other sources' 1.0."""


def _as_sources(value: Any) -> Any:
    """Let ``"file.csv"``, ``["a", "b"]`` and ``{path = ...}`` all stand for a list of sources."""
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def _as_sets(value: Any) -> Any:
    return {"test": value} if isinstance(value, str | list) else value


_LISTS = ("train", "val", "images", "texts")
Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


class HoldOut(Section):
    """Rows of ``data.train`` that are set aside by the SHA-256 of a field, the same for everyone."""

    val: Share = 0.0
    test: Share = 0.0
    by: Literal["key", "caption", "picture"] = "key"


class DataConfig(Section):
    """The user's pictures and texts."""

    train: Sources = ()
    val: Sources = ()
    test: Annotated[dict[str, Sources], BeforeValidator(_as_sets)] = Field(default_factory=dict)
    """Evaluation sets by name: ``{test = "a.csv", unseen = "b.csv"}``, or one source, named ``test``."""
    images: Sources = ()
    """Unpaired pictures: they train the picture tower through the feature loss."""
    texts: Sources = ()
    """Unpaired texts: they train the text tower through the feature loss."""
    hold_out: HoldOut = HoldOut()
    max_pixels: Positive = 100_000_000
    """A picture whose header says more is refused before it is decoded."""
    max_rejected: Weight = 0.01
    """The run fails when more rows than this are refused: below 1 a share of the rows, from 1 on a count."""


class TeacherConfig(Section):
    """The large model: any open_clip model, or a folder of its embeddings."""

    model: str | None = None
    """An open_clip name, ``hf-hub:org/repo`` or ``local-dir:folder``."""
    pretrained: str | None = None
    """An open_clip tag, or a file of weights; only with a plain name."""
    embeddings: str | None = None
    """A clip-retrieval embeddings folder to adopt; then no teacher is run."""
    logit_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The teacher's exp(logit_scale); only to be given with ``embeddings``."""
    logit_bias: Annotated[float, Field(allow_inf_nan=False)] | None = None
    batch: Positive = 64
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    device: str = "auto"

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.model is None) == (self.embeddings is None):
            raise ValueError("give either teacher.model or teacher.embeddings")
        if self.embeddings is not None and self.logit_scale is None:
            raise ValueError(
                "teacher.embeddings needs teacher.logit_scale (exp of the model's own, 100.0 for most CLIP models)"
            )
        return self


class CacheConfig(Section):
    """The teacher's stored embeddings."""

    folder: str | None = None
    """Where it lies; none = ``cache`` in the run's folder. Give one folder to share it between runs."""
    views: Positive = 1
    """Crops a picture: view 0 is the whole picture, the others are drawn from (seed, key, number)."""
    view_seed: int = 0
    view_scale: tuple[float, float] = (0.6, 1.0)
    """The least and largest share of the picture that a crop keeps."""
    shard_rows: Positive = 4096
    probe_rows: Annotated[int, Field(ge=0)] = 8
    """How many rows are encoded again by the live teacher before a stored cache is used; 0 = none."""
    probe_cosine: Share = 0.999
    """The probe refuses the cache when any row's cosine is below this (float16 rows of one model: above 0.9999)."""


class StudentConfig(Section):
    """The small model."""

    image: str = "nano"
    """A preset (nano, tiny, small), an open_clip config, or a timm model."""
    text: str = "nano"
    """A preset (nano, tiny, small), or an open_clip config."""
    image_init: Literal["pretrained", "random"] = "pretrained"
    text_init: Literal["inherit", "pretrained", "random"] = "inherit"
    pretrained: str | None = None
    """An open_clip tag or a file: the weights of an open_clip config with ``pretrained`` towers."""
    image_weights: str | None = None
    """A safetensors file with the picture tower's weights under timm's names, where no hub is reached."""
    image_size: Positive | None = None
    dim: Positive | None = None
    """The width of the embeddings; none = the teacher's. A projection to the teacher's is saved with the student."""
    vocab_size: Positive | None = None
    """At most so many word pieces are kept from the teacher's vocabulary; none = all that the texts use."""


class LossConfig(Section):
    """A preset, and the weights that differ from it."""

    preset: Preset = "default"
    clip: Weight | None = None
    siglip: Weight | None = None
    affinity: Weight | None = None
    feature_cosine: Weight | None = None
    feature_mse: Weight | None = None
    interactive: Weight | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    teacher_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    student_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    affinity_rows: Literal["all", "pairs"] | None = None
    multi_positive: bool | None = None


class TrainConfig(Section):
    """The training loop."""

    steps: Positive = 1000
    batch: Annotated[int, Field(ge=0)] = 64
    """Pairs a step."""
    batch_images: Annotated[int, Field(ge=0)] = 0
    """Pictures without a text a step, drawn from ``data.images`` and ``data.train``."""
    batch_texts: Annotated[int, Field(ge=0)] = 0
    """Texts without a picture a step, drawn from ``data.texts`` and the captions of ``data.train``."""
    accumulation: Positive = 1
    """The batch is cut into so many parts, whose gradients are averaged; each part contrasts within itself."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-4
    lr_image: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The picture tower's learning rate; none = ``lr``."""
    lr_head: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The learning rate of the picture tower's last layer, which is new on a pretrained tower; none = ``lr_image``."""
    lr_text: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The text tower's learning rate; none = ``lr``."""
    weight_decay: Weight = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: Annotated[int, Field(ge=0)] = 50
    """Steps of linear warm-up, before the cosine."""
    final_lr: Share = 0.0
    """The share of the learning rate that is left at the last step."""
    grad_clip: Weight = 1.0
    """The largest norm of the gradient; 0 = not clipped."""
    freeze: tuple[str, ...] = ()
    """Beginnings of parameter names that are not trained: ``visual.trunk.conv_stem``."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The decay of an exponential moving average of the weights, which is then evaluated and kept; 0 = none."""
    eval_every: Positive = 200
    save_every: Positive = 200
    log_every: Positive = 10
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode pictures ahead; never changes a result."""
    max_skipped: Annotated[int, Field(ge=0)] = 10
    """Steps with a loss or gradient that is not finite are skipped; more than this and the run stops."""
    threads: Positive | None = None
    """Computing threads; none = torch's own choice. Weights are bit-identical only at equal threads."""
    device: str = "auto"


class IndexConfig(Section):
    """The FAISS index over the student's picture embeddings."""

    factory: str = "auto"
    """A FAISS factory string, or ``auto``: chosen by the number of vectors."""
    sets: tuple[str, ...] = ()
    """Whose pictures: of ``train``, ``val`` and the evaluation sets' names; empty = all of them."""


class EvaluateConfig(Section):
    """The measures."""

    ks: tuple[Positive, ...] = (1, 5, 10)
    sets: tuple[str, ...] = ()
    """Which evaluation sets; empty = all of ``data.test``, or ``val`` where there is none."""


class ReportConfig(Section):
    """The report page."""

    strips: Annotated[int, Field(ge=0)] = 6
    """How many of the best and of the worst queries are shown with their pictures."""


class RunConfig(Section):
    """One run, from the data to the report."""

    name: str
    seed: int = 17
    data: DataConfig
    teacher: TeacherConfig
    cache: CacheConfig = CacheConfig()
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        faults = [*_train_faults(self), *_set_faults(self)]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = (), checks: Sequence[Check] = ()) -> RunConfig:
        """Read a TOML file, change single keys, and check everything.

        Args:
            path: The file. Relative paths inside it start from its folder.
            overrides: ``section.key=value`` each, the value in TOML's own form; a plain word is a string.
            checks: Further checks of the raw values, such as names of models; each yields its faults.

        Raises:
            ConfigError: With every fault, each with its dotted path and the nearest valid name.
        """
        path = Path(path)
        raw = toml.read(path)
        faults = list(toml.apply_overrides(raw, overrides))
        return _validated(raw, path.parent.resolve(), checks, faults)

    @staticmethod
    def parse(raw: Mapping[str, Any], base: str | Path, checks: Sequence[Check] = ()) -> RunConfig:
        """Check a configuration that is already a dictionary; ``base`` is where relative paths start."""
        return _validated(dict(raw), Path(base), checks, [])

    def to_toml(self) -> str:
        """The whole configuration, defaults included, as TOML that :meth:`load` reads back equal."""
        return toml.write(self.model_dump(mode="json", exclude_none=True))


def evaluation_sets(config: RunConfig) -> tuple[str, ...]:
    """The names of the sets that are evaluated, in the configuration's order."""
    if config.evaluate.sets:
        return config.evaluate.sets
    names = [*config.data.test, *(["test"] if config.data.hold_out.test else [])]
    return tuple(dict.fromkeys(names)) or ("val",)


def known_sets(config: RunConfig) -> tuple[str, ...]:
    """The names of all sets of pairs that the configuration makes."""
    names = ["train", "val"] if config.data.val or config.data.hold_out.val else ["train"]
    names += [*config.data.test, *(["test"] if config.data.hold_out.test else [])]
    return tuple(dict.fromkeys(names))


def _train_faults(config: RunConfig) -> Iterator[str]:
    train, data = config.train, config.data
    if train.batch + train.batch_images + train.batch_texts == 0:
        yield "train.batch: nothing to train on: train.batch, batch_images and batch_texts are all 0"
    if train.batch and not data.train:
        yield "data.train: train.batch asks for pairs, but data.train names none (set train.batch=0 to go without)"
    if train.batch_images and not (data.images or data.train):
        yield "train.batch_images: neither data.images nor data.train is given"
    if train.batch_texts and not (data.texts or data.train):
        yield "train.batch_texts: neither data.texts nor data.train is given"
    low, high = config.cache.view_scale
    if not 0 < low <= high <= 1:
        yield f"cache.view_scale: must be rising shares above 0 and up to 1, got [{low}, {high}]"
    if data.hold_out.val + data.hold_out.test >= 1:
        yield f"data.hold_out: val + test must be below 1, got {data.hold_out.val + data.hold_out.test}"


def _set_faults(config: RunConfig) -> Iterator[str]:
    known = known_sets(config)
    for section, names in (("index.sets", config.index.sets), ("evaluate.sets", config.evaluate.sets)):
        for name in names:
            if name not in known:
                yield f"{section}: no set named {name!r}; {suggest(name, known)}"
    for part, given in (("val", bool(config.data.val)), ("test", "test" in config.data.test)):
        if given and getattr(config.data.hold_out, part):
            yield f"data.hold_out.{part}: rows are held out for {part}, but data.{part} is given too: give one of them"
    for name in config.data.test:
        if name in ("train", "val") or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"data.test.{name}: not a name for an evaluation set (letters, digits, - and _; not train or val)"


def _validated(raw: dict[str, Any], base: Path, checks: Sequence[Check], faults: list[str]) -> RunConfig:
    config, found = toml.validate(RunConfig, raw)
    faults += found
    for check in (_missing_files, *checks):
        faults += list(check(raw, base))
    if faults or config is None:
        raise ConfigError(dict.fromkeys(faults))
    return _anchored(config, base)


def _paths(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every file or folder that the raw configuration names, with its dotted path."""
    data = raw.get("data")
    if isinstance(data, Mapping):
        named: list[tuple[str, Any]] = [(f"data.{part}", data.get(part)) for part in _LISTS]
        sets = data.get("test")
        tests = sets if isinstance(sets, Mapping) else {"": sets}
        named += [(f"data.test.{name}".rstrip("."), value) for name, value in tests.items()]
        for dotted, value in named:
            for item in value if isinstance(value, list) else [value]:
                path = item.get("path") if isinstance(item, Mapping) else item
                if isinstance(path, str):
                    yield dotted, path
    for section, key in (("teacher", "embeddings"), ("student", "image_weights")):
        value = raw.get(section)
        if isinstance(value, Mapping) and isinstance(value.get(key), str):
            yield f"{section}.{key}", value[key]
    teacher = raw.get("teacher")
    if isinstance(teacher, Mapping) and str(teacher.get("model", "")).startswith("local-dir:"):
        yield "teacher.model", str(teacher["model"]).removeprefix("local-dir:")


def _missing_files(raw: Mapping[str, Any], base: Path) -> Iterator[str]:
    for dotted, text in _paths(raw):
        path = base / text
        if "{" in text:
            continue  # a range of shards: the reader names the shard that is missing
        if glob.has_magic(text):
            if not glob.glob(str(path)):  # noqa: PTH207 - an absolute pattern, which Path.glob refuses
                yield f"{dotted}: nothing matches {text} (looked in {base})"
        elif not path.exists():
            yield f"{dotted}: no such file or folder: {text} (looked for {path})"


def _anchored(config: RunConfig, base: Path) -> RunConfig:
    """The same configuration with absolute paths, so that a run may be resumed from any folder."""

    def anchor(text: str | None) -> str | None:
        return None if text is None else str(base / text)

    def sources(items: Sources) -> Sources:
        return tuple(item.model_copy(update={"path": anchor(item.path), "root": anchor(item.root)}) for item in items)

    data, teacher, student = config.data, config.teacher, config.student
    model = teacher.model
    if model and model.startswith("local-dir:"):
        model = "local-dir:" + str(base / model.removeprefix("local-dir:"))
    lists = {name: sources(getattr(data, name)) for name in _LISTS}
    tests = {name: sources(items) for name, items in data.test.items()}
    weights = teacher.pretrained
    if weights and (base / weights).is_file():
        weights = str(base / weights)
    own = student.pretrained
    if own and (base / own).is_file():
        own = str(base / own)
    return config.model_copy(
        update={
            "data": data.model_copy(update={**lists, "test": tests}),
            "teacher": teacher.model_copy(
                update={"model": model, "pretrained": weights, "embeddings": anchor(teacher.embeddings)}
            ),
            "cache": config.cache.model_copy(update={"folder": anchor(config.cache.folder)}),
            "student": student.model_copy(update={"image_weights": anchor(student.image_weights), "pretrained": own}),
        }
    )
