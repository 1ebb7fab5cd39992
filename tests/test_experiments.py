"The experiment notebooks run headless, from any folder, with their quick parameters; a second run repeats nothing."
import json, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import papermill as pm
import pytest

nbs = Path(__file__).resolve().parent.parent/'nbs'


@pytest.mark.timeout(900)
def test_quickstart(tmp_path):
    parameters = dict(preset='quick_emoji', out_dir=str(tmp_path/'out'), seeds=2, processes=2)
    for _ in range(2):
        pm.execute_notebook(nbs/'quickstart.ipynb', tmp_path/'out.ipynb', parameters, kernel_name='python3', cwd=tmp_path, progress_bar=False)
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert set(results['top1']) == {'category', 'action'} and all(len(m['values']) == 2 for p in results['top1'].values() for m in p.values())
    assert len((tmp_path/'out/pretrain/metrics.jsonl').read_text().splitlines()) == results['pretraining']['steps'] / 2   # logged once, not twice
    assert len(json.loads((tmp_path/'out/pretrain/environment.json').read_text())) == 1   # started once


def papermill(notebook, output, **parameters):
    "The command of the README, in a process of its own."
    given = [word for name, value in parameters.items() for word in ('-p', name, str(value))]
    return subprocess.Popen([sys.executable, '-m', 'papermill', str(nbs/f'{notebook}.ipynb'), str(output), '--no-progress-bar', *given], cwd=output.parent,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.2)


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
    done = {file: file.stat().st_mtime_ns for file in runs.glob('*/done.json')}
    assert 4 <= len(done) < 30, finished(first, -signal.SIGKILL)
    finished(papermill('ablation_masking', out/'masking.ipynb', **quick))
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert all(len(json.loads((file.parent/'environment.json').read_text())) == 1 for file in done if file.parent.name.startswith('stage1'))
    assert len(list(runs.glob('stage1-*/done.json'))) == 10 and len(list(runs.glob('recognition-*/done.json'))) == 20
    printed = printed_by(out/'masking.ipynb')
    assert printed.count('(difference ') == 8 and 'semantic, sparse' in printed


@pytest.mark.timeout(900)
def test_figures_share_the_default_pretraining(out):
    before = set((out/'runs').glob('stage1-*'))
    for name, rows in (('layers', 4), ('ratio', 6)): finished(papermill(f'ablation_{name}', out/f'{name}.ipynb', preset='quick', seeds=1, out_dir=out/'runs', save_to=out/f'{name}.json'))
    assert len(set((out/'runs').glob('stage1-*')) - before) == 3 + 5
    saved = json.loads((out/'layers.json').read_text())
    assert [line['row'] for line in saved['table']] == [row for row in '1234' for _ in range(2)] and all('one value' in v for v in saved['verdicts'].values())


def test_wrong_parameters_end_the_notebook_before_anything_runs(tmp_path):
    for wrong, complaint in ((dict(seed=3), "unknown parameter 'seed'; did you mean 'seeds'?"), (dict(preset='nano_emojy'), "did you mean 'nano_emoji'?"),
                             (dict(preset='quick', launcher='slrum'), "did you mean 'slurm'?"), (dict(preset='b16_paper'), 'k400_root')):
        assert complaint in finished(papermill('ablation_masking', tmp_path/'out.ipynb', out_dir=tmp_path/'runs', **wrong), code=1)
    assert not list(tmp_path.glob('runs/*'))


@pytest.mark.timeout(900)
def test_retrieval_tables_share_stages_and_repeat_nothing(out):
    runs = out/'runs'
    finished(papermill('table_zero_shot', out/'zero_shot.ipynb', preset='quick', out_dir=runs)) # two processes
    done = {file: file.stat().st_mtime_ns for kind in ('stage1', 'stage2', 'retrieval') for file in runs.glob(f'{kind}-*/done.json')}
    assert len(list(runs.glob('stage2-*'))) == 1 and len(list(runs.glob('retrieval-*/evaluation.json'))) == 2
    for name, rows in (('objectives', 5), ('mm_masking', 6)):
        finished(papermill(f'ablation_{name}', out/f'{name}.ipynb', preset='quick', seeds=1, launcher='inline', out_dir=runs, save_to=out/f'{name}.json'))
        saved = json.loads((out/f'{name}.json').read_text())
        assert len({line['row'] for line in saved['table']}) == rows and all(cost['peak_gib'] > 0 for cost in saved['costs'].values())
    assert len(list(runs.glob('stage2-*/done.json'))) == 1 + 5 + 5 # both have the default row
    finished(papermill('table_zero_shot', out/'zero_shot.ipynb', preset='quick', out_dir=runs))
    assert {file: file.stat().st_mtime_ns for file in done} == done
