"The README (`nbs/index.ipynb`): its code runs, its commands are accepted, its links lead somewhere."
import re, shlex
from dataclasses import fields
from pathlib import Path

import nbformat
import papermill as pm
from nbclient import NotebookClient

from umt import recognition, stage1
from umt.training import from_cli

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
    for module in (stage1, recognition):
        quoted = re.findall(rf'python -m {module.__name__.replace(".", "[.]")}( [^#\n]*)', commands)
        assert quoted
        for command in quoted: from_cli(module.PRESETS, shlex.split(command)) # exits with code 2 if it does not like one
    known = {'--' + f.name.replace('_', '-') for c in (stage1.Stage1Config, recognition.RecognitionConfig) for f in fields(c)} | {'--help', '--preset', '--dry-run'}
    assert set(re.findall(r'`(--[a-z-]+)', text)) <= known


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
