"Files under kills, and several processes that write the same one; JSON that is not what it should be; the log."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from umt.core.files import complete, host_name, is_leftover, read_json, remove_leftovers, set_aside, write_json
from umt.core.log import MetricsLog, logger, read_metrics, setup_logging

SECONDS = 60  # bound of a wait

def start(code, *arguments):
    "Run Python code in a process of its own."
    return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)

WRITE_MANY = '''
import sys
from pathlib import Path
from umt.core.files import complete, remove_leftovers
target, word = Path(sys.argv[1]), sys.argv[2]
for _ in range(100):
    with complete(target) as temporary:
        remove_leftovers(target.parent)
        temporary.write_text(word * 10000)
'''

def test_two_processes_write_one_file(tmp_path):
    target = tmp_path / 'table.csv'
    writers = [start(WRITE_MANY, target, word) for word in 'ab']
    while any(writer.poll() is None for writer in writers):
        if target.exists(): assert target.read_text() in ('a' * 10000, 'b' * 10000)
        time.sleep(.01)
    for writer in writers:
        assert writer.wait(SECONDS) == 0, writer.stdout.read()
    assert list(tmp_path.iterdir()) == [target]

KILLED = '''
import os, signal, sys
from pathlib import Path
from umt.core.files import complete
with complete(Path(sys.argv[1])) as temporary:
    if sys.argv[2] == 'folder':
        temporary.mkdir()
        temporary = temporary / 'part'
    temporary.write_text('half')
    print('writing', flush=True)
    if sys.argv[3] == 'kill': os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
'''

@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_kill_while_writing(tmp_path, kind):
    target = tmp_path / 'target'
    killed = start(KILLED, target, kind, 'kill')
    assert killed.wait(SECONDS) == -signal.SIGKILL
    assert [is_leftover(path) for path in tmp_path.iterdir()] == [True]  # and no target
    assert len(remove_leftovers(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []

def test_complete_removes_what_a_killed_process_left(tmp_path):
    assert start(KILLED, tmp_path / 'other', 'file', 'kill').wait(SECONDS) == -signal.SIGKILL
    write_json(tmp_path / 'new.json', {})
    assert [path.name for path in tmp_path.iterdir()] == ['new.json']

def test_what_a_living_process_writes_stays(tmp_path):
    living = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path / 'target'), 'file', 'wait'],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert living.stdout.readline() == b'writing\n'
        assert remove_leftovers(tmp_path) == []
        with complete(tmp_path / 'target') as temporary:
            temporary.write_text('first')
        living.communicate(timeout=SECONDS)
    finally:
        living.kill()
    assert living.returncode == 0
    assert (tmp_path / 'target').read_text() == 'half'  # the last one to finish
    assert len(list(tmp_path.iterdir())) == 1

def test_leftovers_of_other_hosts_go_by_age(tmp_path):
    other = tmp_path / f'.a.{host_name()}x-{os.getpid()}-00000000.tmp'
    unknown = tmp_path / '.step-00000070.tmp'  # of an older version
    for path in (other, unknown): path.write_text('')
    assert remove_leftovers(tmp_path) == []
    for path in (other, unknown): os.utime(path, (0, 0))
    assert remove_leftovers(tmp_path) == [other, unknown]

def test_an_exception_leaves_the_old_folder(tmp_path):
    target = tmp_path / 'step'
    for text in ('first', 'second'):
        with complete(target) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    with pytest.raises(InterruptedError), complete(target) as temporary:
        temporary.mkdir()
        raise InterruptedError
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob('*'))] == ['step', 'step/second']

@pytest.mark.parametrize('content, expected', [
    (b'{"a": 1', 'is not JSON'), (b'', 'is not JSON'), (b'\x00' * 20, 'is not JSON'),
    (b'[1]', 'holds a list, expected an object'), (b'null', 'holds null, expected an object'),
    (b'"caf\xe9"', 'is not text in UTF-8'), (b'[' * 10**6, 'is nested too deeply')])
def test_read_json_names_the_file_and_the_fault(tmp_path, content, expected):
    path = tmp_path / 'x.json'
    path.write_bytes(content)
    with pytest.raises(ValueError) as error: read_json(path)
    assert str(path) in str(error.value) and expected in str(error.value) and '\n' not in str(error.value)

