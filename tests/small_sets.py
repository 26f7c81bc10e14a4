"A training set that is written in milliseconds."

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from zsad_nb.data.index import make_index


def bright_squares(
    root: Path,  # an empty or a new folder
    count: int,  # images; every second one has a defect
    size: int = 40,  # of an image, in pixels
    defect: str = "crack",  # name of the defect
    category: str = "wood",
) -> pd.DataFrame:  # index
    "Noise, in every second image with a bright rectangle that its mask covers exactly."
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    place = slice(size // 4, size // 2), slice(size // 4, 3 * size // 4)
    rows = []
    for number in range(count):
        anomalous = number % 2 == 1
        image = rng.integers(90, 140, (size, size, 3), dtype=np.uint8)
        row = dict(
            dataset="toy",
            category=category,
            split="test",
            image=f"{number}.png",
            mask="",
            anomalous=anomalous,
            defect="good",
        )
        if anomalous:
            mask = np.zeros((size, size), np.uint8)
            image[place] = 250
            mask[place] = 255
            Image.fromarray(mask).save(root / f"{number}_mask.png")
            row |= dict(mask=f"{number}_mask.png", defect=defect)
        Image.fromarray(image).save(root / f"{number}.png")
        rows.append(row)
    return make_index(rows, root)
