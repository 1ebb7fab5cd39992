"The options of all tasks: each is read by the code that its task goes through, explained, and reachable by one name."
import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from umt.core.config import config_dict, leaves, override, resolve_name
from umt.experiments.runs import module_of
from umt.tasks import recognition, retrieval, stage1, stage2

CONFIGS = {
    'stage1': stage1.PRESETS, 'recognition': recognition.PRESETS, 'evaluation': recognition.EVALUATIONS,
    'stage2': stage2.PRESETS, 'retrieval': retrieval.PRESETS}
FIRST = {name: next(iter(presets.values())) for name, presets in CONFIGS.items()}


@cache
def closure(module: str) -> tuple[Path, ...]:
    "The files of a module and of all modules of the package that it imports."
    files, todo = {}, [module]
    while todo:
        name = todo.pop()
        if name in files or not name.startswith('umt.'): continue
        try: spec = importlib.util.find_spec(name)
        except ModuleNotFoundError: continue
        if spec is None or not spec.origin: continue
        files[name] = Path(spec.origin)
        for node in ast.walk(ast.parse(files[name].read_text())):
            if isinstance(node, ast.ImportFrom):
                above = name.split('.')[:-node.level] if node.level else []
                source = '.'.join([*above, *filter(None, [node.module])])
                todo += [source, *(f'{source}.{alias.name}' for alias in node.names)]
    return tuple(files.values())


@cache
def attributes_read(module: str) -> frozenset[str]:
    "Names that are read as attributes, `x.name` or getattr(x, 'name'), in the code that a module goes through."
    found = set()
    for file in closure(module):
        source = file.read_text()
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)]
        found |= {n.attr for n in nodes if isinstance(n.ctx, ast.Load)}
        found |= set(re.findall(r"getattr\(\w+, '(\w+)'", source))
    return frozenset(found)


@pytest.mark.parametrize('task', FIRST)
def test_every_option_is_read(task):
    "No task has an option that nothing in its code reads; the weights of the losses are read by a pattern."
    config = FIRST[task]
    module = module_of(config)
    assert 'mask_of_the_zorro' not in attributes_read(module)
    names = {leaf.name.rpartition('.')[2] for leaf in leaves(config)}
    unread = {n for n in names - attributes_read(module) if not re.fullmatch(r'(uta|vtc|vtm|mlm)_weight', n)}
    assert not unread


@pytest.mark.parametrize('task', ['evaluation', 'retrieval'])
def test_an_evaluation_has_no_options_of_training(task):
    names = {leaf.name for leaf in leaves(FIRST[task])}
    of_training = {n for n in names if re.search(r'(^|\.)(lr|epochs|batch_size|weight_decay|seed)$', n)}
    assert not of_training - {'views.batch_size'}


def declared(kind: type) -> dict[str, str]:
    "Field -> the line that declares it, of a dataclass and those that it derives from."
    lines = {}
    for base in reversed(kind.__mro__[:-1]):
        if not base.__dict__.get('__annotations__'): continue
        source = Path(importlib.util.find_spec(base.__module__).origin).read_text()
        body = source[source.index(f'class {base.__name__}('):]
        for name in base.__dict__['__annotations__']:
            match = re.search(rf'^    {name}: .*$', body, re.M)
            lines[name] = match[0]
    return lines


@pytest.mark.parametrize('task', FIRST)
def test_every_option_is_explained(task):
    def check(config):
        for name, line in declared(type(config)).items():
            value = getattr(config, name)
            if hasattr(value, 'check'): check(value)
            else: assert re.search(r'# \S', line), f'{type(config).__name__}.{name} has no comment for --help'
    check(FIRST[task])


@pytest.mark.parametrize('task', FIRST)
def test_old_flat_names_mean_one_option(task):
    config = FIRST[task]
    for leaf in leaves(config):
        alone = sum(other.flat == leaf.flat for other in leaves(config)) == 1
        if alone: assert resolve_name(config, leaf.flat) == leaf.name


@pytest.mark.parametrize('task', CONFIGS)
def test_a_preset_survives_its_own_file(task):
    "Stored and read again, every preset is itself."
    for name, config in CONFIGS[task].items(): assert override(FIRST[task], config_dict(config)) == config, name
