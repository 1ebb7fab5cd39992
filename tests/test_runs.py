"Run directories: two starts of one command, other inputs, kills while a checkpoint is written, damage."
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from umt.core import runs
from umt.core.files import file_hash, read_json, write_json
from umt.core.runs import (
    CheckpointError, CheckpointWriter, DamagedRun, RunLocked, checkpoint_fault, lock_run, newest_checkpoint, open_run,
    record_start, save_checkpoint)

SECONDS = 60  # bound of a wait
CONFIG = {'loop': {'lr': .1, 'betas': [.9, .95]}, 'mask': {'ratio': .8}}
ALL = {'loop': {'lr': .1, 'betas': [.9, .95], 'watts': None}, 'mask': {'ratio': .8}}
INPUTS = {'train_list': 'a' * 64}

def weights(value): return {'model': {'w': torch.full((1000,), float(value))}}

HOLDER = '''
import os, sys, time
from umt.core.runs import lock_run
with lock_run(sys.argv[1]):
    child = os.fork()  # as a loader worker: it outlives its parent here
    if child: print(child, flush=True)
    time.sleep(600)
'''

def test_second_start_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path):
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RunLocked) as error, lock_run(tmp_path): pass
        assert f'process {holder.pid} on {socket.gethostname()} since 20' in str(error.value)
        assert '\n' not in str(error.value) and isinstance(error.value, ValueError)
        holder.kill()
        holder.wait(SECONDS)
        os.kill(child, 0)  # still there
        with lock_run(tmp_path): pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / '.lock').exists()

def test_lock_ends_with_an_error(tmp_path):
    with pytest.raises(InterruptedError), lock_run(tmp_path): raise InterruptedError
    with lock_run(tmp_path): assert read_json(tmp_path / '.lock')['pid'] == os.getpid()

def test_a_lock_file_without_a_lock_is_free(tmp_path):
    (tmp_path / '.lock').write_text('{"pid": 1')
    with lock_run(tmp_path): pass

@pytest.fixture
def begun(tmp_path):
    "A run directory with a checkpoint."
    assert open_run(tmp_path, CONFIG, ALL, INPUTS) is None
    save_checkpoint(tmp_path / 'checkpoints', weights(1), {'step': 1}, keep=2)
    return tmp_path

@pytest.mark.parametrize('change, message', [
    (lambda c: c['loop'].update(lr=.2), 'loop.lr: 0.1 -> 0.2'),
    (lambda c: c['loop'].update(betas=(.9, .999)), 'loop.betas: [0.9, 0.95] -> [0.9, 0.999]'),
    (lambda c: c.update(mask=None), 'mask: {"ratio": 0.8} -> null'),
    (lambda c: c['mask'].update(kind='tube'), 'mask.kind: not stored -> "tube"')])
def test_another_config_is_refused(begun, change, message):
    config = json.loads(json.dumps(CONFIG))
    change(config)
    before = (begun / 'config.json').read_bytes()
    with pytest.raises(ValueError) as error: open_run(begun, config, ALL, INPUTS)
    assert message in str(error.value)
    assert (begun / 'config.json').read_bytes() == before

def test_all_differences_are_listed(begun):
    with pytest.raises(ValueError, match=r'loop.lr: 0.1 -> 1; mask.ratio: 0.8 -> 0.5; train_list changed'):
        open_run(begun, {'loop': {'lr': 1}, 'mask': {'ratio': .5}}, ALL, {'train_list': 'b' * 64})

@pytest.mark.parametrize('hashes, message', [
    ({'train_list': 'b' * 64}, 'train_list changed: sha256 aaaaaaaaaaaa -> bbbbbbbbbbbb'),
    ({**INPUTS, 'test_list': 'c' * 64}, 'test_list changed: sha256 none -> cccccccccccc'),
    ({}, 'train_list changed: sha256 aaaaaaaaaaaa -> none')])
def test_other_inputs_are_refused(begun, hashes, message):
    with pytest.raises(ValueError, match=message): open_run(begun, CONFIG, ALL, hashes)

