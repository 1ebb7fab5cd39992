"""`figure.py NOTEBOOK PNG`: take the README's picture (frames, attention, visible patches) out of a quickstart."""
import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

CALL = 'show_alignment(' # the cell that draws it


def figure(notebook: Path) -> Image.Image:
    "The pictures of that cell, side by side. ValueError if there are none."
    cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == 'code' and CALL in c.source]
    stored = [o['data']['image/png'] for c in cells for o in c.outputs if 'image/png' in o.get('data', {})]
    if not stored:
        raise ValueError(f'{notebook}: no picture from a cell that calls {CALL}...)')
    parts = [Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB') for png in stored]
    whole = Image.new('RGB', (sum(p.width for p in parts), max(p.height for p in parts)), 'white')
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width
    return whole


if __name__ == '__main__':
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    figure(source).save(target, optimize=True)
