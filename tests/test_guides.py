"The guides (`nbs/guides`): their code runs, their commands are accepted, their links lead somewhere."
import json
import re
import shlex
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient

from umt.core.config import from_cli, leaves
from umt.data import emoji_motion
from umt.data.captions import read_captions
from umt.data.corpora import find_corpora
from umt.data.measuring import main as bench_data
from umt.data.packing import ShardsConfig
from umt.data.preparing import ListConfig, positional
from umt.models.multimodal import Multimodal
from umt.models.published import save_published
from umt.models.student import SIZES
from umt.models.text import load_text
from umt.tasks import recognition, retrieval, stage1, stage2

root = Path(__file__).resolve().parent.parent
guides = sorted((root/'nbs/guides').glob('*.ipynb'))
TASKS = {'stage1': stage1, 'recognition': recognition, 'stage2': stage2, 'retrieval': retrieval}
CONFIGS = stage1.Stage1Config, recognition.RecognitionConfig, stage2.Stage2Config, retrieval.RetrievalConfig
TOOLS = {'list': (ListConfig(), ['folder']), 'shards': (ShardsConfig(source='LIST'), ['source', 'out'])} # beside tasks


def markdown(path: Path) -> str:
    cells = nbformat.read(path, 4).cells
    return '\n\n'.join(c.source for c in cells if c.cell_type == 'markdown')


def commands(text: str) -> list[str]:
    "The shell commands that a page quotes, without comments."
    blocks = ''.join(re.findall(r'```sh\n(.*?)```', text, re.S)).replace('\\\n', ' ')
    return [line.split(' #')[0].strip() for line in blocks.splitlines() if line.strip()]


everything = '\n\n'.join(map(markdown, [*guides, root/'nbs/index.ipynb']))


def execute(path: Path, folder: Path):
    "In a fresh kernel and another folder; a failed assertion raises."
    resources = {'metadata': {'path': str(folder)}}
    NotebookClient(nbformat.read(path, 4), timeout=300, kernel_name='python3', resources=resources).execute()


@pytest.mark.timeout(600)
@pytest.mark.parametrize('path', guides, ids=lambda p: p.stem)
def test_guide_runs(path, tmp_path):
    execute(path, tmp_path)
    assert not list(tmp_path.iterdir()), 'something was left behind'


@pytest.mark.parametrize('path', guides, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    text = markdown(path)
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
        assert target.startswith('http') or (path.parent/target).exists(), target
    for test in re.findall(r'`(test_\w+\.py)`', text):
        assert (root/'tests'/test).is_file(), test


def task_command(command: str) -> tuple[str, list[str]] | None:
    "The task and the options of `umt TASK ...`, `python -m umt.tasks.TASK ...`, `torchrun ... -m umt.tasks.TASK ...`."
    direct, by_module = r'umt (\w+)(.*)', r'(?:python|torchrun .*?) -m umt\.tasks\.(\w+)(.*)'
    match = re.match(direct, command) or re.match(by_module, command)
    if not match:
        return None
    return match[1], shlex.split(match[2])


def test_quoted_commands_are_accepted():
    quoted = [found for command in commands(everything) if (found := task_command(command))]
    assert {task for task, _ in quoted} - {'bench'} == {*TASKS, *TOOLS}
    for task, words in quoted:
        if task in TOOLS:
            config, places = TOOLS[task]
            from_cli({'default': config}, positional(words, places), f'umt {task}')
        if task not in TASKS:
            continue
        evaluation = words[:1] == ['evaluate'] # of a recogniser
        presets = recognition.EVALUATIONS if evaluation else TASKS[task].PRESETS
        config, _ = from_cli(presets, words[evaluation:]) # ends with code 2 if it does not like one
        if task == 'stage2':
            assert find_corpora(config.data.corpora)


def test_every_quoted_command_is_known():
    "None slips through because it is written in another way."
    for command in commands(everything):
        known = task_command(command) or re.match(r'make |papermill |python -m umt\.|\.venv/bin/', command)
        assert known, command


def test_quoted_options_exist(capsys):
    every = [leaf for config in CONFIGS for leaf in leaves(config())]
    every += [leaf for config, _ in TOOLS.values() for leaf in leaves(config)]
    known = {'--' + name.replace('_', '-') for leaf in every for name in (leaf.name, leaf.flat)}
    known |= {'--help', '--preset', '--dry-run', '--config'}
    assert set(re.findall(r'`(--[a-z.-]+)', everything)) <= known
    with pytest.raises(SystemExit):
        bench_data(['--help'])
    measuring = set(re.findall(r'--[a-z-]+', capsys.readouterr().out))
    quoted = ' '.join(re.findall(r'umt bench data [^`\n]*', everything))
    assert '--synthetic' in quoted and set(re.findall(r'--[a-z-]+', quoted)) <= measuring


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder with what the quoted Python code takes for granted, small: /data is below it."
    monkeypatch.chdir(tmp_path)
    emoji_motion.generate('data/videos', {'train': 4}, num_workers=0)
    Path('data/videos/train.csv').write_text(''.join(f'videos/train/train_{i:06d}.mp4 0\n' for i in range(4)))
    Path('data/old').mkdir()
    captions = [{'image_id': 7, 'caption': 'a dog'}, {'image_id': 7, 'caption': 'a pet'}]
    coco = {'images': [{'id': 7, 'file_name': 'dog.jpg'}], 'annotations': captions}
    Path('data/old/captions_train2014.json').write_text(json.dumps(coco))
    student = dict(SIZES['nano'], image_size=224, num_frames=4, aligned_layers=0)
    text = load_text(vision_dim=student['embed_dim']).config
    save_published(Multimodal(student, text, embed_dim=16), 'b16_25m.pth')
    return tmp_path


def test_quoted_python_runs(home):
    "With a small model in the place of the published one, and with the embedded tokenizer."
    blocks = re.findall(r'```python\n(.*?)```', everything, re.S)
    assert len(blocks) == 2
    found = {}
    for block in blocks:
        exec(block.replace("'/data/", "'data/").replace('bert-base-uncased', 'minilm'), names := {})
        found |= names
    assert len(found['index'].places) == 4
    coco = read_captions('data/coco.parquet', 'data/pictures')
    assert coco.paths.to_pylist() == ['dog.jpg'] * 2
    assert coco.columns['caption'].to_pylist() == ['a dog', 'a pet'] and len(set(coco.ids)) == 1


def test_quoted_papermill_parameters_exist():
    pattern = r'papermill (?:--help-notebook )?(nbs/\w+\.ipynb)(.*)'
    quoted = [m for c in commands(everything) if (m := re.match(pattern, c))]
    assert len(quoted) >= 4
    for notebook, options in (m.groups() for m in quoted):
        known = papermill.inspect_notebook(root/notebook)
        assert all(about['help'] for about in known.values()), f'{notebook}: --help-notebook explains every parameter'
        used = {a or b for a, b in re.findall(r"-p (\w+)|-y '(\w+)", options)}
        assert used <= set(known), f'{notebook} has no {used - set(known)}'


def test_make_targets_exist():
    targets = set(re.findall(r'^(\S+):', (root/'Makefile').read_text(), re.M))
    assert set(re.findall(r'(?:^|`)make (?:PYTHON=\S+ )?([a-z-]+)', everything, re.M)) <= targets
