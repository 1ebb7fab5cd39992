"The README (`nbs/index.ipynb`): one page, whose code runs and whose links lead somewhere."
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageChops

root = Path(__file__).resolve().parent.parent
index = root/'nbs/index.ipynb'
cells = nbformat.read(index, 4).cells
text = '\n\n'.join(c.source for c in cells if c.cell_type == 'markdown')
readme = (root/'README.md').read_text()


def test_one_page():
    assert len(readme.splitlines()) <= 150


def test_code_is_short_and_runs(tmp_path):
    "In a fresh kernel and another folder; a failed assertion raises."
    shown = [c.source for c in cells if c.cell_type == 'code' and '#| hide' not in c.source]
    assert len([line for line in '\n'.join(shown).split('\n') if line.strip()]) <= 15
    resources = {'metadata': {'path': str(tmp_path)}}
    NotebookClient(nbformat.read(index, 4), timeout=120, kernel_name='python3', resources=resources).execute()
    assert not list(tmp_path.iterdir()), 'something was left behind'


def test_links_lead_somewhere_and_every_notebook_is_linked():
    linked = {t for t in re.findall(r'\]\(([^)]+)\)', text) if not t.startswith('http')}
    assert all((root/'nbs'/target).exists() for target in linked)
    found = [p for p in (root/'nbs').rglob('[!_]*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    listed = {str(p.relative_to(root/'nbs')) for p in found}
    assert listed - linked == {'index.ipynb'}
    for target in re.findall(r'\]\(([^)]+)\)', readme): # as seen from the root
        assert target.startswith('http') or (root/target).exists(), target


def test_figure_is_the_quickstarts(tmp_path):
    "The picture is small, and is the one that is stored in the executed notebook."
    stored = root/'nbs/images/quickstart.png'
    assert stored.stat().st_size <= 150_000
    command = [sys.executable, root/'.ci/figure.py', root/'nbs/quickstart.ipynb', tmp_path/'again.png']
    subprocess.run(command, check=True)
    again = Image.open(tmp_path/'again.png')
    assert Image.open(stored).size == again.size
    assert ImageChops.difference(Image.open(stored), again).getbbox() is None, 'run `make docs-sync`'


def test_named_extras_exist():
    "The README names the extras that settings.ini has."
    named = set(re.findall(r'\w+', ''.join(re.findall(r"\.\[([\w,]+)\]", text))))
    extras = set(re.findall(r'^(\w+)_requirements', (root/'settings.ini').read_text(), re.M))
    assert named and named <= extras
