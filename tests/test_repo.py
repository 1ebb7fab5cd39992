"The repository's own rules: notebooks are the source of truth, clean, eligible for tests, and in step with umt/ and README.md."
import ast, filecmp, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').glob('[!_]*.ipynb'))
numbered = [p for p in notebooks if re.match(r'\d\d[a-z]?_', p.name)]
experiments = [p for p in notebooks if p not in numbered and p.name != 'index.ipynb']
bin_dir = Path(sys.executable).parent
directives = {'default_exp', 'export', 'exports', 'exporti', 'hide', 'hide_input', 'hide_output', 'slow', 'cuda', 'multigpu', 'weights', 'code-fold'}
name = lambda p: p.name


def read(path): return nbformat.read(path, as_version=4)
def code(nb): return [c for c in nb.cells if c.cell_type == 'code']
def module_of(path): return 'umt/' + x.replace('.', '/') + '.py'


def has_test(src: str) -> bool:
    "Whether a cell's source holds an assertion that runs."
    return any(isinstance(n, ast.Assert) or (isinstance(n, ast.Call) and re.match(r'test_|assert_', getattr(n.func, 'id', getattr(n.func, 'attr', ''))))
               for n in ast.walk(ast.parse(src)))


def directive_names(src: str) -> list[str]:
    return [re.split(r'[\s:]', m.strip())[0] for m in re.findall(r'^\s*#\s*\|(.*)$', src, re.M)]


def problems(nb) -> list[str]:
    "What is wrong with one notebook's form."
    out, ids = [], [c.id for c in nb.cells]
    if len(set(ids)) < len(ids): out.append('cell ids repeat')
    if nb.metadata.get('kernelspec', {}).get('language') != 'python': out.append('kernelspec.language is not "python" (papermill needs it)')
    for c in nb.cells:
        if c.cell_type == 'code' and c.execution_count is not None: out.append(f'{c.id}: execution count (run nbdev_clean)')
        if extra := set(c.metadata) - {'tags'}: out.append(f'{c.id}: cell metadata {sorted(extra)} (run nbdev_clean)')
        out += [f'{c.id}: unknown directive {d!r}' for d in directive_names(c.source) if c.cell_type == 'code' and d not in directives]
        if 'export' in directive_names(c.source) and len(c.source.splitlines()) > 50: out.append(f'{c.id}: exported cell of {len(c.source.splitlines())} lines')
    return out


@pytest.mark.parametrize('path', notebooks, ids=name)
def test_notebook_form(path):
    assert problems(read(path)) == []
    assert path.stat().st_size < 1_000_000, f'{path.stat().st_size} bytes: clear the large outputs'


def test_form_check_sees_faults():
    "The check itself fails where it should."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('#| slwo\n1', execution_count=3, metadata={'collapsed': True})])
    assert len(problems(nb)) == 4
    assert not has_test('#| hide\n# assert in a comment\nx = 1') and has_test('assert 1 == 1') and has_test('test_eq(1, 1)')


@pytest.mark.parametrize('path', numbered, ids=name)
def test_numbered_notebook_is_eligible_and_tests(path):
    from nbdev.doclinks import nbglob
    assert path.name in {Path(p).name for p in nbglob(root/'nbs')}, 'nbdev does not see it'
    nb = read(path)
    first = nb.cells[0].source
    assert re.match(r'# \S', first) and '\n> ' in first, 'the first cell is "# Title" and "> summary"'
    assert 'skip_exec' not in first
    assert sum('#| default_exp' in c.source for c in code(nb)) == 1
    skipped = {'slow', 'cuda', 'multigpu', 'weights'}
    assert any(has_test(c.source) for c in code(nb) if not skipped & set(directive_names(c.source)) and 'nbdev_export(' not in c.source), 'no assertion'
    assert sum(c.cell_type == 'markdown' for c in nb.cells) >= .15*len(nb.cells), 'a notebook explains'


