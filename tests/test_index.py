"The README (`nbs/index.ipynb`): its code runs, its commands are accepted, its links lead somewhere."
import re, shlex
from dataclasses import fields
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from umt import stage1
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
    stage1_commands = re.findall(r'python -m umt\.stage1( [^#\n]*)', commands)
    assert stage1_commands
    for command in stage1_commands: from_cli(stage1.PRESETS, shlex.split(command)) # exits with code 2 if it does not like one
    known = {'--' + f.name.replace('_', '-') for f in fields(stage1.Stage1Config)} | {'--help', '--preset', '--dry-run'}
    assert set(re.findall(r'`(--[a-z-]+)', text)) <= known


def test_make_targets_exist():
    targets = set(re.findall(r'^(\S+):', (root/'Makefile').read_text(), re.M))
    assert set(re.findall(r'`?make ([a-z-]+)[ `]', text)) <= targets
