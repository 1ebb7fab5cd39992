"The README (`nbs/index.ipynb`): its code runs, its commands are accepted, its links lead somewhere."
import json, re, shlex
from dataclasses import fields
from pathlib import Path

import nbformat
import papermill as pm
import pytest
from nbclient import NotebookClient

from umt.data import emoji_motion
from umt.tasks import recognition, retrieval, stage1, stage2
from umt.data.captions import read_captions
from umt.models.published import save_published
from umt.data.corpora import find_corpora
from umt.models.multimodal import Multimodal
from umt.models.student import SIZES
from umt.models.text import load_text
from umt.core.config import from_cli

root = Path(__file__).resolve().parent.parent
index = root/'nbs/index.ipynb'
text = '\n\n'.join(c.source for c in nbformat.read(index, 4).cells if c.cell_type == 'markdown')


def test_code_runs(tmp_path):
    "In a fresh kernel and another folder; a failed assertion raises."
    NotebookClient(nbformat.read(index, 4), timeout=120, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert not list(tmp_path.iterdir()), 'something was left behind'


def test_links_lead_somewhere_and_every_notebook_is_listed():
    linked = set(re.findall(r'\]\((\w+\.ipynb)\)', text))
    assert linked == {p.name for p in (root/'nbs').glob('[!_]*.ipynb')} - {'index.ipynb'}


def test_quoted_commands_are_accepted():
    commands = ''.join(re.findall(r'```sh\n(.*?)```', text, re.S)).replace('\\\n', ' ')
    for module in (stage1, recognition, stage2, retrieval):
        quoted = re.findall(rf'python -m {module.__name__.replace(".", "[.]")}( [^#\n]*)', commands)
        assert quoted
        for command in quoted:
            config, _ = from_cli(module.PRESETS, shlex.split(command)) # exits with code 2 if it does not like one
            if module is stage2: assert find_corpora(config.corpora)
    configs = (stage1.Stage1Config, recognition.RecognitionConfig, stage2.Stage2Config, retrieval.RetrievalConfig)
    known = {'--' + f.name.replace('_', '-') for c in configs for f in fields(c)} | {'--help', '--preset', '--dry-run'}
    assert set(re.findall(r'`(--[a-z-]+)', text)) <= known


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder with what the quoted Python code takes for granted, small: /data is below it."
    monkeypatch.chdir(tmp_path)
    emoji_motion.generate('data/videos', {'train': 4}, num_workers=0)
    Path('data/videos/train.csv').write_text(''.join(f'videos/train/train_{i:06d}.mp4 0\n' for i in range(4)))
    Path('data/old').mkdir()
    coco = dict(images=[dict(id=7, file_name='dog.jpg')], annotations=[dict(image_id=7, caption='a dog'), dict(image_id=7, caption='a pet')])
    Path('data/old/captions_train2014.json').write_text(json.dumps(coco))
    student = dict(SIZES['nano'], image_size=224, num_frames=4, aligned_layers=0)
    save_published(Multimodal(student, load_text(vision_dim=student['embed_dim']).config, embed_dim=16), 'b16_25m.pth')
    return tmp_path


def test_quoted_python_runs(home):
    "With a small model in the place of the published one, and with the embedded tokenizer."
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    assert len(blocks) >= 2
    for block in blocks: exec(block.replace("'/data/", "'data/").replace('bert-base-uncased', 'minilm'), names := {})
    assert len(names['index'].places) == 4
    coco = read_captions('data/coco.parquet', 'data/pictures')
    assert coco.paths.to_pylist() == ['dog.jpg'] * 2 and coco.columns['caption'].to_pylist() == ['a dog', 'a pet'] and len(set(coco.ids)) == 1


def test_quoted_papermill_parameters_exist():
    commands = ''.join(re.findall(r'```sh\n(.*?)```', text, re.S)).replace('\\\n', ' ')
    quoted = re.findall(r'papermill (?:--help-notebook )?(nbs/\w+\.ipynb)([^#\n]*)', commands)
    assert len(quoted) >= 4
    for notebook, options in quoted:
        known = pm.inspect_notebook(root/notebook)
        assert all(about['help'] for about in known.values()), f'{notebook}: --help-notebook explains every parameter'
        assert set(re.findall(r"-p (\w+)|-y '(\w+)", options)) <= {pair for name in known for pair in ((name, ''), ('', name))}


def test_make_targets_exist():
    targets = set(re.findall(r'^(\S+):', (root/'Makefile').read_text(), re.M))
    assert set(re.findall(r'`?make ([a-z-]+)[ `]', text)) <= targets
