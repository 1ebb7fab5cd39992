"Kills, signals, damage, NaNs and several processes: what the notebook cannot show. One tiny model."
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from training_worker import CONFIG, run
from umt.core import runs
from umt.core.config import override
from umt.core.runs import CheckpointError, RunLocked, lock_run
from umt.data.media import TooManyBadClips
from umt.training.schedule import OptimizerConfig, learning_rate
from umt.training.step import NonfiniteError

WORKER = Path(__file__).with_name('training_worker.py')

def start(calls, processes=1, timeout=300):
    "Run the worker in a process of its own, or in several under torchrun; returns the exit code and what it printed."
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}'] if processes > 1 else []
    command = [sys.executable, *torchrun, str(WORKER), json.dumps(calls)]
    done = subprocess.run(
        command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True, timeout=timeout, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    return done.returncode, done.stdout

def weights(folder): return load_file(Path(folder) / 'model.safetensors')
def metrics(folder, timing=('clips_per_second', 'data_wait', 'peak_gib', 'seconds', 'seconds_left')):
    records = [json.loads(line) for line in open(Path(folder) / 'metrics.jsonl')]
    return [{name: value for name, value in record.items() if name not in timing} for record in records]
def assert_same(a, b, tolerance=0.):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m: f'{name}: {m}')

def steps_saved(folder): return sorted(int(p.name[5:]) for p in (Path(folder) / 'checkpoints').glob('step-*'))

@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The undisturbed run: one process, two micro-batches per step."
    folder = tmp_path_factory.mktemp('straight')
    run(folder)
    return folder

def test_killed_and_stopped_runs_end_bit_equal(straight, tmp_path):
    kill_at = random.choice((7, 9, 11))  # inside a step: after the checkpoint at step 3, before the one at 6
    call = {'folder': str(tmp_path), 'num_workers': 1, 'term_group': True}
    assert start([{**call, 'kill_at': kill_at}])[0] == -signal.SIGKILL, f'{kill_at=}'
    assert steps_saved(tmp_path) == [3]
    assert start([{**call, 'kill_on_sync': 'optimizer.safetensors'}])[0] == -signal.SIGKILL
    assert steps_saved(tmp_path) == [3] and list((tmp_path / 'checkpoints').glob('.*.tmp'))
    code, printed = start([{**call, 'term_at': 9}])  # the second micro-batch of step 8
    assert code == 75, printed
    assert steps_saved(tmp_path) == [6, 8] and not list((tmp_path / 'checkpoints').glob('.*.tmp'))
    run(tmp_path)
    assert_same(straight, tmp_path)
    assert metrics(straight) == metrics(tmp_path)
    assert [start['start_step'] for start in json.loads((tmp_path / 'environment.json').read_text())] == [0, 3, 3, 8]

