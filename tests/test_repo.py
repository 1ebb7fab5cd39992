"The repository's own rules: notebooks are the source of truth, clean, tested, and in step with umt/ and README.md."
import ast
import filecmp
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import nbformat
import pytest

# A module imports from its own folder (lower numbers) and from those before it, never from a later one.
FLOORS = ['core', 'data', 'models', 'training', 'tasks', 'experiments']
LINE, CELL, MODULE = 120, 45, 400 # the longest code line, exported cell and module

root = Path(__file__).resolve().parent.parent
bin_dir = Path(sys.executable).parent
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb')
                   if not any(part.startswith(('_', '.')) for part in p.relative_to(root).parts))
numbered = [p for p in notebooks if p.parent.name in FLOORS]
guides = [p for p in notebooks if p.parent == root/'nbs/guides']
experiments = [p for p in notebooks if p.parent == root/'nbs' and p.name != 'index.ipynb']
modules = sorted(p for p in (root/'umt').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
scripts = sorted([*(root/'tests').rglob('*.py'), *(root/'.ci').glob('*.py'), root/'setup.py'])
skipped = {'slow', 'cuda', 'multigpu', 'weights'}
directives = skipped | set('default_exp export exports exporti hide hide_input hide_output code-fold'.split())


def name(path: Path) -> str:
    "A file as it is called in messages."
    return str(path.relative_to(root))


def read(path):
    "A notebook as it is on disk (`nbformat.read` would repair repeated cell ids)."
    return nbformat.v4.reads(path.read_text())


def code(nb):
    return [c for c in nb.cells if c.cell_type == 'code']


def module_of(notebook: Path) -> Path:
    "`nbs/models/04_student.ipynb` makes `umt/models/student.py`."
    return root/'umt'/notebook.parent.name/f'{notebook.stem.split("_", 1)[1]}.py'


def dotted(module: Path) -> str:
    "`umt/models/student.py` is imported as `umt.models.student`."
    return '.'.join(module.relative_to(root).with_suffix('').parts)


def has_test(src: str) -> bool:
    "Whether a cell's source holds an assertion that runs."
    nodes = list(ast.walk(ast.parse(src)))
    calls = [getattr(n.func, 'id', getattr(n.func, 'attr', '')) for n in nodes if isinstance(n, ast.Call)]
    return any(isinstance(n, ast.Assert) for n in nodes) or any(re.match('test_|assert_', c) for c in calls)


def directive_names(src: str) -> list[str]:
    return [re.split(r'[\s:]', m.strip())[0] for m in re.findall(r'^\s*#\s*\|(.*)$', src, re.M)]


def plain(src: str) -> str:
    "A cell without the lines that only a notebook understands."
    return re.sub(r'^\s*[%!].*$', 'pass', src, flags=re.M)


def python_of(path: Path) -> str:
    "The code of a notebook or of a script."
    return '\n'.join(plain(c.source) for c in code(read(path))) if path.suffix == '.ipynb' else path.read_text()


def long_lines(text: str) -> list[int]:
    return [i for i, line in enumerate(text.split('\n'), 1) if len(line) > LINE]


# ---- One notebook ----

def problems(nb) -> list[str]:
    "What is wrong with one notebook's form."
    out, ids = [], [c.id for c in nb.cells]
    if len(set(ids)) < len(ids):
        out.append('cell ids repeat')
    if nb.metadata.get('kernelspec', {}).get('language') != 'python':
        out.append('kernelspec.language is not "python" (papermill needs it)')
    for c in nb.cells:
        if extra := set(c.metadata) - {'tags'}:
            out.append(f'{c.id}: cell metadata {sorted(extra)} (run nbdev_clean)')
        if c.cell_type == 'code':
            out += code_problems(c)
    return out


def code_problems(cell) -> list[str]:
    "What is wrong with one code cell's form."
    out, named, lines = [], directive_names(cell.source), len(cell.source.splitlines())
    if cell.execution_count is not None:
        out.append(f'{cell.id}: execution count (run nbdev_clean)')
    out += [f'{cell.id}: unknown directive {d!r}' for d in named if d not in directives]
    if 'export' in named and lines > CELL:
        out.append(f'{cell.id}: exported cell of {lines} lines, at most {CELL}')
    out += [f'{cell.id}: line {i} has more than {LINE} characters' for i in long_lines(cell.source)]
    return out


@pytest.mark.parametrize('path', notebooks, ids=name)
def test_notebook_form(path):
    assert problems(read(path)) == []
    assert path.stat().st_size < 1_000_000, f'{path.stat().st_size} bytes: clear the large outputs'


def test_form_check_sees_faults():
    "The check itself fails where it should."
    cell = nbformat.v4.new_code_cell('#| slwo\n1', execution_count=3, metadata={'collapsed': True})
    wide, long = nbformat.v4.new_code_cell('x = ' + '1'*LINE), nbformat.v4.new_code_cell('#| export\n' + 'x = 1\n'*CELL)
    nb = nbformat.v4.new_notebook(cells=[cell, wide, long])
    nb.cells[1].id = nb.cells[2].id
    found = problems(nb)
    for part in ('ids repeat', 'kernelspec', 'execution count', 'collapsed', "'slwo'", 'exported cell', 'line 1 has'):
        assert sum(part in f for f in found) == 1, part
    assert has_test('assert 1 == 1') and has_test('test_eq(1, 1)')
    assert not has_test('#| hide\n# assert in a comment\nx = 1')


@pytest.mark.parametrize('path', numbered, ids=name)
def test_numbered_notebook_is_eligible_and_tests(path):
    from nbdev.doclinks import nbglob
    assert re.fullmatch(r'\d\d_\w+\.ipynb', path.name), 'a notebook in a folder is called NN_name'
    assert path in {Path(p).resolve() for p in nbglob(root/'nbs', file_re=r'\d\d_.*')}, 'nbdev_test does not see it'
    nb = read(path)
    first = nb.cells[0].source
    assert re.match(r'# \S', first) and '\n> ' in first, 'the first cell is "# Title" and "> summary"'
    assert 'skip_exec' not in first
    sources = [plain(c.source) for c in code(nb)]
    assert re.findall(r'#\| default_exp (\S+)', '\n'.join(sources)) == [dotted(module_of(path)).removeprefix('umt.')]
    run = [s for s in sources if not skipped & set(directive_names(s)) and 'nbdev_export(' not in s]
    assert any(map(has_test, run)), 'no assertion'
    assert sum(c.cell_type == 'markdown' for c in nb.cells) >= .15*len(nb.cells), 'a notebook explains'


@pytest.mark.parametrize('path', experiments, ids=name)
def test_experiment_has_parameters(path):
    tagged = [c for c in read(path).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1, 'exactly one cell is tagged "parameters"'


@pytest.mark.parametrize('path', sorted({*notebooks} - {*numbered}), ids=name)
def test_other_notebooks_export_nothing(path):
    for c in code(read(path)):
        assert 'nbdev_export(' not in c.source and not {'export', 'default_exp'} & set(directive_names(c.source))


@pytest.mark.parametrize('path', guides, ids=name)
def test_guide_has_a_title_and_fits_the_window(path):
    nb, prose = read(path), []
    assert re.match(r'# \S.*\n\n> \S', nb.cells[0].source), 'the first cell is "# Title" and "> summary"'
    for c in nb.cells:
        if c.cell_type == 'markdown' and c.id != 'map':
            prose += [line for line in c.source.split('\n') if len(line) > LINE and not line.startswith('|')]
    assert prose == [], f'lines over {LINE} characters'


def test_every_notebook_has_a_kind():
    "Library (in a floor's folder), guide, experiment, or the README."
    assert set(notebooks) - {*numbered, *guides, *experiments} == {root/'nbs/index.ipynb'}
    assert len(numbered) > 30 and len(guides) > 5 and len(experiments) > 5, 'a pattern above is wrong'


# ---- Lines and modules ----

@pytest.mark.parametrize('path', scripts, ids=name)
def test_script_lines(path):
    assert long_lines(path.read_text()) == [], f'lines over {LINE} characters'


def test_module_lines():
    "nbdev wraps `__all__` as it likes."
    texts = {name(p): re.sub(r'(?m)^__all__ = .*', '', p.read_text()) for p in modules}
    assert [(p, long_lines(text)) for p, text in texts.items() if long_lines(text)] == []


def test_module_length():
    sizes = {name(p): len(p.read_text().splitlines()) for p in modules}
    assert {p: n for p, n in sizes.items() if n > MODULE} == {}, f'modules of more than {MODULE} lines'


def prints(source: str) -> list[int]:
    "The lines on which a module prints, other than in its `main`."
    lines = []

    def visit(node):
        if isinstance(node, ast.FunctionDef) and node.name == 'main':
            return
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print':
            lines.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return lines


MAY_PRINT = {
    'umt/core/config.py', # the line of a UsageError, on standard error
    'umt/core/log.py', # the handler of all messages
    'umt/experiments/launchers.py', # what a process beside this one prints, in the notebook's cell
    'umt/experiments/presets.py'} # the numerics version, so that a notebook's stored output names it


def test_library_logs_and_does_not_print():
    assert prints('print(1)\ndef main():\n    print(2)\ndef show():\n    if 1: print(3)') == [1, 5]
    found = {name(p): lines for p in modules if name(p) not in MAY_PRINT and (lines := prints(p.read_text()))}
    assert found == {}, 'print outside of main: use logging (umt.core.log)'


def test_no_unsafe_loading():
    for p in modules:
        for call in re.findall(r'torch\.load\([^\n]*', p.read_text()):
            assert 'weights_only=True' in call, f'{p.name}: {call}'
        assert 'import pickle' not in p.read_text(), p


# ---- No assertion on wall-clock time ----

CLOCKS = {'time', 'perf_counter', 'monotonic', 'process_time', 'time_ns', 'perf_counter_ns', 'monotonic_ns'}
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def reads_clock(node, names: set[str]) -> bool:
    "Whether an expression calls a clock or uses a name that comes from one."
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and n.id in names:
            return True
        if isinstance(n, ast.Call):
            of = getattr(getattr(n.func, 'value', None), 'id', None)
            called = getattr(n.func, 'attr', getattr(n.func, 'id', ''))
            if called in CLOCKS and (of == 'time' or (of is None and isinstance(n.func, ast.Name))):
                return True
    return False


def in_scope(node):
    "All nodes below `node` that are not inside another function or class."
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, SCOPES):
            yield from in_scope(child)


def unpacked(target, value) -> list[tuple]:
    "`a, b = 1, time()` gives a clock to `b` alone; `a, b = f(time())` gives it to both."
    if not isinstance(target, (ast.Tuple, ast.List)):
        return [(target, value)]
    values = getattr(value, 'elts', [])
    if len(values) != len(target.elts):
        values = [value]*len(target.elts)
    return [pair for t, v in zip(target.elts, values) for pair in unpacked(t, v)]


def clock_assertions(tree, names: frozenset = frozenset()) -> list[int]:
    "Lines of assertions that compare something with a clock, in this scope and below."
    names, own = set(names), list(in_scope(tree))
    assigned = [n for n in own if isinstance(n, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr)) and n.value]
    pairs = [pair for n in assigned for target in getattr(n, 'targets', [getattr(n, 'target', None)])
             for pair in unpacked(target, n.value)]
    for _ in range(3): # `start = time(); took = time() - start; worst = max(took)`
        for target, value in pairs:
            if isinstance(target, ast.Name) and reads_clock(value, names):
                names.add(target.id)
    found = []
    for n in own:
        if isinstance(n, ast.Assert):
            found += [n.lineno for c in ast.walk(n.test) if isinstance(c, ast.Compare) and reads_clock(c, names)][:1]
        if isinstance(n, SCOPES):
            found += clock_assertions(n, frozenset(names))
    return sorted(found)


