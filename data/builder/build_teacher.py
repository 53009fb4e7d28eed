"""Fit the projection heads of the demo's teacher: ``heads.safetensors`` and what goes with it in ``data/teacher``.

Run: ``python data/builder/build_teacher.py --work FOLDER``, after ``build_emoji.py``. Both pretrained towers stay
frozen, so each picture and caption goes through its tower once; the features are kept in the folder (about 10 minutes
on two cores). The settings were chosen with ``--cross-validate``: whole concepts of `train` and `val` are held out in
turn. `test` and `unseen` are looked at once, for the report.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from sources import share
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.demo_teacher import CONFIG, PICTURE_TOWER, assemble_teacher

SIDES = (160, 192)
WIDTH, DIM = {"image": 1280, "text": 384}, 256
SEED = 17
EPOCHS, BATCH, RATE, DECAY, WARM_UP = 50, 256, 1e-3, 1e-2, 50
DROP = {"image": 0.5, "text": 0.2, "hidden": 0.2}
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0
FOLDS = 5
SPLITS = ("train", "val", "test", "unseen")
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """All pictures with their features: one row a picture, in the order of the splits and of their keys.

    Attributes:
        split: The split's name of each picture.
        concept: The concept's number of each picture.
        held: The fold of each picture's concept, for cross-validation.
        captions: Each picture's two captions as rows of ``texts``; the same twice where there is only one.
        images: float32 [pictures, 1280].
        texts: float32 [captions, 384].
    """

    split: npt.NDArray[np.str_]
    concept: Tensor
    held: npt.NDArray[np.int64]
    captions: Tensor
    images: Tensor
    texts: Tensor


class Heads(nn.Module):
    """Both projection heads in open_clip's `mlp` form, with the logarithm of the logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image = timm.layers.Mlp(WIDTH["image"], 2 * DIM, DIM, bias=(True, False))
        hidden = (WIDTH["text"] + DIM) // 2
        self.text = nn.Sequential(
            nn.Linear(WIDTH["text"], hidden, bias=False), nn.GELU(), nn.Linear(hidden, DIM, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())

    def embed(self, images: Tensor, texts: Tensor, drop: Any = lambda values, share: values) -> tuple[Tensor, Tensor]:
        """Unit rows of both sides; ``drop`` is applied to the features and between the layers."""
        image = F.gelu(self.image.fc1(drop(images, DROP["image"])))
        text = F.gelu(self.text[0](drop(texts, DROP["text"])))
        image, text = self.image.fc2(drop(image, DROP["hidden"])), self.text[2](drop(text, DROP["hidden"]))
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def named(self) -> dict[str, Tensor]:
        """The tensors under the names that open_clip's model gives them, float16 but for the scale."""
        renamed = {"image.": "visual.head.mlp.", "text.": "text.proj."}
        state = {"logit_scale": self.logit_scale.detach().clone()}
        for name, value in self.state_dict().items():
            for old, new in renamed.items():
                if name.startswith(old):
                    state[new + name.removeprefix(old)] = value.half().contiguous()
        return state


def configuration(side: int) -> dict[str, Any]:
    """open_clip's description of the teacher for square pictures of ``side`` pixels."""
    vision = {"image_size": side, "timm_model_name": PICTURE_TOWER, "timm_model_pretrained": False}
    # The two names are filled in by `assemble_teacher`: open_clip reads local folders by absolute path only.
    names = {"hf_model_name": "", "hf_tokenizer_name": ""}
    return {
        "model_cfg": {
            "embed_dim": DIM,
            "custom_text": True,
            "vision_cfg": {**vision, "timm_pool": "avg", "timm_proj": "mlp"},
            "text_cfg": {"context_length": 77, **names, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"},
        },
        "preprocess_cfg": {
            "size": side,
            "mode": "RGB",
            "mean": [127 / 255] * 3,
            "std": [128 / 255] * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
    }


def write_heads(heads: Heads, folder: Path, side: int) -> Path:
    """Write the heads and the configuration that goes with them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(configuration(side), indent=2) + "\n", encoding="utf-8")
    (folder / "heads.safetensors").write_bytes(save(heads.named()))
    return folder / "heads.safetensors"


def read_table(emoji: Path, work: Path, side: int) -> Table:
    """The data set with its features, computed where ``work`` does not hold them yet."""
    parts = {split: pq.read_table(emoji / f"{split}.parquet").to_pylist() for split in SPLITS}
    rows = [row for split in SPLITS for row in parts[split]]
    texts = sorted({caption for row in rows for caption in row["captions"]})
    place = {text: number for number, text in enumerate(texts)}
    concepts = sorted({row["concept"] for row in rows})
    number = {concept: at for at, concept in enumerate(concepts)}
    kept = work / f"features-{side}.safetensors"
    if not kept.exists():
        save_file(encode([row["image"]["bytes"] for row in rows], texts, work, side), kept)
    features = load_file(kept)
    return Table(
        split=np.array([split for split in SPLITS for _ in parts[split]]),
        concept=torch.tensor([number[row["concept"]] for row in rows]),
        held=np.array([int(share(f"fold:{row['concept']}") * FOLDS) for row in rows]),
        captions=torch.tensor([[place[row["captions"][0]], place[row["captions"][-1]]] for row in rows]),
        images=features["images"],
        texts=features["texts"],
    )


@torch.inference_mode()
def encode(pictures: list[bytes], texts: list[str], work: Path, side: int) -> dict[str, Tensor]:
    """What both frozen towers say, before any head: float32 [pictures, 1280] and [texts, 384]."""
    import open_clip

    torch.manual_seed(SEED)
    name = f"local-dir:{assemble_teacher(work / 'towers', write_heads(Heads(), work / 'heads', side))}"
    model, transform = open_clip.create_model_from_pretrained(name)
    tokens = open_clip.get_tokenizer(name)(texts)
    trunk = model.eval().visual.trunk.to(memory_format=torch.channels_last)
    images = []
    for start in range(0, len(pictures), 32):
        batch = [transform(Image.open(io.BytesIO(data))) for data in pictures[start : start + 32]]
        images.append(trunk(torch.stack(batch).to(memory_format=torch.channels_last)))
        if start % 640 == 0:
            print(f"pictures {start} of {len(pictures)}", flush=True)
    order = (tokens != 0).sum(1).argsort()
    pooled = torch.empty(len(texts), WIDTH["text"])
    for rows in order.split(128):
        part = tokens[rows][:, : int((tokens[rows] != 0).sum(1).max())]
        mask = (part != 0).long()
        pooled[rows] = model.text.pooler(model.text.transformer(input_ids=part, attention_mask=mask), mask)
    return {"images": torch.cat(images).contiguous(), "texts": pooled}


def contrast(image: Tensor, text: Tensor, concept: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss with several positives: cross entropy to the targets that share a row's concept, both directions."""
    same = (concept[:, None] == concept[None]).float()
    target = same / same.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return -((target * logits.log_softmax(1)).sum(1).mean() + (target * logits.T.log_softmax(1)).sum(1).mean()) / 2


def fit(table: Table, rows: Rows, seed: int = SEED) -> Heads:
    """Fit fresh heads on the given pictures, and fold the features' standardisation into their first layers."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the layers' first values
    heads = Heads()
    images, texts = table.images[rows], table.texts[table.captions[rows].unique()]
    middle, spread, unit = images.mean(0), images.std(0) + 1e-2, texts.std()

    def drop(values: Tensor, part: float) -> Tensor:
        return values * (torch.rand(values.shape, generator=random) >= part) / (1 - part)

    weights = [value for name, value in heads.named_parameters() if name != "logit_scale"]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": [heads.logit_scale], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE)
    steps = EPOCHS * (len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 + np.cos(np.pi * min(1, step / steps))) / 2
    )
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(rows), generator=random).split(BATCH)[: len(rows) // BATCH]:
            chosen = torch.as_tensor(rows)[batch]
            caption = table.captions[chosen, torch.randint(2, (BATCH,), generator=random)]
            image, text = heads.embed((table.images[chosen] - middle) / spread, table.texts[caption] / unit, drop)
            scale = heads.logit_scale.exp().clamp(max=LARGEST_SCALE)
            optimiser.zero_grad()
            contrast(image, text, table.concept[chosen], scale).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        heads.image.fc1.weight /= spread
        heads.image.fc1.bias -= heads.image.fc1.weight @ middle
        heads.text[0].weight /= unit
    return heads


@torch.inference_mode()
def success(heads: Heads, table: Table, rows: Rows) -> dict[str, float]:
    """Text to picture: the share of the rows' captions with a picture of theirs among the first 1, 5 and 10."""
    image, text = heads.embed(table.images[rows], table.texts)
    captions = table.captions[rows]
    queries = captions.unique()
    best = (text[queries] @ image.T).topk(10, dim=1).indices
    hit = (captions[best] == queries[:, None, None]).any(-1)
    return {f"success@{k}": round(float(hit[:, :k].any(1).float().mean()), 4) for k in (1, 5, 10)}


def cross_validate(table: Table) -> None:
    """Print success on held-out concepts and on held-out pictures of the others, fold by fold."""
    known = np.isin(table.split, ["train", "val"])
    for fold in range(FOLDS):
        held = table.held == fold
        heads = fit(table, np.flatnonzero((table.split == "train") & ~held))
        print(fold, "held-out concepts", success(heads, table, np.flatnonzero(known & held)))
        print(fold, "held-out pictures", success(heads, table, np.flatnonzero((table.split == "val") & ~held)))


def build(table: Table, out: Path, side: int) -> dict[str, Any]:
    """Fit on `train`, write the heads, and measure them as they were stored."""
    write_heads(fit(table, np.flatnonzero(table.split == "train")), out, side)
    stored = {name: value.float() for name, value in load_file(out / "heads.safetensors").items()}
    heads = Heads().eval()
    back = {"visual.head.mlp.": "image.", "text.proj.": "text.", "logit_scale": "logit_scale"}
    for new, old in back.items():
        stored = {name.replace(new, old): value for name, value in stored.items()}
    heads.load_state_dict(stored)
    figures: dict[str, Any] = {"logit_scale": round(float(heads.logit_scale.detach().exp()), 3), "image_size": side}
    for split in SPLITS[1:]:
        rows = np.flatnonzero(table.split == split)
        queries = len(table.captions[rows].unique())
        figures[split] = {"pictures": len(rows), "queries": queries, **success(heads, table, rows)}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    data = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the assembled towers and the features")
    parser.add_argument("--emoji", type=Path, default=data / "emoji")
    parser.add_argument("--out", type=Path, default=data / "teacher")
    parser.add_argument("--side", type=int, choices=SIDES, default=SIDES[0], help="the pictures' side in pixels")
    parser.add_argument("--cross-validate", action="store_true", help="print the figures that settings are chosen by")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    embedded = read_table(arguments.emoji, arguments.work, arguments.side)
    torch.set_num_threads(1)  # the order of additions, and so the heads' last bits, depend on it
    if arguments.cross_validate:
        cross_validate(embedded)
    else:
        print(json.dumps(build(embedded, arguments.out, arguments.side), indent=2))