def test_two_processes(straight, tmp_path):
    "One torchrun launch: gloo DDP and FSDP against one process, stop on one rank only, NaN on one rank only."
    run(tmp_path / 'plain', dropout=0.)
    run(tmp_path / 'big', dropout=0., micro_batch_size=16)
    def call(name, **options): return {'folder': str(tmp_path / name), 'micro_batch_size': None, **options}
    code, printed = start([
        call('ddp', dropout=0.), call('fsdp', dropout=0., sharding='fsdp'),
        call('split', dropout=0., micro_batch_size=4), call('drop'),
        call('bf16', sharding='fsdp', precision='bf16'),
        call('stopped', again={}, term_at=6, term_rank=1),
        call('fsdp_stopped', again={}, term_at=6, term_rank=1, sharding='fsdp'),
        call('nan', poison=[5]), call('all_nan', poison=[*range(80)], max_nonfinite=4, checkpoint_every=2),
        call('more_broken', broken=[1, 2], term_at=6, again={'broken': [3, 4]}, bad_clip_limit=.04),
        call('broken', broken=[1, 2, 3], bad_clip_limit=.05)], processes=2)  # finishes: an orderly exit of both
    assert code == 0, printed
    # the sums of gradients are formed in another order, nothing else differs: 1e-6 absolute after 15 steps
    for name in ('big', 'ddp', 'fsdp', 'split'): assert_same(tmp_path / 'plain', tmp_path / name, 1e-6)
    # with drop-out: two processes draw what two micro-batches of one process draw
    for name in ('drop', 'stopped', 'fsdp_stopped'): assert_same(straight, tmp_path / name, 1e-6)
    outcome = {}
    for name in ('stopped', 'fsdp_stopped', 'nan', 'all_nan', 'broken', 'more_broken'):
        outcome[name], other = (json.loads((tmp_path / name / f'outcome-{rank}.json').read_text()) for rank in (0, 1))
        assert outcome[name] == other
    for name in ('stopped', 'fsdp_stopped'): assert outcome[name][0] == 75 and outcome[name][1]['step'] == 15
    assert outcome['nan'][0]['skipped'] == 3  # one sample of 80, met by one rank once in each of 3 epochs
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / 'nan').values())
    assert 'not finite in 4 steps in a row' in outcome['all_nan'][0] and len(ids_in(outcome['all_nan'][0])) == 64
    assert outcome['broken'][0]['quarantined'] == 3
    too_many = '4 of 80 clips cannot be decoded, more than 4.0%'  # two of them before the stop
    assert outcome['more_broken'] == [75, too_many]
    assert metrics(tmp_path / 'bf16')[-1]['loss'] < metrics(tmp_path / 'bf16')[0]['loss'] / 2

def ids_in(message): return [int(i) for part in message.split('[')[1:] for i in part.split(']')[0].split(',')]

def interrupted(folder, **options):
    with pytest.raises(InterruptedError): run(folder, raise_at=20, **options)  # during step 10
    return sorted((folder / 'checkpoints').glob('step-*'))

@pytest.mark.parametrize('damage', ['changed', 'truncated', 'missing', 'manifest'])
def test_damaged_checkpoint_falls_back(straight, tmp_path, caplog, damage):
    older, newest = interrupted(tmp_path)
    file = newest / 'optimizer.safetensors'
    if damage == 'changed': file.write_bytes(file.read_bytes()[:-1] + b'?')
    if damage == 'truncated': file.write_bytes(file.read_bytes()[:100])
    if damage == 'missing': file.unlink()
    if damage == 'manifest': (newest / 'manifest.json').write_text('{"model')
    run(tmp_path)
    assert f'damaged checkpoint {newest}: ' in caplog.text
    assert [s['start_step'] for s in json.loads((tmp_path / 'environment.json').read_text())] == [0, 6]
    assert_same(straight, tmp_path)

def test_full_disk_keeps_the_last_checkpoint(straight, tmp_path, monkeypatch):
    interrupted(tmp_path)
    def full(tensors, path):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(runs, 'save_file', full)
        with pytest.raises(OSError, match='No space left'): run(tmp_path)
    assert steps_saved(tmp_path) == [6, 9]
    run(tmp_path)
    assert_same(straight, tmp_path)

def test_all_checkpoints_damaged_is_an_error(tmp_path, caplog):
    for checkpoint in interrupted(tmp_path): (checkpoint / 'state.json').unlink()
    for _ in range(2):  # the second time, too
        with pytest.raises(CheckpointError, match='only damaged-step-00000006.*, damaged-step-00000009'): run(tmp_path)
    assert caplog.text.count('state.json is missing') == 2

def test_nonfinite_run_stops_with_sample_ids_and_keeps_the_checkpoint(tmp_path):
    interrupted(tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / 'checkpoints').rglob('*') if p.is_file()}
    with pytest.raises(NonfiniteError, match=r'2 steps in a row; sample ids: step 10: \[.*\]; step 11: \[') as error:
        run(tmp_path, poison=range(80), max_nonfinite=2)
    assert len(ids_in(str(error.value))) == 32
    assert before == {p: p.read_bytes() for p in (tmp_path / 'checkpoints').rglob('*') if p.is_file()}