def test_shortened_list_is_refused(tmp_path):
    clips = tmp_path / 'train.csv'
    clips.write_text(''.join(f'{n}.mp4,0\n' for n in range(12)))
    open_run(tmp_path / 'run', CONFIG, ALL, {'train_list': file_hash(clips)})
    save_checkpoint(tmp_path / 'run/checkpoints', weights(1), {'step': 1}, keep=2)
    assert open_run(tmp_path / 'run', CONFIG, ALL, {'train_list': file_hash(clips)}) is None
    clips.write_text(''.join(f'{n}.mp4,0\n' for n in range(8)))
    with pytest.raises(ValueError, match='train_list changed'):
        open_run(tmp_path / 'run', CONFIG, ALL, {'train_list': file_hash(clips)})

def test_before_the_first_checkpoint_anything_may_change(tmp_path):
    open_run(tmp_path, CONFIG, ALL, INPUTS)
    open_run(tmp_path, {'loop': {'lr': 3}}, {'loop': {'lr': 3}}, {})
    assert read_json(tmp_path / 'config.json') == {'loop': {'lr': 3}}
    assert read_json(tmp_path / 'inputs.json') == {}

def test_an_older_config_is_read_through_upgrade(begun):
    write_json(begun / 'config.json', {'lr': .1, 'mask_ratio': .8})
    def upgrade(old): return {'loop': {'lr': old['lr'], 'betas': [.9, .95]}, 'mask': {'ratio': old['mask_ratio']}}
    assert open_run(begun, CONFIG, ALL, INPUTS, upgrade) is None
    assert read_json(begun / 'config.json') == ALL
    (begun / 'inputs.json').unlink()  # a run of that time had none
    assert open_run(begun, CONFIG, ALL, INPUTS, upgrade=lambda old: old) is None
    assert read_json(begun / 'inputs.json') == INPUTS

@pytest.mark.parametrize('damage', ['missing', 'half', 'list'])
def test_a_run_without_a_readable_config_is_not_guessed(begun, damage):
    if damage == 'missing': (begun / 'config.json').unlink()
    else: (begun / 'config.json').write_text({'half': '{"loop', 'list': '[]'}[damage])
    with pytest.raises(DamagedRun, match='config.json'): open_run(begun, CONFIG, ALL, INPUTS)

@pytest.fixture
def finished(begun):
    "A run directory with a result."
    save_file({'w': torch.ones(2)}, begun / 'model.safetensors')
    write_json(begun / 'result.json', {'loss': 1., 'model_sha256': file_hash(begun / 'model.safetensors')})
    return begun

def test_a_finished_run_answers_only_the_same_question(finished):
    assert open_run(finished, CONFIG, ALL, INPUTS)['loss'] == 1.
    with pytest.raises(ValueError, match='train_list changed'): open_run(finished, CONFIG, ALL, {'train_list': 'b'})

@pytest.mark.parametrize('damage, message', [
    ('weights', 'does not match its hash'), ('no weights', 'is missing'), ('result', 'is not JSON')])
def test_a_damaged_finished_run_is_an_error(finished, damage, message):
    if damage == 'weights': save_file({'w': torch.zeros(2)}, finished / 'model.safetensors')
    if damage == 'no weights': (finished / 'model.safetensors').unlink()
    if damage == 'result': (finished / 'result.json').write_text('{"loss"')
    with pytest.raises(DamagedRun, match=message): open_run(finished, CONFIG, ALL, INPUTS)

def test_a_damaged_environment_does_not_block_a_resume(begun, caplog):
    (begun / 'environment.json').write_text('{"a": 1}')
    record_start(begun, 1, SimpleNamespace(device=torch.device('cpu'), num_processes=1), numerics=4)
    [start] = read_json(begun / 'environment.json', list)
    assert (start['start_step'], start['numerics']) == (1, 4)
    [aside] = begun.glob('environment.json.damaged-*')
    assert aside.name in caplog.text and 'expected a list' in caplog.text

@pytest.mark.parametrize('damage, fault', [
    ('changed', 'model.safetensors does not match its hash'),
    ('truncated', 'model.safetensors does not match its hash'),
    ('missing', 'model.safetensors is missing'),
    ('manifest', 'manifest.json is not JSON'),
    ('no manifest', 'manifest.json is missing'),
    ('empty manifest', 'manifest.json does not list state.json')])