def test_clock_check_sees_faults():
    for bad in ('import time\nt = time.perf_counter()\nf()\nassert time.perf_counter() - t < 5',
                'def test():\n    start = time.time()\n    took = time.time() - start\n    assert took < 1',
                't = monotonic()\nseconds = [monotonic() - t]\nassert max(seconds) < 9 and 1',
                't = perf_counter()\ndef test():\n    assert f(t) > 2'):
        assert len(clock_assertions(ast.parse(bad))) == 1, bad
    for good in ('t = time.time()\nwhile time.time() < t + 9: pass\nassert done',
                 'def a():\n    t = time.time()\ndef b(t):\n    assert t < 1',
                 'n, t = len(x), time.time()\nassert n > 3',
                 'assert result.time < 3', 'print(time.time())\nassert seconds(3) == 3'):
        assert clock_assertions(ast.parse(good)) == [], good


@pytest.mark.parametrize('path', [*notebooks, *scripts], ids=name)
def test_no_assertion_on_wall_clock_time(path):
    source = python_of(path)
    lines = source.split('\n')
    assert [lines[i - 1].strip() for i in clock_assertions(ast.parse(source))] == []


# ---- Folders are floors ----

def called(node) -> str:
    "The name of what a node calls; empty if it calls nothing."
    return getattr(node.func, 'attr', getattr(node.func, 'id', '')) if isinstance(node, ast.Call) else ''


