"""Students that are plain ViTs with a plain text transformer: what CLIPModel can be."""

import numpy as np
import torch
from training import little

from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import DualEncoder, assemble


def vit(*, quick_gelu=False, vision=None, text=None, preprocess=None, **more):
    """A student of two blocks a tower; every weight is moved a little, so that none is left at 0 or 1."""
    words = little.tokenizer()
    first = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, **(vision or {})}
    second = {"context_length": 16, "vocab_size": words.vocab_size, "width": 48, "heads": 3, "layers": 2}
    cfg = {"embed_dim": 24, "custom_text": True, "quick_gelu": quick_gelu, "vision_cfg": first}
    cfg |= {"text_cfg": {**second, **(text or {})}, **more}
    student = DualEncoder(assemble(cfg, 1), cfg, words, preprocess or Preprocess(size=(32, 32)))
    draw = torch.Generator().manual_seed(0)
    for value in student.module.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=draw)
    student.module.eval()
    return student


def cosine(found, wanted):
    """The least cosine of matching rows."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((found * wanted).sum(axis=1) / norms).min())