def test_read_json_without_a_file_and_with_a_byte_order_mark(tmp_path):
    with pytest.raises(FileNotFoundError, match='x.json: no such file'): read_json(tmp_path / 'x.json')
    with pytest.raises(ValueError, match='is a folder'): read_json(tmp_path)
    (tmp_path / 'x.json').write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / 'x.json') == {'a': 1}
    with pytest.raises(ValueError): write_json(tmp_path / 'x.json', float('nan'))
    assert read_json(tmp_path / 'x.json') == {'a': 1}

def test_set_aside_twice(tmp_path):
    for text in 'ab':
        (tmp_path / 'x').write_text(text)
        set_aside(tmp_path / 'x')
    assert sorted(path.read_text() for path in tmp_path.glob('x.damaged-*')) == ['a', 'b']

RECORD = {
    'step': 1, 'steps': 9, 'epoch': .1, 'loss': None, 'lr': .1, 'clips_per_second': 1., 'data_wait': 0., 'peak_gib': 1.,
    'skipped': 0, 'seconds_left': 3.}

@pytest.mark.parametrize('damage', [
    b'{"step": 2, "lo', b'\x00' * 100 + b'\n', b'[1]\n', b'{"loss": 1}\n', b'\xff\xfe\n'])
def test_damaged_metrics_are_set_aside(tmp_path, capsys, damage):
    setup_logging()
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(json.dumps(RECORD).encode() + b'\n' + damage)
    log = MetricsLog(tmp_path, 1, 9)
    log.write({**RECORD, 'step': 2}, ['loss'])
    log.close()
    assert read_metrics(path) == ([RECORD, {**RECORD, 'step': 2}], 0)
    [aside] = tmp_path.glob('metrics.jsonl.damaged-*')
    assert aside.read_bytes().endswith(damage)
    printed = capsys.readouterr().out
    assert 'warning:' in printed and aside.name in printed and 'loss nan' in printed

def test_evaluations_in_the_metrics_file_and_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = MetricsLog(tmp_path, 0, 9)
    log.write(RECORD, ['loss'])
    log.write({'kind': 'eval', 'split': 'validation', 'step': 1, 'top1': .5}, ['top1'])
    log.write({'kind': 'eval', 'step': 1, 'top1': .7}, ['top1'], prefix='other/')
    log.close()
    assert [record.get('kind') for record in read_metrics(tmp_path / 'metrics.jsonl')[0]] == [None, 'eval', 'eval']
    board = EventAccumulator(str(tmp_path / 'tensorboard'))
    board.Reload()
    assert {'lr', 'validation/top1', 'other/top1'} <= set(board.Tags()['scalars'])
    assert board.Scalars('validation/top1')[0].value == .5

def test_without_tensorboard_it_is_said_once(tmp_path, capsys, monkeypatch):
    from umt.core import log
    setup_logging()
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    monkeypatch.setattr(log, '_missing_board_reported', False)
    for _ in range(2): MetricsLog(tmp_path, 0, 9).close()
    assert capsys.readouterr().out.count('TensorBoard is not installed') == 1

def test_messages_by_rank(capsys, monkeypatch):
    setup_logging()
    setup_logging()
    monkeypatch.setenv('RANK', '2')
    logger.info('one of many')
    logger.error('broken')
    monkeypatch.setenv('RANK', '0')
    logger.info('the main one')
    assert capsys.readouterr().out == '[rank 2] error: broken\nthe main one\n'

PIPE = '''
from umt.core.log import logger, setup_logging
setup_logging()
for n in range(20000): logger.info('line %d', n)
open(__import__('sys').argv[1], 'w').write('done')
'''

def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    writer = start(PIPE, tmp_path / 'end')
    assert writer.stdout.readline() == 'line 0\n'
    writer.stdout.close()
    assert writer.wait(SECONDS) == 0
    assert (tmp_path / 'end').read_text() == 'done'

def test_files_log_and_signals_do_not_import_torch():
    code = 'import sys, umt.core.files, umt.core.log, umt.core.signals; sys.exit("torch" in sys.modules)'
    assert start(code).wait(SECONDS) == 0