def targets(node, package: str, known: set[str]) -> list[str]:
    "The modules of this package that one node of a syntax tree imports; `package` is the importing module's."
    def absolute(module: str | None, level: int) -> str:
        if not level:
            return module or ''
        parts = package.split('.')[:len(package.split('.')) - level + 1]
        return '.'.join(parts + ([module] if module else []))

    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = absolute(node.module, node.level)
        inner = [f'{base}.{alias.name}' for alias in node.names]
        found = [name if name in known else base for name in inner]
    elif called(node) in ('import_module', '__import__'):
        literal = getattr(node.args[0], 'value', None) if node.args else None
        if not isinstance(literal, str):
            return []
        name = literal.lstrip('.')
        found = [absolute(name, len(literal) - len(name))]
    else:
        return []
    return [f for f in dict.fromkeys(found) if f.split('.')[0] == 'umt' and f != 'umt']


def offending(place: dict[str, tuple], module: str, source: str) -> list[str]:
    "The arrows of one module that do not lead upwards; `place` is every module's (floor, number)."
    package = module.rpartition('.')[0]
    packages = {f'umt.{floor}': (i, ) for i, floor in enumerate(FLOORS)}
    known, arrows = {*place, *packages}, []
    floor, number = place[module]
    for node in ast.walk(ast.parse(source)):
        for target in targets(node, package, known):
            there = place.get(target) or packages.get(target)
            if there is None or there >= (floor, number) or there == (floor, ):
                what = '/'.join(target.split('.')[1:]) + ('' if there else ' (which does not exist)')
                arrows.append(f'{"/".join(module.split(".")[1:])} ({number:02}) -> {what}: {ast.unparse(node)}')
    return arrows