def test_fp16_scaler_skips_and_resumes(tmp_path):
    assert run(tmp_path / 'a', precision='fp16')[1]['skipped'] > 0
    interrupted(tmp_path / 'b', precision='fp16')
    assert json.loads((tmp_path / 'b/checkpoints/step-00000009/state.json').read_text())['scaler']['scale'] > 0
    run(tmp_path / 'b', precision='fp16')
    assert_same(tmp_path / 'a', tmp_path / 'b')

def test_changed_config_is_refused(straight):
    with pytest.raises(ValueError, match=r'another config .*device.precision.*'): run(straight, lr=.2, precision='bf16')
    assert run(straight, log_every=1, num_workers=2)[1]['step'] == 15  # free fields may change; the stored result

def test_too_many_unreadable_clips(tmp_path):
    with pytest.raises(TooManyBadClips, match='of 80 clips cannot be decoded'): run(tmp_path, broken=[1, 2, 3])
    assert 'broken' in (tmp_path / 'quarantine.jsonl').read_text()

def test_batch_must_divide_and_fit(tmp_path):
    with pytest.raises(ValueError, match='micro_batch_size 5 does not divide the 16 samples .*; 4 does'):
        run(tmp_path, micro_batch_size=5)
    with pytest.raises(ValueError, match='batch_size=96: expected 1 to 80'): run(tmp_path, batch_size=96)
    with pytest.raises(TooManyBadClips): run(tmp_path, batch_size=8, broken=[1, 2, 3])
    assert run(tmp_path, broken=[4, 5], bad_clip_limit=.025)[1]['quarantined'] == 2  # failed attempts leave nothing
    assert json.loads((tmp_path / 'config.json').read_text())['loop']['batch_size'] == 16

def test_closed_stdout_does_not_end_the_run(tmp_path):
    calls = json.dumps([{'folder': str(tmp_path), 'log_every': 1}])
    command = f"{sys.executable} {WORKER} '{calls}' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(['bash', '-c', command], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path)) == 15 and (tmp_path / 'result.json').exists()

def test_usage_names_the_module():
    done = subprocess.run([sys.executable, '-m', 'umt.tasks.stage1', '--epoch', '3'], text=True, capture_output=True)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith('python -m umt.tasks.stage1: error: ')
    assert "did you mean 'epochs'?" in line

def test_schedule_is_the_reference_s():
    config, per_epoch = OptimizerConfig(lr=1.5e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=40), 317
    warmup, rest = 40 * per_epoch, 160 * per_epoch
    cosine = [8e-5 + .5 * (1.2e-3 - 8e-5) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]
    got = [learning_rate(step, config, per_epoch, 200, 2048) for step in range(warmup + rest)]
    np.testing.assert_allclose(got, [*np.linspace(8e-6, 1.2e-3, warmup), *cosine], rtol=1e-12)


# what a user gets wrong

@pytest.mark.parametrize('name, value', [
    ('log_every', 0), ('checkpoint_every', 0), ('keep_checkpoints', -1), ('keep_checkpoints', 0), ('epochs', 0),
    ('lr', math.nan), ('warmup_epochs', -1), ('batch_size', 0), ('num_sample', 0), ('clip_grad', 0), ('ema_decay', 1),
    ('num_workers', -1), ('betas', (.9, 1.))])
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name): override(CONFIG, {name: value})

def test_a_run_directory_in_use_is_refused(tmp_path):
    with lock_run(tmp_path), pytest.raises(RunLocked, match=f'{os.getpid()}'): run(tmp_path)
    assert run(tmp_path)[1]['step'] == 15

def test_a_run_without_a_single_good_step_has_failed(tmp_path):
    with pytest.raises(NonfiniteError, match='nothing was trained'): run(tmp_path, poison=range(80))
    assert not (tmp_path / 'result.json').exists()

def test_a_finished_run_says_so(straight, caplog):
    caplog.set_level('INFO', 'umt')
    run(straight)
    assert 'finished before, at step 15' in caplog.text
