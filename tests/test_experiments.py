"The experiment notebooks run headless, from any folder, with their quick parameters; a second run repeats nothing."
import ast
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import papermill as pm
import pytest

from umt.experiments.launchers import LAUNCHERS
from umt.experiments.results import stale_results

nbs = Path(__file__).resolve().parent.parent/'nbs'
ONE_STAGE = ['ablation_layers', 'ablation_masking', 'ablation_ratio']
TWO_STAGES = ['ablation_mm_masking', 'ablation_objectives', 'table_zero_shot']
WITH_PARAMETERS = [*ONE_STAGE, *TWO_STAGES, 'nano_teacher', 'quickstart', 'recognition_probes']


def read_lines(path): return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(900)
def test_quickstart(tmp_path):
    parameters = dict(preset='quick_emoji', out_dir=str(tmp_path/'out'), seeds=2, processes=2)
    options = dict(kernel_name='python3', cwd=tmp_path, progress_bar=False)
    for _ in range(2): pm.execute_notebook(nbs/'quickstart.ipynb', tmp_path/'out.ipynb', parameters, **options)
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert set(results['top1']) == {'category', 'action'}
    assert all(len(model['values']) == 2 for probe in results['top1'].values() for model in probe.values())
    steps = read_lines(tmp_path/'out/pretrain/metrics.jsonl')
    assert len(steps) == results['pretraining']['steps'] / 2 # logged once, not twice
    assert len(json.loads((tmp_path/'out/pretrain/environment.json').read_text())) == 1 # started once


def papermill(notebook, output, **parameters):
    "The command of the README, in a process of its own."
    given = [word for name, value in parameters.items() for word in ('-p', name, str(value))]
    command = [sys.executable, '-m', 'papermill', str(nbs/f'{notebook}.ipynb'), str(output), '--no-progress-bar']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*command, *given], cwd=output.parent, **pipes)


def finished(process, code=0):
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == code, printed
    return printed


def printed_by(output):
    "All text that a notebook's cells have put out."
    outputs = [o for c in nbformat.read(output, as_version=4).cells if c.cell_type == 'code' for o in c.outputs]
    return '\n'.join(o.get('text') or o.get('data', {}).get('text/plain', '') for o in outputs)


def processes_of(folder):
    "Processes with a folder on their command line."
    found = []
    for file in Path('/proc').glob('[0-9]*/cmdline'):
        try: found += [int(file.parent.name)] if str(folder).encode() in file.read_bytes() else []
        except OSError: pass
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end: pytest.fail('waited in vain')
        time.sleep(.2)


def done_at(runs, *kinds):
    "When runs were finished."
    files = [file for kind in kinds for file in runs.glob(f'{kind}*/done.json')]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('experiments')


@pytest.mark.timeout(1800)
def test_killed_ablation_leaves_nothing_running_and_repeats_nothing(out):
    runs, quick = out/'runs', dict(preset='quick', seeds=2, out_dir=out/'runs')
    first = papermill('ablation_masking', out/'masking.ipynb', **quick)
    wait_for(lambda: len(list(runs.glob('*/done.json'))) >= 4 or first.poll() is not None, 600)
    first.kill()
    first.communicate()
    wait_for(lambda: not processes_of(runs), 60)
    done = done_at(runs, '')
    assert 4 <= len(done) < 30, finished(first, -signal.SIGKILL)
    finished(papermill('ablation_masking', out/'masking.ipynb', **quick))
    assert {file: file.stat().st_mtime_ns for file in done} == done
    for file in done:
        if not file.parent.name.startswith('stage1'): continue
        assert len(json.loads((file.parent/'environment.json').read_text())) == 1
    assert len(done_at(runs, 'stage1-')) == 10 and len(done_at(runs, 'recognition-')) == 20
    printed = printed_by(out/'masking.ipynb')
    assert printed.count('(difference ') == 8 and 'semantic, sparse' in printed


def test_the_students_have_learned(out):
    "Of the masking ablation: each pre-training's loss has fallen, with every kind of mask."
    curves = {file.parent.name: read_lines(file) for file in (out/'runs').glob('stage1-*/metrics.jsonl')}
    losses = {name: [record['loss'] for record in curve if 'loss' in record] for name, curve in curves.items()}
    assert losses and all(loss[-1] < loss[0] for loss in losses.values()), losses


@pytest.mark.timeout(900)
def test_figures_share_the_default_pretraining(out):
    before = set((out/'runs').glob('stage1-*'))
    for name in ('layers', 'ratio'):
        parameters = dict(preset='quick', seeds=1, out_dir=out/'runs', save_to=out/f'{name}.json')
        finished(papermill(f'ablation_{name}', out/f'{name}.ipynb', **parameters))
    assert len(set((out/'runs').glob('stage1-*')) - before) == 3 + 5
    saved = json.loads((out/'layers.json').read_text())
    assert [line['row'] for line in saved['table']] == [row for row in '1234' for _ in range(2)]
    assert all('one value' in verdict for verdict in saved['verdicts'].values())