PLACE = {dotted(module_of(p)): (FLOORS.index(p.parent.name), int(p.name[:2])) for p in numbered if p.name[:2].isdigit()}


@pytest.mark.parametrize('statement, target', [
    ('import umt.tasks.stage1', 'tasks/stage1'),
    ('import umt.tasks.stage1 as s', 'tasks/stage1'),
    ('from umt.tasks.stage1 import PRESETS', 'tasks/stage1'),
    ('from umt.tasks import stage1', 'tasks/stage1'),
    ('from ..tasks import stage1', 'tasks/stage1'),
    ('from ..tasks.stage1 import pretrain', 'tasks/stage1'),
    ('from .. import tasks', 'tasks'),
    ('from umt import tasks', 'tasks'),
    ('from . import heads', 'models/heads'),
    ('from .heads import Head', 'models/heads'),
    ('from .student import Student', 'models/student'),
    ('from . import *', 'models'),
    ('from ..core import config, nothing\nfrom ..core.nothing import a', 'core/nothing (which does not exist)'),
    ('def f():\n    if True:\n        from ..tasks import stage1', 'tasks/stage1'),
    ('def f():\n    import umt.tasks.stage1', 'tasks/stage1'),
    ("importlib.import_module('umt.tasks.stage1')", 'tasks/stage1'),
    ("import_module('..tasks.stage1', __package__)", 'tasks/stage1'),
    ("__import__('umt.tasks.stage1')", 'tasks/stage1'),
])
def test_floor_check_sees_every_form_of_import(statement, target):
    place = {'umt.core.config': (0, 1), 'umt.models.masking': (2, 0), 'umt.models.student': (2, 4),
             'umt.models.heads': (2, 6), 'umt.tasks.stage1': (4, 2)}
    arrow, = offending(place, 'umt.models.student', statement)
    assert arrow.startswith(f'models/student (04) -> {target}: '), arrow


