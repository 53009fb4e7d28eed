"""The configuration of what the student is for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clipdistill.config.base import Above0, Section, Weight


class TaskConfig(Section):
    """Retrieval, or the classification of pictures by class prompts."""

    kind: Literal["retrieval", "classification"] = "retrieval"
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """The prompts of a class; ``{}`` stands for its name. A class's vector is the mean over them."""
    names: dict[str, str] = Field(default_factory=dict)
    """Names to read for class folders whose own say nothing: {n01440764 = "tench"}."""
    temperature: Above0 = 1.0
    """T of the KL on the teacher's class probabilities, which is multiplied by T squared."""
    distil: Weight = 1.0
    """Of that KL."""
    labels: Weight = 1.0
    """Of the cross entropy on the labels, where they are given."""