def test_a_damaged_checkpoint_falls_back(begun, caplog, damage, fault):
    newest = save_checkpoint(begun / 'checkpoints', weights(2), {'step': 2}, keep=2)
    file = newest / 'model.safetensors'
    if damage == 'changed': file.write_bytes(file.read_bytes()[:-1] + b'?')
    if damage == 'truncated': file.write_bytes(file.read_bytes()[:100])
    if damage == 'missing': file.unlink()
    if damage == 'manifest': (newest / 'manifest.json').write_text('{"model')
    if damage == 'no manifest': (newest / 'manifest.json').unlink()
    if damage == 'empty manifest': (newest / 'manifest.json').write_text('{}')
    assert checkpoint_fault(newest) == fault
    assert newest_checkpoint(begun / 'checkpoints').name == 'step-00000001'
    assert fault in caplog.text
    (begun / 'checkpoints/step-00000001/state.json').unlink()
    with pytest.raises(CheckpointError, match='no good checkpoint'): newest_checkpoint(begun / 'checkpoints')

KILLED = '''
import os, signal, sys, time
import torch
from umt.core import files
from umt.core.runs import CheckpointWriter
sync = files.sync_to_disk
def deadly_sync(path):
    if path.name == sys.argv[2] and 'step-00000002' in str(path): os.kill(os.getpid(), signal.SIGKILL)
    sync(path)
files.sync_to_disk = deadly_sync
writer = CheckpointWriter(sys.argv[1], keep=2)
weight = torch.ones(1000)
for step in (1, 2):
    weight.fill_(step)
    writer.save({'model': {'w': weight}}, {'step': step})
    weight.fill_(-1)  # training goes on
writer.close()
'''

@pytest.mark.parametrize('name', ['model.safetensors', 'manifest.json'])
def test_kill_while_a_checkpoint_is_written(tmp_path, name):
    folder = tmp_path / 'checkpoints'
    killed = subprocess.run([sys.executable, '-c', KILLED, str(folder), name], timeout=SECONDS)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(folder.glob('.*.tmp'))) == 1
    newest = newest_checkpoint(folder)
    assert newest.name == 'step-00000001'
    assert torch.equal(load_file(newest / 'model.safetensors')['w'], torch.ones(1000))
    with CheckpointWriter(folder, keep=2) as writer: writer.save(weights(2), {'step': 2})
    assert sorted(path.name for path in folder.iterdir()) == ['step-00000001', 'step-00000002']

def test_one_checkpoint_at_a_time_and_errors_are_not_lost(tmp_path, monkeypatch, caplog):
    gate, saved = threading.Event(), []
    def slow_save(folder, tensors, state, keep):
        assert gate.wait(SECONDS)
        if state['step'] == 2: raise OSError('disk full')
        saved.append((state['step'], tensors['model']['w'][0].item()))
    monkeypatch.setattr(runs, 'save_checkpoint', slow_save)
    writer, tensors, state = CheckpointWriter(tmp_path, keep=1), weights(1), {'step': 1}
    writer.save(tensors, state)  # returns although nothing is written
    tensors['model']['w'].fill_(7)
    state['step'] = 7
    assert saved == []
    second = threading.Thread(target=writer.save, args=(weights(2), {'step': 2}))
    second.start()
    second.join(.2)
    assert second.is_alive()  # waits for the first
    gate.set()
    second.join(SECONDS)
    assert saved == [(1, 1.)]
    with pytest.raises(OSError, match='disk full'): writer.save(weights(3), {'step': 3})
    writer.close()  # reported once
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(weights(2), {'step': 2})
        1 / 0
    assert 'could not be written: disk full' in caplog.text

@pytest.mark.parametrize('keep', [0, -1])
def test_keeping_no_checkpoint_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match='expected at least 1'): save_checkpoint(tmp_path, {}, {'step': 1}, keep)
    with pytest.raises(ValueError, match='expected at least 1'): CheckpointWriter(tmp_path, keep)

def test_the_newest_are_kept(tmp_path):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in range(1, 6): writer.save(weights(step), {'step': step})
        assert writer.wait().name == 'step-00000005'
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ['step-00000004', 'step-00000005']
