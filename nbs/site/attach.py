"""Pictures as attachments of a notebook's cells, which every place that shows a notebook can show.

    python nbs/site/attach.py nbs/tutorials/explore_heatmaps.ipynb paper_figures/widgets/explorer.png

A cell gets the picture that its text names, as `![words](attachment:explorer.png)` or by a path that ends in the
picture's name, which is replaced. Run it again when the picture has changed; `make screenshots` does."""

import argparse
import base64
import json
import mimetypes
import re
from pathlib import Path


def attach(
    notebook: Path,  # changed in place
    pictures: list[Path],
) -> int:  # how many cells got one
    "Attach pictures to the cells that name them."
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    count = 0
    for picture in pictures:
        kind = mimetypes.guess_type(picture.name)[0] or "image/png"
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        named = re.compile(r"\]\((?:attachment:|[^)\s]*/)?" + re.escape(picture.name) + r"\)")
        cells = [c for c in nb["cells"] if c["cell_type"] == "markdown" and named.search("".join(c["source"]))]
        if not cells:
            raise ValueError(
                f"no cell of {notebook} names {picture.name}: write ![words](attachment:{picture.name}) where it belongs"
            )
        for cell in cells:
            text = named.sub(f"](attachment:{picture.name})", "".join(cell["source"]))
            cell["source"] = text.splitlines(keepends=True)
            cell.setdefault("attachments", {})[picture.name] = {kind: data}
        count += len(cells)
    text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"  # as nbdev_clean writes it
    notebook.write_text(text, encoding="utf-8")
    return count


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebook", type=Path)
    p.add_argument("pictures", type=Path, nargs="+")
    options = p.parse_args()
    print(f"{options.notebook}: {attach(options.notebook, options.pictures)} cells with a picture")