def test_floor_check_lets_pass_what_leads_upwards():
    place = {'umt.core.config': (0, 1), 'umt.models.masking': (2, 0), 'umt.models.student': (2, 4)}
    fine = ('import torch, umt\nimport umt.core.config\nfrom ..core import config\nfrom .. import __version__\n'
            'from . import masking\nfrom .masking import Visible\nimport_module(name)')
    assert offending(place, 'umt.models.student', fine) == []


def test_modules_import_only_from_floors_above():
    arrows = [a for p in modules if dotted(p) in PLACE for a in offending(PLACE, dotted(p), p.read_text())]
    assert arrows == [], '\n' + '\n'.join(arrows)


def test_one_module_per_numbered_notebook():
    assert set(modules) == {module_of(p) for p in numbered}
    assert len(set(PLACE.values())) == len(numbered), 'two notebooks of a folder have one number'
    for floor in FLOORS:
        assert (root/'umt'/floor/'__init__.py').is_file(), f'umt/{floor} is not a package'


# ---- In step: export, clean, README ----

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what git would check out (tracked and new files, not ignored ones)."
    to = tmp_path_factory.mktemp('copy')/'umt-kit'
    command = ['git', 'ls-files', '-co', '--exclude-standard']
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for f in filter(None, listed.split('\n')):
        if (root/f).is_file():
            (to/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/f, to/f)
    return to


def differences(a: Path, b: Path, pattern: str) -> list[str]:
    names = {str(p.relative_to(d)) for d in (a, b) for p in d.glob(pattern) if '.ipynb_checkpoints' not in p.parts}
    return sorted(n for n in names if not ((a/n).exists() and (b/n).exists() and filecmp.cmp(a/n, b/n, shallow=False)))


def test_export_clean_and_readme_change_nothing(copy):
    scripts = [[sys.executable, f'.ci/{script}.py'] for script in ('rooms', 'readme')]
    for cmd in ([bin_dir/'nbdev_export'], [bin_dir/'nbdev_clean'], *scripts):
        subprocess.run(cmd, cwd=copy, check=True, capture_output=True)
    assert differences(root, copy, 'umt/**/*.py') == []
    assert differences(root, copy, 'nbs/**/*.ipynb') == []
    assert differences(root, copy, 'README.md') == []


# ---- The package ----

config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini')
settings = config['DEFAULT']


def distributions(key: str) -> set[str]:
    "The packages that a line of settings.ini asks for, without versions."
    return {re.match(r'[\w.-]+', r)[0].lower().replace('_', '-') for r in settings[key].split()}


EXTRAS = {k.removesuffix('_requirements'): distributions(k) for k in settings if k.endswith('_requirements')}
REQUIRED = distributions('requirements')
UNSEEN = { # installed, though no file imports it and no target calls it
    'tensorboard': 'torch.utils.tensorboard needs it',
    'jupyterlab': 'what the notebooks are opened in; brings the kernel that papermill starts',
    'pillow': 'imported as PIL',
    'execnb': 'a cap: nbdev 2 does not run with a newer one',
    'ghapi': 'a cap: nbdev 2 does not run with a newer one',
    'setuptools': 'setup.py, and nbdev at run time',
    'wheel': 'pip wheel, in the tests',
    'pytest-timeout': 'the mark `timeout` and the limit of every test',
    'pytest-xdist': 'pytest -n',
}


def imported(source: str, asked: bool = True) -> dict[str, bool]:
    "Packages that a file imports or asks for by `need('name', 'extra')`: is one of the imports outside of functions?"
    found = {}

    def visit(node, inside):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif asked and called(node) in ('need', 'importorskip'):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for top in (n.split('.')[0] for n in names):
            found[top] = found.get(top, False) or not inside
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, (ast.FunctionDef, ast.Lambda)))

    visit(ast.parse(source), False)
    return {n: outside for n, outside in found.items() if n not in sys.stdlib_module_names and n != 'umt'}


@cache
def installed() -> dict[str, list[str]]:
    return importlib.metadata.packages_distributions()


def provider(top: str) -> set[str]:
    "The packages that an imported name may come from."
    return {d.lower().replace('_', '-') for d in installed().get(top, [top])}