@pytest.mark.parametrize('path', experiments, ids=name)
def test_experiment_has_parameters(path):
    nb = read(path)
    assert sum('parameters' in c.metadata.get('tags', []) for c in nb.cells) == 1, 'exactly one cell is tagged "parameters"'
    for c in code(nb):
        assert 'nbdev_export(' not in c.source and not {'export', 'default_exp'} & set(directive_names(c.source)), 'an experiment exports nothing'


def test_one_module_per_numbered_notebook():
    modules = {str(p.relative_to(root)) for p in (root/'umt').rglob('*.py')} - {'umt/__init__.py', 'umt/_modidx.py'}
    assert modules == {module_of(p) for p in numbered}


FLOORS = [{'video', 'emoji_motion'}, {'datasets', 'augmentation'}, {'captions', 'masking', 'teacher', 'student', 'text', 'annotations'}, {'corpora', 'pairs'},
          {'objectives', 'galleries'}, {'multimodal'}, {'checkpoints'}, {'training'}, {'evaluation'}, {'stage1', 'stage2', 'recognition', 'detection', 'retrieval', 'qa', 'launchers'},
          {'experiments', 'explore', 'benchmark'}]


def test_modules_import_only_from_floors_below():
    floor = {m: i for i, rooms in enumerate(FLOORS) for m in rooms}
    wrong = []
    for path in numbered:
        mod = Path(module_of(path)).stem
        for node in ast.walk(ast.parse((root/module_of(path)).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                if floor[node.module.split('.')[0]] >= floor[mod]: wrong.append(f'{mod} imports {node.module}')
    assert not wrong


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what git would check out (tracked and new files, not ignored ones)."
    to = tmp_path_factory.mktemp('copy')/'umt-kit'
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True).stdout.split('\n')
    for f in filter(None, listed):
        if (root/f).is_file():
            (to/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/f, to/f)
    return to


def differences(a: Path, b: Path, pattern: str) -> list[str]:
    names = {str(p.relative_to(d)) for d in (a, b) for p in d.glob(pattern)}
    return sorted(n for n in names if not ((a/n).exists() and (b/n).exists() and filecmp.cmp(a/n, b/n, shallow=False)))


def test_export_clean_and_readme_change_nothing(copy):
    for cmd in (['nbdev_export'], ['nbdev_clean']): subprocess.run([bin_dir/cmd[0]], cwd=copy, check=True, capture_output=True)
    subprocess.run([sys.executable, '.ci/readme.py'], cwd=copy, check=True, capture_output=True)
    assert differences(root, copy, 'umt/*.py') == []
    assert differences(root, copy, 'nbs/*.ipynb') == []
    assert differences(root, copy, 'README.md') == []


def test_wheel_holds_every_module_and_asset(copy, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q', '-w', tmp_path, '.'], cwd=copy, check=True, capture_output=True)
    import zipfile
    wheel, = tmp_path.glob('umt-*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(p.relative_to(root)) for p in [*(root/'umt').glob('*.py'), *(root/'umt/assets').glob('*')]} <= names
    # Unpacked elsewhere, it imports from there: quickly, and without torch or transformers.
    subprocess.run([sys.executable, '-m', 'zipfile', '-e', wheel, tmp_path/'site'], check=True)
    probe = ("import sys, time; t = time.perf_counter(); import umt; t = time.perf_counter() - t\n"
             f"assert umt.__file__.startswith({str(tmp_path)!r}), umt.__file__\n"
             "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert t < 1, t\nimport umt.models.teachers; umt.models.teachers.load_teacher('nano')")
    subprocess.run([sys.executable, '-c', probe], cwd=tmp_path, env={'PYTHONPATH': str(tmp_path/'site'), 'PATH': ''}, check=True)


def test_version_is_one():
    import umt
    cfg = ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini')
    assert umt.__version__ == cfg['DEFAULT']['version']


def test_no_unsafe_loading():
    for p in (root/'umt').rglob('*.py'):
        for call in re.findall(r'torch\.load\([^\n]*', p.read_text()): assert 'weights_only=True' in call, f'{p.name}: {call}'
        assert 'import pickle' not in p.read_text(), p
