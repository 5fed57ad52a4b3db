"""The home page's picture: a photograph, and where DINOv2's class token looks in its last layer.

python docs/picture.py, with REGARD_MODELS and REGARD_DATA set as for claims. The photograph is scikit-image's `cat`
(CC0).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import regard
from regard.claims._data import photographs
from regard.claims._models import pretrained

SIZE, SIDE = 448, 32  # pixels, and patches a side


def main() -> None:
    model, processor = pretrained("dinov2-small")
    photograph = photographs(SIZE)["cat"]
    pixels = processor(photograph, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    with torch.no_grad(), regard.record(model, "rows") as recording:
        model(pixel_values=pixels)
    rows = recording.tree["encoder"]["rows"].isel(batch=0, query=0, layer=-1).values  # [head, key], of the class token
    seen = rows[:, -(SIDE**2) :].mean(0).reshape(SIDE, SIDE)
    seen = np.clip(seen / np.quantile(seen, 0.99), 0, 1)
    mask = Image.fromarray((255 * seen).astype(np.uint8)).resize(photograph.size, Image.Resampling.BICUBIC)
    light = 0.25 + 0.75 * np.asarray(mask)[..., None] / 255
    looked = Image.fromarray((np.asarray(photograph) * light).astype(np.uint8))
    both = Image.new("RGB", (2 * SIZE + 8, SIZE), "white")
    both.paste(photograph, (0, 0))
    both.paste(looked, (SIZE + 8, 0))
    both.save(Path(__file__).parent / "assets" / "dinov2.jpg", quality=80)


if __name__ == "__main__":
    main()
