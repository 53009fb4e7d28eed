"""The configuration of the student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipdistill.config.base import Positive, Section

Ratio = Annotated[float, Field(gt=0, le=1)]


class InheritConfig(Section):
    """How a student is cut out of its teacher; 1.0 everywhere keeps the teacher bit for bit.

    Of a teacher's picture tower that is a timm CNN, ``width`` is the share of channels that is kept, and of the other
    keys ``importance`` and ``calibration`` alone apply.
    """

    depth: Ratio = 0.5
    """The share of the transformer blocks that is kept."""
    width: Ratio = 0.5
    """The share of the residual width, and with it of the heads, that is kept."""
    heads: Ratio | None = None
    """The share of the attention heads of each block; none = ``width``."""
    mlp: Ratio | None = None
    """The share of the hidden units of each block's MLP; none = ``width``."""
    depth_by: Literal["stride", "importance"] = "stride"
    width_by: Literal["first", "importance"] = "importance"
    importance: Literal["activation", "taylor"] = "activation"
    """How a part's importance is measured on the calibration rows; a CNN's ``activation`` is its weights' norm."""
    calibration: Positive = 256
    """How many pictures and texts of ``data.train`` measure it."""
    refit: bool = True
    """Whether the layers that are left are fitted to the teacher's activations on those rows, by least squares."""
    schedule: tuple[Ratio, ...] = ()
    """Progressive inheritance: the shares that are passed through, falling, such as [0.5, 0.25]; they take the place
    of ``depth`` and ``width``, and the steps of training are divided evenly among them. Empty = at once."""


class StudentConfig(Section):
    """The small model."""

    image: str = "nano"
    """A preset (nano, tiny, small), an open_clip config, a timm model; ``inherit`` cuts the teacher's own tower, and
    ``teacher`` keeps it: then only a text tower is trained, into the teacher's existing index."""
    text: str = "nano"
    """A preset (nano, tiny, small), or an open_clip config; ``inherit`` cuts the teacher's own tower."""
    inherit: InheritConfig = InheritConfig()
    prune: Ratio | None = None
    """The share of its channels that a named timm CNN keeps (structured pruning; ``inherit.importance`` and
    ``inherit.calibration`` say by what); none = all."""
    image_init: Literal["pretrained", "random"] = "pretrained"
    text_init: Literal["inherit", "pretrained", "random"] = "inherit"
    pretrained: str | None = None
    """An open_clip tag or a file: the weights of an open_clip config with ``pretrained`` towers."""
    image_weights: str | None = None
    """A safetensors file with the picture tower's weights under timm's names, where no hub is reached."""
    image_size: Positive | None = None
    dim: Positive | None = None
    """The width of the embeddings; none = the teacher's. A projection to the teacher's is saved with the student."""
    dims: tuple[Positive, ...] = ()
    """Widths that the embeddings can be cut to (Matryoshka), falling; the first is ``dim``. Empty = one width."""
    vocab_size: Positive | None = None
    """At most so many word pieces are kept from the teacher's vocabulary; none = all that the texts use."""