def test_what_the_library_imports_is_required_or_an_extra():
    optional, wrong = set().union(*(v for k, v in EXTRAS.items() if k != 'dev')), []
    for path in modules:
        for top, outside in imported(path.read_text()).items():
            if not provider(top) & (REQUIRED if outside else REQUIRED | optional):
                where = ' outside of a function, where only requirements may be' if outside else ''
                wrong.append(f'{name(path)} imports {top}{where}')
    assert wrong == []


def test_notebooks_run_with_what_the_first_command_installs():
    "`make install`; the last cell of a room exports it, hence nbdev."
    extras = re.search(r"install --quiet -e '\.\[(.*)\]'", (root/'Makefile').read_text())[1].split(',')
    there = REQUIRED.union({'ipython'}, *(EXTRAS[e] for e in extras)) # a notebook's kernel is IPython
    wrong = []
    for path in notebooks:
        at_once = [top for top, outside in imported(python_of(path), asked=False).items() if outside]
        wrong += [f'{name(path)} imports {top}' for top in at_once if not provider(top) & there]
    assert wrong == []


def test_extras_are_named_rightly():
    "`need('submitit', 'slurm')`: the package is in that extra."
    calls = [c for p in modules for c in re.findall(r'''\bneed\(["']([\w.]+)["'], ["'](\w+)["']\)''', p.read_text())]
    for package, extra in calls:
        inside = EXTRAS.get(extra, set())
        assert provider(package.split('.')[0]) & inside, f'{package} is not in the extra {extra!r} of settings.ini'


def test_every_package_of_the_settings_is_used():
    used = set().union(*(provider(top) for p in [*modules, *notebooks, *scripts] for top in imported(python_of(p))))
    commands = set(re.findall(r'\$\(BIN\)/(?:python -m )?(\w+)', (root/'Makefile').read_text()))
    commands = {'nbdev' if c.startswith('nbdev_') else c for c in commands}
    asked = REQUIRED.union(*EXTRAS.values())
    assert asked - used - commands - set(UNSEEN) == set(), 'in settings.ini, and nobody uses it'
    assert set(UNSEEN) <= asked, 'an exception that is not needed'


def test_version_is_one():
    import umt
    assert umt.__version__ == settings['version']
    assert re.search(rf'^version: {re.escape(umt.__version__)}$', (root/'CITATION.cff').read_text(), re.M)


def test_wheel_installed_elsewhere_is_complete(copy, tmp_path):
    pip = [sys.executable, '-m', 'pip', '-q']
    build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, '.']
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    wheel, = tmp_path.glob('umt-*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [*(root/'umt').rglob('*.py'), root/'umt/py.typed', *(root/'umt/assets').glob('*')]
    assert {name(p) for p in wanted} - names == set(), 'not in the wheel'
    assert not [n for n in names if n.startswith(('tests', 'nbs'))], 'too much is in the wheel'
    assert any(n.endswith('LICENSE') for n in names)
    site = tmp_path/'site'
    install = [*pip, 'install', '--no-deps', '--no-index', '--target', site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    # `import umt` and its floors load nothing heavy, so they are quick; then a room with its asset.
    probe = (f'import sys, umt\n'
             f'from umt import {", ".join(FLOORS)}\n'
             f'assert umt.__file__.startswith({str(site)!r}), umt.__file__\n'
             f'heavy = {{"torch", "transformers", "numpy"}} & set(sys.modules)\n'
             f'assert not heavy, heavy\n'
             f'from umt.models.teachers import load_teacher\n'
             f'load_teacher("nano")')
    subprocess.run([sys.executable, '-c', probe], cwd=tmp_path, env={'PYTHONPATH': str(site), 'PATH': ''}, check=True)


def test_console_commands_lead_to_functions():
    "The `umt` command is a function of a module that exists."
    setup = (root/'setup.py').read_text()
    found = re.findall(r"'(\w+) = ([\w.]+):(\w+)'", setup)
    assert found, 'setup.py declares no console command'
    for command, module, function in found:
        path = root/f'{module.replace(".", "/")}.py'
        assert path.is_file(), f'{command}: {module} does not exist'
        assert re.search(rf'^def {function}\(', path.read_text(), re.M), f'{command}: {module} has no {function}'
