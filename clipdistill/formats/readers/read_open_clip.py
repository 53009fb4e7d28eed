"""Embed probes with open_clip's own ``local-dir:`` loader."""

import sys

import numpy as np
import open_clip
import torch

_BATCH = 32


@torch.inference_mode()
def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Embed all probes with both towers; open_clip has the weights as they were trained, whatever the precision."""
    given = np.load(probes, allow_pickle=False)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    tokens, pixels = torch.from_numpy(given["input_ids"]), torch.from_numpy(given["pixel_values"])
    texts = torch.cat([model.encode_text(part, normalize=True) for part in torch.split(tokens, _BATCH)])
    images = torch.cat([model.encode_image(part, normalize=True) for part in torch.split(pixels, _BATCH)])
    np.savez(out, text=texts.float().numpy(), image=images.float().numpy())
    sys.stdout.write(open_clip.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:5])
