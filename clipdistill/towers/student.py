"""The student: a small open_clip model with its own tokenizer and preprocessing, made, measured and shipped as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.towers import context
from clipdistill.towers.encoder import SearchedTeacher, Vectors
from clipdistill.towers.matryoshka import rotated, sliced
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.pruned import NOTE, narrowed, reshape, shapes_of
from clipdistill.towers.query import TextModel
from clipdistill.towers.tokenizer import StudentTokenizer

Side = Literal["image", "text"]
Item = TypeVar("Item")
_Narrow = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]

CONFIG, WEIGHTS, PROJECTION = "open_clip_config.json", "open_clip_model.safetensors", "projection.safetensors"
MAX_PIXELS = 100_000_000
_KIND, _QUERY_KIND, _VERSION = "student", "query-student", 1
_REMEDY = "Train the student again, or copy its folder again from where it was made."
_MOMENTUM = 0.1  # TensorFlow's networks come with 0.01, with which a short run evaluates on stale statistics


class DualEncoder:
    """A student that embeds pictures and texts: an :class:`~clipdistill.towers.encoder.Encoder`.

    A student that ``searches`` its teacher's pictures has a text tower alone: it is trained, saved and loaded as any
    other, but refuses pictures. :class:`clipdistill.search.QuerySide` makes it an encoder for the teacher's index.

    Args:
        model: An open_clip CustomTextCLIP, as :func:`assemble` makes it.
        model_cfg: The ``model_cfg`` that open_clip makes that model from; without ``vision_cfg`` for a text tower.
        tokenizer: Its tokenizer.
        preprocess: Its preprocessing; None for a text tower alone.
        projection: ``image`` and ``text`` linear maps to the teacher's space; None where both widths are equal and
            there is one width alone.
        dims: The widths that its embeddings can be cut to, falling, the first its own; none = its own alone.
        searches: The teacher whose pictures it searches; None for a student with a picture tower of its own.
        max_pixels: Pictures that claim more are refused.
        pruned: Whether its picture tower has fewer channels than the network that ``model_cfg`` names.
    """

    def __init__(
        self,
        model: nn.Module,
        model_cfg: Mapping[str, Any],
        tokenizer: StudentTokenizer,
        preprocess: Preprocess | None,
        *,
        projection: nn.ModuleDict | None = None,
        dims: Sequence[int] = (),
        searches: SearchedTeacher | None = None,
        max_pixels: int = MAX_PIXELS,
        pruned: bool = False,
    ) -> None:
        self.model: Any = model
        self.tokenizer, self.preprocess, self.projection = tokenizer, preprocess, projection
        self.searches, self.max_pixels, self.pruned = searches, max_pixels, pruned
        self.module = nn.ModuleDict(
            {"model": model} if projection is None else {"model": model, "projection": projection}
        )
        self._model_cfg = deepcopy(dict(model_cfg))
        self.dims = tuple(dims) or (self.dim,)
        self._memory_format = torch.channels_last if prefers_channels_last(model) else torch.contiguous_format
        self.module.to(memory_format=self._memory_format)

    @property
    def model_cfg(self) -> dict[str, Any]:
        """A copy of the ``model_cfg`` that open_clip makes its model from."""
        return deepcopy(self._model_cfg)

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return int(self._model_cfg["embed_dim"])

    @property
    def teacher_dim(self) -> int:
        """The width of the teacher's embeddings, which :meth:`to_teacher` maps to."""
        return self.dim if self.projection is None else len(self.projection.get_parameter("text.weight"))

    @property
    def parameters(self) -> int:
        """How many parameters it has: its towers and, where there is one, the projection."""
        return sum(value.numel() for value in self.module.parameters())

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding: weights, preprocessing, tokenizer; not the logit scale."""
        weights = {name: value for name, value in self.module.state_dict().items() if "logit_" not in name}
        preprocess = None if self.preprocess is None else self.preprocess.to_open_clip()
        parts = [fingerprint.of_tensors(weights), preprocess, self.tokenizer.fingerprint]
        return fingerprint.of_value(parts)

    def to(self, device: torch.device | str) -> DualEncoder:
        """Move it to a device, in place."""
        self.module.to(device)
        return self

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed prepared pictures, differentiably.

        Args:
            pixels: float [pictures, 3, height, width].

        Returns:
            float32 [pictures, dim], unit rows.

        Raises:
            DataError: If it has no picture tower.
        """
        self._picture_preprocess()
        features = self.model.visual(pixels.contiguous(memory_format=self._memory_format))
        return F.normalize(features.float(), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embed token rows of any length up to the context, differentiably.

        Args:
            tokens: int64 [texts, length].

        Returns:
            float32 [texts, dim], unit rows.
        """
        return F.normalize(context.encode_by_length(self.model, tokens).float(), dim=-1)

    def to_teacher(self, embeddings: Tensor, side: Side) -> Tensor:
        """Map embeddings to the teacher's space, differentiably; the identity where there is no map.

        Args:
            embeddings: float [rows, dim], or cut to one of ``dims``: the map's first columns are used then.
            side: Which tower they are from; a student without a picture tower has the teacher's own pictures, which
                are there already.

        Returns:
            float [rows, teacher_dim], unit rows.
        """
        if self.projection is None or (side == "image" and self.searches is not None):
            return embeddings
        weight = self.projection.get_parameter(f"{side}.weight")
        return F.normalize(F.linear(embeddings, weight[:, : embeddings.shape[1]]), dim=-1)

    def to_teacher_vectors(self, vectors: Vectors, side: Side) -> Vectors:
        """Map stored embeddings to the teacher's space: float32 [rows, teacher_dim], unit rows."""
        with torch.inference_mode():
            rows = torch.from_numpy(np.array(vectors, np.float32)).to(self.device)
            return _numpy(self.to_teacher(rows, side))

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed pictures: float32 [pictures, dim], unit rows.

        Args:
            pictures: What to embed.
            batch: How many go through the tower at once; never changes a result beyond rounding.

        Raises:
            DataError: If a picture cannot be read or decoded, naming it, or it has no picture tower.
        """
        preprocess = self._picture_preprocess()
        vectors = np.zeros((len(pictures), self.dim), np.float32)
        with _evaluating(self.module):
            for start in range(0, len(pictures), batch):
                part = pictures[start : start + batch]
                pixels = preprocess.read(part, self.max_pixels)
                embedded = self.embed_pixels(torch.from_numpy(pixels).to(self.device))
                vectors[start : start + len(part)] = _numpy(embedded)
        return vectors

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts: float32 [texts, dim], unit rows, in the order of the texts.

        Args:
            texts: What to embed.
            batch: How many go through the tower at once; never changes a result beyond rounding. Texts of like length
                go together, so that little of a batch is padding.
        """
        vectors = np.zeros((len(texts), self.dim), np.float32)
        with _evaluating(self.module):
            for rows, tokens in self.tokenizer.by_length(texts, batch):
                vectors[rows] = _numpy(self.embed_tokens(torch.from_numpy(tokens).to(self.device)))
        return vectors

    def set_scale(self, scale: float, bias: float | None = None) -> None:
        """Set what open_clip multiplies its cosines with, and adds to them; no embedding changes.

        Args:
            scale: exp(logit_scale): 1 / temperature.
            bias: SigLIP's logit bias; None leaves the model's own, if it has one.

        Raises:
            ConfigError: If the scale is not positive.
        """
        if not scale > 0:
            raise ConfigError(f"logit_scale: must be above 0, got {scale}")
        with torch.no_grad():
            self.model.logit_scale.fill_(float(np.log(scale)))
            if bias is not None and self.model.logit_bias is None:
                self.model.logit_bias = nn.Parameter(torch.zeros_like(self.model.logit_scale))
                self._model_cfg["init_logit_bias"] = bias
            if bias is not None:
                self.model.logit_bias.fill_(bias)

    def truncate(self, dim: int) -> DualEncoder:
        """A student of its own whose embeddings are this one's first entries, made unit again.

        Its last layers are this student's first rows, so it is smaller; a pruned student's is pruned alike, any
        other's is an ordinary open_clip model.

        Args:
            dim: One of ``dims``.

        Raises:
            ConfigError: If the student was not trained for this width, or its last layer cannot be cut.
        """
        if dim not in self.dims:
            known = ", ".join(map(str, self.dims))
            raise ConfigError(f"dim: {dim} is not a width that the student was trained for ({known}): student.dims")
        return self._narrower(dim, sliced, [width for width in self.dims if width <= dim])

    def rotate(self, axes: Tensor) -> DualEncoder:
        """A student of its own whose embeddings are this one's, projected on some axes and made unit again.

        The axes go into its last layers, so it is smaller and no slower. They need not be those of a width that it was
        trained for: principal axes of its embeddings lose the least.

        Args:
            axes: float [dim, narrower], orthonormal columns.

        Raises:
            ConfigError: If the axes do not fit, or its last layers are not linear maps.
        """
        if axes.ndim != 2 or len(axes) != self.dim or not 1 <= axes.shape[1] < self.dim:
            raise ConfigError(
                f"axes: {list(axes.shape)} do not narrow embeddings of {self.dim}: give [{self.dim}, fewer]"
            )
        return self._narrower(axes.shape[1], partial(rotated, axes=axes), [axes.shape[1]])

    def _narrower(self, dim: int, narrow: _Narrow, dims: Sequence[int]) -> DualEncoder:
        """A student of ``dim`` whose last layers are this one's, made narrower."""
        model_cfg = {**self._model_cfg, "embed_dim": dim}
        model = assemble(model_cfg)
        if self.pruned:
            whole = shapes_of(assemble(self._model_cfg))
            reshape(model, narrowed(shapes_of(self.model), whole, shapes_of(model)))
        model.load_state_dict(narrow(self.model.state_dict(), model.state_dict()))
        projection = None
        if self.projection is not None:
            projection = projections(dim, self.teacher_dim, sides=projected_sides(self.searches))
            projection.load_state_dict(narrow(self.projection.state_dict(), projection.state_dict()))
        narrower = DualEncoder(
            model,
            model_cfg,
            self.tokenizer,
            self.preprocess,
            projection=projection,
            dims=dims,
            searches=self.searches,
            max_pixels=self.max_pixels,
            pruned=self.pruned,
        ).to(self.device)
        narrower.module.eval()
        return narrower

    def save(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the student as a folder that open_clip loads as ``local-dir:FOLDER``, unless it is a text tower alone.

        open_clip cannot load a pruned student, whose layers are narrower than those that its configuration names: it
        stops with ``size mismatch for visual.trunk...``. Its manifest says so under ``pruned``; :meth:`load` reads it.

        Args:
            folder: Takes the place of whatever is there, at once and only when all is written.
            extra: Further values for the manifest: what the student was made from.
        """
        folder = Path(folder)
        with files.replaced_folder(folder) as aside:
            files.write_json(aside / CONFIG, self._config())
            save_file(_plain(self.model), aside / WEIGHTS, metadata={"format": "pt"})
            self.tokenizer.save(aside)
            if self.projection is not None:
                save_file(_plain(self.projection), aside / PROJECTION, metadata={"format": "pt"})
            values = {
                "fingerprint": self.fingerprint,
                "dim": self.dim,
                "teacher_dim": self.teacher_dim,
                "dims": list(self.dims),
                "parameters": self.parameters,
                **({"pruned": NOTE} if self.pruned else {}),
                "extra": dict(extra or {}),
            }
            manifest.write(aside, _KIND if self.searches is None else _QUERY_KIND, _VERSION, values)

    @staticmethod
    def load(folder: str | Path, *, max_pixels: int = MAX_PIXELS) -> DualEncoder:
        """Read what :meth:`save` wrote, after comparing every file with the manifest's SHA-256.

        Args:
            folder: A student's folder.
            max_pixels: Pictures that claim more are refused.

        Raises:
            DataError: If it is not a student's folder.
            MismatchError: If a file is missing or is not the one that was written.
        """
        folder = Path(folder)
        values = manifest.read(folder, (_KIND, _QUERY_KIND), _VERSION, _REMEDY)
        manifest.verify_files(folder, values.get("files", {}), _REMEDY)
        config = files.read_json(folder / CONFIG)
        try:
            model = assemble(config["model_cfg"])
        except (AssertionError, RuntimeError, TypeError, ValueError) as fault:
            raise DataError(
                f"{folder}: its model cannot be rebuilt here ({fault}). It was made with {values.get('libraries')}; "
                f"installed: {manifest.libraries()}"
            ) from fault
        weights, pruned = load_file(folder / WEIGHTS), "pruned" in values
        if pruned:
            reshape(model, {name: value.shape for name, value in weights.items()})
        model.load_state_dict(weights)
        searches = SearchedTeacher(**config["searches"]) if "searches" in config else None
        projection = None
        if (folder / PROJECTION).exists():
            projection = projections(values["dim"], values["teacher_dim"], sides=projected_sides(searches))
            projection.load_state_dict(load_file(folder / PROJECTION))
        tokenizer = StudentTokenizer.load(folder)
        preprocess = Preprocess.from_open_clip(config["preprocess_cfg"]) if searches is None else None
        student = DualEncoder(
            model,
            config["model_cfg"],
            tokenizer,
            preprocess,
            projection=projection,
            dims=values.get("dims", ()),
            searches=searches,
            max_pixels=max_pixels,
            pruned=pruned,
        )
        if student.fingerprint != values["fingerprint"]:
            raise MismatchError(str(folder), "fingerprint", values["fingerprint"], student.fingerprint, _REMEDY)
        student.module.eval()
        return student

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"model_cfg": self._model_cfg}
        if self.preprocess is not None:
            config["preprocess_cfg"] = self.preprocess.to_open_clip()
        if self.searches is not None:
            config["searches"] = asdict(self.searches)
        return config

    def _picture_preprocess(self) -> Preprocess:
        """Its preprocessing.

        Raises:
            DataError: If it has no picture tower.
        """
        if self.preprocess is None:
            name = "the teacher" if self.searches is None else f"the teacher {self.searches.name}"
            raise DataError(
                f"this student has a text tower alone: pictures are embedded by {name}. Search its index with texts, "
                "or embed pictures with that teacher"
            )
        return self.preprocess


def assemble(model_cfg: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Make a model by open_clip's own class, as open_clip itself would from the saved configuration.

    Args:
        model_cfg: open_clip's ``model_cfg``, with ``custom_text``; without ``vision_cfg`` a text tower alone is made.
        seed: Decides the random weights; the ambient random state is neither used nor moved.
    """
    from open_clip.model import CustomTextCLIP

    arguments = {key: deepcopy(value) for key, value in model_cfg.items() if key != "custom_text"}
    with seeded(seed):
        model: nn.Module = CustomTextCLIP(**arguments) if "vision_cfg" in arguments else TextModel(**arguments)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = _MOMENTUM
    return model


def projections(
    dim: int,
    teacher_dim: int,
    seed: int = 0,
    axes: Tensor | None = None,
    *,
    sides: Sequence[Side] = ("image", "text"),
) -> nn.ModuleDict:
    """Linear maps from the student's space to the teacher's, at first one and the same rotation for all sides.

    Args:
        dim: The student's width.
        teacher_dim: The teacher's.
        seed: Decides the rotation.
        axes: The rotation itself [teacher_dim, dim], such as the teacher's principal axes; None draws one.
        sides: Which towers there are.
    """
    with seeded(seed):
        rotation = nn.init.orthogonal_(torch.empty(teacher_dim, dim))
        if axes is not None:
            rotation[:, : axes.shape[1]] = axes  # a student wider than its teacher keeps drawn columns for the rest
        maps: dict[str, nn.Module] = {side: nn.Linear(dim, teacher_dim, bias=False) for side in sides}
    for linear in maps.values():
        linear.get_parameter("weight").data.copy_(rotation)
    return nn.ModuleDict(maps)


def projected_sides(searches: SearchedTeacher | None) -> tuple[Side, ...]:
    """The sides that have a map to the teacher's space: a text tower alone has no picture side."""
    return ("image", "text") if searches is None else ("text",)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block in which torch's CPU randomness starts from a seed; the ambient state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def prefers_channels_last(model: nn.Module) -> bool:
    """Whether the picture tower is convolutional: such towers run 1.3-5 times faster with the channels last."""
    tower = getattr(model, "visual", model)
    return sum(isinstance(part, nn.Conv2d) for part in tower.modules()) > 4  # a ViT's patch embedding is one or a few


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A block without gradients and with every part in eval mode; each part's own mode is put back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():  # not inference mode: a network may keep a table that training needs with gradients
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _numpy(rows: Tensor) -> Vectors:
    return np.asarray(rows.cpu().numpy(), np.float32)


def _plain(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights in the plain memory order, one storage each, as safetensors needs them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