def test_wrong_parameters_end_the_notebook_before_anything_runs(tmp_path):
    wrong = {"unknown parameter 'seed'; did you mean 'seeds'?": dict(seed=3),
             'k400_root': dict(preset='b16_paper')}
    for complaint, parameters in wrong.items():
        process = papermill('ablation_masking', tmp_path/'out.ipynb', out_dir=tmp_path/'runs', **parameters)
        assert complaint in finished(process, code=1)
    assert not list(tmp_path.glob('runs/*'))


def test_papermill_may_inject_its_paths(tmp_path):
    "Its own parameters are no slip; the next thing that is wrong is what the notebook complains about."
    command = [sys.executable, '-m', 'papermill', str(nbs/'ablation_ratio.ipynb'), str(tmp_path/'out.ipynb')]
    command += ['--inject-paths', '--no-progress-bar', '-p', 'preset', 'b16_paper', '-p', 'out_dir', str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    complaint = done.stderr.split('ValueError')[-1]
    assert done.returncode == 1 and 'k400_root' in complaint and 'PAPERMILL_' not in complaint


WRONG = {
    'seeds = 0': 'parameter seeds 0: expected 1 or more',
    'seeds = "3"': "parameter seeds: '3' is str, expected int",
    'seeds = [0, 1]': 'parameter seeds: [0, 1] is list, expected int',
    'preset = "nano_emojii"': "parameter preset: unknown 'nano_emojii', expected one of ",
    'launcher = "slrum"': "unknown launcher 'slrum', expected one of " + ', '.join(LAUNCHERS),
    'launcher_options = {"threads": "1e0"}': "launcher option threads: '1e0' is not int",
    'launcher_options = {"thread": 1}': "launcher 'local' has no option 'thread'; did you mean 'threads'?",
    'steps = 0': 'parameter steps 0: expected 1 or more',
    'retrain = 1': 'parameter retrain: 1 is int, expected bool',
    'nonsense = 1': "unknown parameter 'nonsense'",
}


@pytest.mark.parametrize('name', WITH_PARAMETERS)
def test_each_notebook_refuses_wrong_parameters_by_name(name, monkeypatch, tmp_path):
    "The cells of a notebook up to the check, which papermill would execute one by one."
    monkeypatch.chdir(tmp_path)
    cells = nbformat.read(nbs/f'{name}.ipynb', as_version=4).cells
    declared = next(c.source for c in cells if 'parameters' in c.metadata.get('tags', []))
    code = [c.source for c in cells if c.cell_type == 'code']
    until = next(i for i, source in enumerate(code) if 'check_parameters(In' in source)
    space = {}
    for source in code[:until]: exec(source, space)
    assigned = {t.id for n in ast.parse(declared).body for t in getattr(n, 'targets', [getattr(n, 'target', None)])}
    tried = [given for given in WRONG if given.split(' ')[0] in assigned | {'nonsense'}]
    assert len(tried) >= 2
    for given in tried:
        space['In'] = ['', declared, f'# Parameters\n{given}\n']
        with pytest.raises(ValueError) as raised: exec(code[until], space)
        assert WRONG[given] in str(raised.value) and '\n' not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(900)
def test_retrieval_tables_share_stages_and_repeat_nothing(out):
    runs = out/'runs'
    finished(papermill('table_zero_shot', out/'zero_shot.ipynb', preset='quick', out_dir=runs)) # two processes
    done = done_at(runs, 'stage1', 'stage2', 'retrieval')
    assert len(list(runs.glob('stage2-*'))) == 1 and len(list(runs.glob('retrieval-*/evaluation.json'))) == 2
    for name, rows in (('objectives', 5), ('mm_masking', 6)):
        parameters = dict(preset='quick', seeds=1, launcher='inline', out_dir=runs, save_to=out/f'{name}.json')
        finished(papermill(f'ablation_{name}', out/f'{name}.ipynb', **parameters))
        saved = json.loads((out/f'{name}.json').read_text())
        assert len({line['row'] for line in saved['table']}) == rows
        assert all(cost['peak_gib'] > 0 for cost in saved['costs'].values())
    assert len(list(runs.glob('stage2-*/done.json'))) == 1 + 5 + 5 # both have the default row
    finished(papermill('table_zero_shot', out/'zero_shot.ipynb', preset='quick', out_dir=runs))
    assert {file: file.stat().st_mtime_ns for file in done} == done


def test_stored_results_say_their_numerics_version():
    "Stale ones are listed: they are not wrong, but of an earlier package."
    for file in (nbs/'results').glob('*.json'): assert 'numerics' in json.loads(file.read_text()), file
    for name, version in stale_results(nbs).items(): warnings.warn(f'{name} was made with numerics version {version}')
