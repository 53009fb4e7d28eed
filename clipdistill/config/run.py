"""A whole run's configuration, and what its sections have to agree on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import model_validator

from clipdistill.config.base import Section
from clipdistill.config.compress import CompressConfig
from clipdistill.config.data import DataConfig
from clipdistill.config.export import ExportConfig
from clipdistill.config.features import FeaturesConfig, feature_faults
from clipdistill.config.loss import LossConfig
from clipdistill.config.measure import EvaluateConfig, IndexConfig, ReportConfig
from clipdistill.config.paths import anchored, missing_files, missing_scales
from clipdistill.config.student import StudentConfig
from clipdistill.config.sweep import SweepConfig
from clipdistill.config.task import TaskConfig
from clipdistill.config.teacher import CacheConfig, TeacherConfig
from clipdistill.config.train import MutualConfig, TrainConfig
from clipdistill.core import toml
from clipdistill.core.errors import ConfigError, suggest

Check = Callable[[Mapping[str, Any], Path], Iterable[str]]


class RunConfig(Section):
    """One run, from the data to the report."""

    name: str
    seed: int = 17
    data: DataConfig
    teacher: TeacherConfig
    cache: CacheConfig = CacheConfig()
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    features: FeaturesConfig = FeaturesConfig()
    task: TaskConfig = TaskConfig()
    train: TrainConfig = TrainConfig()
    mutual: MutualConfig = MutualConfig()
    sweep: SweepConfig = SweepConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    compress: CompressConfig = CompressConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        checks = (
            _train_faults,
            _loss_faults,
            _mode_faults,
            feature_faults,
            _set_faults,
            _width_faults,
            _inherit_faults,
            _prune_faults,
            _ensemble_faults,
            _query_side_faults,
            _task_faults,
            _compress_faults,
            _export_faults,
        )
        faults = [fault for check in checks for fault in check(self)]
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


def _loss_faults(config: RunConfig) -> Iterator[str]:
    if config.loss.queue and config.train.mode != "cached":
        yield (
            f"loss.queue: its rows are the teacher's stored embeddings, which train.mode = {config.train.mode!r} "
            'does not have; set loss.queue=0, or train.mode = "cached"'
        )


def _mode_faults(config: RunConfig) -> Iterator[str]:
    """What a teacher that runs while the student trains cannot do."""
    mode, teacher = config.train.mode, config.teacher
    if mode == "cached":
        return
    stored = [f"members.{number}" for number, one in enumerate(teacher.members) if one.embeddings is not None]
    for name in [*(["embeddings"] if teacher.embeddings is not None else []), *stored]:
        remedy = 'give the model, or train.mode = "cached"'
        yield f'teacher.{name}: train.mode = "{mode}" runs the teacher, and embeddings are no teacher to run; {remedy}'
    if mode == "mutual":
        yield from _mutual_faults(config)


def _mutual_faults(config: RunConfig) -> Iterator[str]:
    if config.teacher.members:
        yield 'teacher.members: train.mode = "mutual" trains one teacher with the student; give teacher.model'
    if config.teacher.precision != "fp32":
        found = config.teacher.precision
        yield f'teacher.precision: train.mode = "mutual" trains the teacher in fp32, not in {found}'
    if config.task.kind != "retrieval":
        yield 'task.kind: class prompts are embedded once, by a teacher that stands still; set train.mode = "live"'
    if not config.train.batch:
        yield 'train.batch: train.mode = "mutual" needs pairs: the teacher learns its own task from them'


def _width_faults(config: RunConfig) -> Iterator[str]:
    dims, dim = config.student.dims, config.student.dim
    if any(wide <= narrow for wide, narrow in pairwise(dims)):
        yield f"student.dims: must fall from the full width on, got {list(dims)}"
    if dims and dim is not None and dim != dims[0]:
        yield f"student.dims: begins with {dims[0]}, but student.dim is {dim}: leave student.dim out, or begin with it"


def _inherit_faults(config: RunConfig) -> Iterator[str]:
    student, schedule = config.student, config.student.inherit.schedule
    inherited = [side for side in ("image", "text") if getattr(student, side) == "inherit"]
    if inherited and config.teacher.model is None:
        yield (
            f'student.{inherited[0]}: "inherit" cuts the tower out of one live model, and the teacher is an ensemble '
            "or embeddings alone; give teacher.model, or name a tower"
        )
    if student.image == "inherit" and student.image_init == "random":
        yield 'student.image_init: "random", but student.image = "inherit" takes the teacher\'s weights'
    if student.image == "inherit" and student.image_weights is not None:
        yield 'student.image_weights: given, but student.image = "inherit" takes the teacher\'s weights; leave it out'
    if student.text == "inherit" and student.text_init != "inherit":
        yield f'student.text_init: "{student.text_init}", but student.text = "inherit" takes the teacher\'s weights'
    if schedule and not inherited:
        yield 'student.inherit.schedule: no tower is inherited; set student.image or student.text to "inherit"'
    if schedule:
        yield from _schedule_faults(config)


def _schedule_faults(config: RunConfig) -> Iterator[str]:
    """What does not go with progressive inheritance."""
    rule, schedule = config.student.inherit, config.student.inherit.schedule
    if any(later >= earlier for earlier, later in pairwise(schedule)):
        yield f"student.inherit.schedule: must be falling shares such as [0.5, 0.25], got {list(schedule)}"
    for key in ("heads", "mlp"):
        if getattr(rule, key) is not None:
            yield f"student.inherit.{key}: a schedule's shares hold for depth, width, heads and MLP alike; leave it out"
    if config.train.budget_minutes is not None:
        yield "train.budget_minutes: a schedule divides steps, not a time; give train.steps instead"
    if config.features.image or config.features.text:
        yield "features: a schedule changes which blocks the student has; leave features or the schedule out"
    if config.train.steps < len(schedule):
        yield f"train.steps: {config.train.steps} cannot be divided among {len(schedule)} shares of the schedule"


def _prune_faults(config: RunConfig) -> Iterator[str]:
    """A tower that ``student.prune`` has no say about."""
    student = config.student
    if student.prune is None:
        return
    if student.image == "inherit":
        yield 'student.prune: is for a named tower; with student.image = "inherit" set student.inherit.width'
    if student.image == "teacher":
        yield 'student.prune: student.image = "teacher" keeps the teacher\'s own picture tower; leave it out'


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


def _ensemble_faults(config: RunConfig) -> Iterator[str]:
    """What an ensemble of teachers cannot do."""
    members = config.teacher.members
    if not members:
        return
    if config.student.image == "teacher":
        yield 'student.image: "teacher" keeps one teacher\'s picture tower, and teacher.members names several'


def _query_side_faults(config: RunConfig) -> Iterator[str]:
    """What does not go with ``student.image = "teacher"``, where no picture tower is trained."""
    student, train = config.student, config.train
    if student.image != "teacher":
        return
    why = 'does not go with student.image = "teacher"'
    if train.mode != "cached":
        yield f'train.mode: {train.mode!r} {why}: no picture passes through a student; use train.mode = "cached"'
    given = {
        "student.image_init": student.image_init != "pretrained",
        "student.image_weights": student.image_weights is not None,
        "student.image_size": student.image_size is not None,
        "student.dims": len(student.dims) > 1,
        "train.batch_images": train.batch_images > 0,
        "train.lr_image": train.lr_image is not None,
        "train.lr_head": train.lr_head is not None,
        "loss.masked_feature": bool(config.loss.masked_feature),
        "features.image": bool(config.features.image),
    }
    if student.text == "inherit":
        yield f'student.text: "inherit" {why}: name a preset or an open_clip configuration with a text tower of its own'
    stay, reasons = "the pictures stay the teacher's", {"student.dims": "the teacher's index has one width"}
    for key, is_given in given.items():
        if is_given:
            yield f"{key}: {why}: {reasons.get(key, stay)}; leave it out"
    if config.task.kind != "retrieval":
        yield f'task.kind: {config.task.kind!r} {why}: it needs a picture tower; use task.kind = "retrieval"'


def _task_faults(config: RunConfig) -> Iterator[str]:
    if config.task.kind == "retrieval":
        yield from _class_only(config)
        return
    yield from _prompt_faults(config.task)
    data = config.data
    if not data.train:
        yield "data.train: missing: it says which classes there are"
    if data.hold_out.by == "caption" and data.hold_out.val + data.hold_out.test > 0:
        yield 'data.hold_out.by: "caption" would hold out whole classes; take "key" or "picture"'
    if config.train.mode == "mutual":
        yield 'train.mode: "mutual" changes the teacher, whose class vectors task.kind = "classification" fixes'
    if config.teacher.members and config.teacher.combine == "probabilities":
        yield 'teacher.combine: "probabilities" has no one class vector; task.kind = "classification" takes "logits"'


def _prompt_faults(task: TaskConfig) -> Iterator[str]:
    if not task.templates:
        yield 'task.templates: empty, so a class has no prompt; give one or more, such as "a photo of a {}."'
    for template in task.templates:
        if "{}" not in template:
            yield f"task.templates: {template!r} has no {{}}, where the class's name goes"
    if len(set(task.templates)) < len(task.templates):
        yield "task.templates: a template is given twice"
    for label, name in task.names.items():
        if not name.strip():
            yield f"task.names.{label}: a blank name"


def _class_only(config: RunConfig) -> Iterator[str]:
    """Sources that speak of classes where the task has none."""
    data = config.data
    named = [("data.train", data.train), ("data.val", data.val)]
    named += [(f"data.test.{name}", sources) for name, sources in data.test.items()]
    for dotted, sources in named:
        if any(source.format == "classes" or source.label is not None for source in sources):
            yield f'{dotted}: format classes and label are for task.kind = "classification", and it is "retrieval"'


def _export_faults(config: RunConfig) -> Iterator[str]:
    """What an export of this student cannot be."""
    export, student = config.export, config.student
    for key, given in (("layouts", export.layouts), ("precisions", export.precisions)):
        if len(set(given)) < len(given):
            yield f"export.{key}: a name is given twice: {', '.join(given)}"
    if not export.precisions:
        yield "export.precisions: none are given; valid: fp32, fp16, int8"
    for layout, name in (("open_clip", "open_clip"), ("clip_model", "CLIPModel")):
        if layout in export.layouts and student.image == "teacher":
            yield (
                f'export.layouts: {name} has no text tower alone, which student.image = "teacher" makes; '
                f"leave {layout} out"
            )
        if layout in export.layouts and (student.prune or 1) < 1:
            yield f"export.layouts: {name} cannot rebuild the narrower tower of student.prune; leave {layout} out"
    if "sentence_transformers" in export.layouts and (student.prune or 1) < 1:
        yield (
            "export.layouts: sentence_transformers cannot rebuild the narrower tower of student.prune; "
            "leave sentence_transformers out"
        )
    for name in ("immich", "vectors"):
        if name in export.layouts and student.image == "teacher":
            yield f'export.layouts: {name} needs a picture tower, not student.image = "teacher"; leave it out'


def _validated(raw: dict[str, Any], base: Path, checks: Sequence[Check], faults: list[str]) -> RunConfig:
    config, found = toml.validate(RunConfig, raw)
    faults += found
    for check in (missing_files, missing_scales, *checks):
        faults += list(check(raw, base))
    if faults or config is None:
        raise ConfigError(dict.fromkeys(faults))
    whole: RunConfig = config.model_copy(update=anchored(config, base))
    return whole


def _compress_faults(config: RunConfig) -> Iterator[str]:
    compress, dims = config.compress, config.compress.dims
    if any(wide <= narrow for wide, narrow in pairwise(dims)):
        yield f"compress.dims: must fall, got {list(dims)}"
    for key in ("factories", "rotations", "precisions"):
        if not getattr(compress, key):
            yield f"compress.{key}: nothing to try; name one or more, or leave it out"
    for key in ("precisions", "prune"):
        given = getattr(compress, key)
        if len(set(given)) < len(given):
            yield f"compress.{key}: a value is given twice: {', '.join(map(str, given))}"
    if config.student.image == "teacher" and dims:
        yield 'compress.dims: does not go with student.image = "teacher": the index is the teacher\'s; leave it out'
    if any(share < 1 for share in compress.prune):
        yield from _recovery_faults(config)


def _recovery_faults(config: RunConfig) -> Iterator[str]:
    """What a pruned picture tower could not recover with."""
    if config.student.image == "teacher":
        yield 'compress.prune: does not go with student.image = "teacher": there is no picture tower; leave it out'
    if config.train.mode != "cached":
        yield (
            "compress.prune: a pruned tower recovers from the training rows' stored embeddings, which train.mode = "
            f'"{config.train.mode}" does not have; leave it out'
        )
    if not config.train.batch + config.train.batch_images:
        yield "compress.prune: a pruned tower recovers on pictures, and train.batch and train.batch_images are 0"
