"Whatever ends a process ends its loader workers: each way in a process of its own, with bounded waits."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='reads /proc'),
    pytest.mark.timeout(90)]  # a process that hangs before it prints anything
WORKER = Path(__file__).with_name('signals_worker.py')
SECONDS = 20  # for any one wait; far more than is needed

@pytest.fixture
def start():
    "Starts the worker script in a session of its own; whatever a test leaves running is killed."
    begun = []
    def start_case(case):
        process = subprocess.Popen([sys.executable, str(WORKER), case], text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        begun.append(process)
        word, *pids = process.stdout.readline().split()
        assert word == 'workers' and len(pids) == 2, (word, pids, process.stdout.read())
        return process, [int(pid) for pid in pids]
    yield start_case
    for process in begun:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()

def runs(pid):
    "Is there such a process? One that has ended and waits to be collected does not count."
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False

def assert_gone(pids):
    end = time.monotonic() + SECONDS
    while left := [pid for pid in pids if runs(pid)]:
        if time.monotonic() > end: pytest.fail(f'loader workers {left} live on')
        time.sleep(.1)

def ended(process, pids):
    "The exit code and what was printed, once the process and its workers have ended."
    try:
        code = process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f'the process lives on; it printed:\n{process.stdout.read()}')
    assert_gone(pids)
    return code, process.stdout.read()

@pytest.mark.parametrize('case, code, message', [
    ('error', 1, 'ZeroDivisionError'),
    ('error without the context', 1, 'ZeroDivisionError'),
    ('error in a worker', 1, 'sample 20 is bad'),
    ('stuck workers', 1, 'ZeroDivisionError'),
    ('persistent workers', 1, 'ZeroDivisionError'),
    ('lock left by an interrupt', 1, 'ZeroDivisionError'),
    ('lock of a dead worker', 1, 'ZeroDivisionError'),
    ('sys.exit', 3, '')])
def test_end_from_within(start, case, code, message):
    found, printed = ended(*start(case))
    assert found == code and message in printed, printed
    assert 'is killed by signal' not in printed and 'exited unexpectedly' not in printed, printed

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_to_every_process_of_the_job(start, number):
    process, pids = start('signal')
    os.killpg(process.pid, number)
    code, printed = ended(process, pids)
    assert code == 75 and 'saved' in printed, printed

def test_stop_signal_to_the_main_process(start):
    process, pids = start('signal')
    process.terminate()
    code, printed = ended(process, pids)
    assert code == 75 and 'saved' in printed, printed

@pytest.mark.parametrize('whole_group', [True, False], ids=['terminal', 'kill -INT'])
def test_interrupt(start, whole_group):
    process, pids = start('signal')
    os.killpg(process.pid, signal.SIGINT) if whole_group else process.send_signal(signal.SIGINT)
    code, printed = ended(process, pids)
    assert code == -signal.SIGINT and 'KeyboardInterrupt' in printed, printed

@pytest.mark.parametrize('case', ['signal', 'workers never answer'])
def test_kill_of_the_main_process_ends_its_workers(start, case):
    process, pids = start(case)
    time.sleep(.5)
    process.kill()
    assert ended(process, pids)[0] == -signal.SIGKILL

def test_second_signal_ends_at_once(start):
    process, pids = start('slow step')
    process.terminate()
    time.sleep(1.5)
    assert process.poll() is None
    process.terminate()
    assert ended(process, pids)[0] == 128 + signal.SIGTERM
