"A decoder that hangs, crashes or asks for too much costs one clip, and its process never outlives who started it."
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from umt.data.containers import Limits, MissingVideo, Source, UnreadableVideo, VideoError
from umt.data.watching import DecoderCrash, DecoderTimeout, Watcher

# a child whose decoder does what the file's name says
PROGRAM = '''
import os, signal, sys, time, umt.data.watching as w
from umt.core.children import HEAD
def decode(source, *rest, whole=w.decode):
    name = os.path.basename(source.path)
    if 'hang' in name: time.sleep(1000)
    if 'stop' in name: os.kill(os.getpid(), signal.SIGSTOP)
    if 'SIG' in name: os.kill(os.getpid(), getattr(signal, name.split('.')[0]))
    if 'exit' in name: os.write(2, b'free(): invalid pointer\\n\\n'), os._exit(3)
    if 'bomb' in name: return bytearray(2**36), 'never'
    if 'deep' in name: return decode(source, *rest)
    if 'nonsense' in name: os.write(answers, b'x'*100), time.sleep(1000)
    if 'shape' in name: w.send(answers, {'shape': [9, 9, 9, 3], 'how': ''}, b'123'), time.sleep(1000)
    if 'huge' in name: os.write(answers, HEAD.pack(2, 2**60) + b'{}'), time.sleep(1000)
    if 'noise' in name: print('x'*10**6, flush=True), os.write(2, b'y'*10**6)
    return whole(source, *rest)
def own_pipes(own=w.own_pipes):
    global answers
    pipes = own()
    answers = pipes[1]
    return pipes
w.decode, w.own_pipes, serve = decode, own_pipes, w.serve
'''


class Fragile(Watcher):
    program = PROGRAM


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clips')
    with av.open(str(folder/'clip.mp4'), 'w') as out:
        stream = out.add_stream('libx264', rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
        for i in range(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10*i, np.uint8), format='rgb24')))
        out.mux(stream.encode())
    for name in ('noise.mp4', 'http:x.mp4', 'ü.mp4', os.fsdecode(b'\xff\xfe.mp4')):
        (folder/name).write_bytes((folder/'clip.mp4').read_bytes())
    (folder/'text.mp4').write_text('not a video')
    (folder/'empty.mp4').touch()
    (folder/'folder.mp4').mkdir()
    (folder/'loop.mp4').symlink_to('loop.mp4')
    os.mkfifo(folder/'pipe.mp4')
    return folder


@pytest.fixture
def watcher():
    watcher = Fragile(timeout=30)
    yield watcher
    watcher.close()


def greys(frames):
    return [round(value/10) for value in frames.float().mean((1, 2, 3)).tolist()]


def ends(pid):
    "Whether a process ends within a while; a zombie has ended"
    for _ in range(300):
        try: state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        except (FileNotFoundError, ProcessLookupError): return True
        if state in 'ZX': return True
        time.sleep(.1)
    return False


# ---- the same as in this process

@pytest.mark.parametrize('name', ['clip.mp4', 'noise.mp4', 'http:x.mp4', 'ü.mp4', b'\xff\xfe.mp4'])
def test_same_frames_whatever_the_name(folder, watcher, name, monkeypatch):
    monkeypatch.chdir(folder)
    frames, how = watcher.read_frames(name, [0, 5, 5, 19])
    inside, same = Watcher(timeout=0).read_frames(name, [0, 5, 5, 19])
    assert torch.equal(frames, inside) and how == same and frames.dtype == torch.uint8
    assert greys(frames) == [0, 5, 5, 19]


def test_working_directory_may_change(folder, watcher, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingVideo, match='^clip.mp4: '): watcher.read_frames('clip.mp4', [0])
    monkeypatch.chdir(folder)
    assert greys(watcher.read_frames('clip.mp4', [1])[0]) == [1]


@pytest.mark.parametrize('name', ['none.mp4', 'text.mp4', 'empty.mp4', 'folder.mp4', 'loop.mp4', 'pipe.mp4',
                                  'clip.mp4/x.mp4', 'x'*300 + '.mp4', 'nul\0.mp4'])
def test_same_errors(folder, watcher, name):
    found = []
    for w in (watcher, Watcher(timeout=0)):
        with pytest.raises(VideoError) as e: w.read_frames(folder/name, [0])
        found.append((type(e.value), str(e.value)))
        assert type(pickle.loads(pickle.dumps(e.value))) is type(e.value)
    assert found[0] == found[1]
    assert greys(watcher.read_frames(folder/'clip.mp4', [3])[0]) == [3]


@pytest.mark.parametrize('indices, error', [
    ([20], IndexError), ([-1], IndexError), ([], ValueError), ([1.5], ValueError), ([[1]], ValueError),
    (lambda length: [length], IndexError)])
def test_errors_of_the_caller(folder, watcher, indices, error):
    for w in (watcher, Watcher(timeout=0)):
        with pytest.raises(error, match='clip.mp4'): w.read_frames(folder/'clip.mp4', indices)
    with pytest.raises(ValueError, match='backend'): watcher.read_frames(folder/'clip.mp4', [0], backend='vhs')


def test_frames_are_chosen_here_once_the_length_is_known(folder, watcher):
    lengths = []
    def choose(length):
        lengths.append(length)
        return torch.randint(length, (6, ))
    results = []
    for w in (watcher, watcher, Watcher(timeout=0)):
        torch.manual_seed(3)
        results.append(w.read_frames(folder/'clip.mp4', choose)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]) and lengths == [20, 20, 20]


@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError, TimeoutError, BrokenPipeError, EOFError,
                                   lambda: VideoError('a', 'b')])
def test_what_the_choice_raises_comes_through(folder, watcher, error):
    def choose(length): raise error()
    watcher.read_frames(folder/'clip.mp4', [0])
    child = watcher.keeper.child
    with pytest.raises(type(error())): watcher.read_frames(folder/'clip.mp4', choose)
    assert greys(watcher.read_frames(folder/'clip.mp4', [7])[0]) == [7]
    assert watcher.keeper.child is child, 'no need for another child'


def test_span_of_seconds(folder, watcher):
    "12 frames a second: indices count from the first frame of the span"
    for w in (watcher, Watcher(timeout=0)):
        lengths = []
        frames, _ = w.read_frames(folder/'clip.mp4', lambda length: lengths.append(length) or [0, 2], span=(.5, .75))
        assert (greys(frames), lengths) == ([6, 8], [3])
        with pytest.raises(UnreadableVideo, match='clip.mp4: '): w.read_frames(folder/'clip.mp4', [0], span=(50, 60))
        with pytest.raises(IndexError): w.read_frames(folder/'clip.mp4', [3], span=(.5, .75))


def test_wrong_timeout():
    for timeout in (-1, float('nan')):
        with pytest.raises(ValueError, match='timeout'): Watcher(timeout)


# ---- what may happen to a decoder

@pytest.mark.parametrize('name', ['hang.mp4', 'stop.mp4'])
def test_hang_costs_one_clip(folder, name):
    watcher = Fragile(timeout=1)
    with pytest.raises(DecoderTimeout, match=f'{name}: still not decoded after 1 s'):
        watcher.read_frames(folder/name, [0])
    assert watcher.keeper.child is None
    assert greys(watcher.read_frames(folder/'clip.mp4', [3])[0]) == [3]
    watcher.close()


def test_time_of_the_choice_does_not_count(folder):
    watcher = Fragile(timeout=2)
    watcher.read_frames(folder/'clip.mp4', [0])
    def choose(length):
        time.sleep(2.5)
        return [4]
    assert greys(watcher.read_frames(folder/'clip.mp4', choose)[0]) == [4]
    watcher.close()


@pytest.mark.parametrize('name, reason', [
    ('SIGABRT', 'was ended by SIGABRT'), ('SIGSEGV', 'was ended by SIGSEGV'),
    ('SIGKILL', r'was ended by SIGKILL \(out of memory\?\)'), ('SIGALRM', 'was ended by SIGALRM'),
    ('exit', r'ended with code 3: free\(\): invalid pointer'), ('nonsense', 'answers nonsense'),
    ('shape', 'answers nonsense'), ('huge', 'answers nonsense')])
def test_crash_costs_one_clip(folder, watcher, name, reason):
    with pytest.raises(DecoderCrash, match=reason): watcher.read_frames(folder/f'{name}.mp4', [0])
    assert greys(watcher.read_frames(folder/'clip.mp4', [3])[0]) == [3]


@pytest.mark.parametrize('name, reason', [('bomb', 'more memory than is allowed'), ('deep', 'RecursionError')])
def test_too_much_costs_one_clip(folder, watcher, name, reason):
    with pytest.raises(UnreadableVideo, match=reason): watcher.read_frames(folder/f'{name}.mp4', [0])
    assert greys(watcher.read_frames(folder/'clip.mp4', [3])[0]) == [3]


def test_limit_is_of_every_clip_not_of_all(folder):
    watcher = Fragile(timeout=30, memory=2**28)
    for _ in range(40): watcher.read_frames(folder/'clip.mp4', range(20))
    with pytest.raises(UnreadableVideo, match='more memory'): watcher.read_frames(folder/'bomb.mp4', [0])
    watcher.close()


def test_child_that_died_between_clips_is_replaced(folder, watcher):
    for _ in range(3):
        assert greys(watcher.read_frames(folder/'clip.mp4', [3])[0]) == [3]
        os.kill(watcher.keeper.child.process.pid, signal.SIGKILL)


def test_signals_that_are_meant_for_the_parent(folder, watcher):
    watcher.read_frames(folder/'clip.mp4', [3])
    child = watcher.keeper.child
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(child.process.pid, number)
        assert greys(watcher.read_frames(folder/'clip.mp4', [3])[0]) == [3]
    assert watcher.keeper.child is child and os.getsid(child.process.pid) != os.getsid(0)


def test_child_that_cannot_start_is_no_clips_error(folder):
    class Broken(Watcher): program = 'import no_such_module'
    with pytest.raises(RuntimeError, match='cannot be started.*no_such_module') as e:
        Broken().read_frames(folder/'clip.mp4', [0])
    assert not isinstance(e.value, VideoError)


def test_child_does_not_import_torch(folder, watcher):
    watcher.read_frames(folder/'clip.mp4', [0])
    maps = Path(f'/proc/{watcher.keeper.child.process.pid}/maps').read_text()
    assert 'libav' in maps and 'libtorch' not in maps


# ---- processes and threads

class Clips(Dataset):
    def __init__(self, folder, watcher):
        self.folder, self.watcher = folder, watcher

    def __len__(self): return 12

    def __getitem__(self, i):
        torch.manual_seed(i)
        name = 'SIGSEGV.mp4' if i % 5 == 4 else 'clip.mp4'
        try: frames, how = self.watcher.read_frames(self.folder/name, lambda length: torch.randint(length, (3, )))
        except VideoError as e: return type(e).__name__
        return greys(frames), how, self.watcher.keeper.child.process.pid


def test_loader_workers_have_their_own(folder, watcher):
    here = [Clips(folder, watcher)[i] for i in range(12)]
    for num_workers in (0, 1, 2):
        found = list(DataLoader(Clips(folder, watcher), batch_size=None, num_workers=num_workers))
        mine = watcher.keeper.child.process.pid # it lives when the workers are forked
        assert [row if isinstance(row, str) else tuple(row[:2]) for row in found] == [
            row if isinstance(row, str) else row[:2] for row in here]
        children = {row[2] for row in found if not isinstance(row, str)}
        if num_workers:
            assert mine not in children and len(children) >= num_workers
            assert all(map(ends, children)), 'ended with the workers'
    assert [found[4], found[9]] == ['DecoderCrash']*2
    assert greys(watcher.read_frames(folder/'clip.mp4', [2])[0]) == [2]


def test_pickled_watcher_travels_without_child(folder, watcher):
    watcher.read_frames(folder/'clip.mp4', [2])
    other = pickle.loads(pickle.dumps(Fragile(7., Limits(frame_pixels=99), 2**30)))
    assert (other.timeout, other.limits.frame_pixels, other.memory, other.program) == (7., 99, 2**30, PROGRAM)
    assert pickle.loads(pickle.dumps(watcher)).keeper.child is None


def test_threads_take_turns(folder, watcher):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: greys(watcher.read_frames(folder/'clip.mp4', [i, 19 - i])[0]), range(20)))
    assert found == [[i, 19 - i] for i in range(20)]


def test_child_outlives_the_thread_that_started_it(folder, watcher):
    thread = threading.Thread(target=watcher.read_frames, args=(folder/'clip.mp4', [0]))
    thread.start()
    thread.join()
    child = watcher.keeper.child
    time.sleep(.2)
    assert greys(watcher.read_frames(folder/'clip.mp4', [2])[0]) == [2] and watcher.keeper.child is child


def test_garbage_collection_ends_the_child(folder):
    watcher = Fragile(30)
    watcher.read_frames(folder/'clip.mp4', [0])
    process = watcher.keeper.child.process
    del watcher
    gc.collect()
    assert process.returncode == -signal.SIGKILL


SCRIPT = '''
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from torch.utils.data import DataLoader
from test_watching import Clips, Fragile
folder, num_workers, end = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if __name__ == '__main__':
    clips = Clips(folder, Fragile(60))
    rows = [row for row in DataLoader(clips, None, num_workers=num_workers) if len(row) == 3]
    print(clips[0][2], *{row[2] for row in rows}, flush=True)
    loader = iter(DataLoader(clips, None, num_workers=num_workers, persistent_workers=num_workers > 0))
    print(next(loader)[2], flush=True)
    if end == 'wait': time.sleep(100)
    if end == 'busy': clips.watcher.read_frames(folder/'hang.mp4', [0])
'''


def begin(folder, tmp_path, num_workers, end):
    "A process that reads; the ids of its children"
    (tmp_path/'script.py').write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path/'script.py', Path(__file__).parent, folder, str(num_workers), end],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = process.stdout.readline(), process.stdout.readline()
    return process, [int(pid) for line in lines for pid in line.split()]


@pytest.mark.parametrize('num_workers, end, number', [
    (0, 'wait', signal.SIGKILL), (2, 'wait', signal.SIGKILL), (0, 'busy', signal.SIGKILL),
    (2, 'wait', signal.SIGTERM), (2, 'wait', signal.SIGINT), (0, 'busy', signal.SIGINT), (2, 'exit', None)])
def test_nothing_is_left(folder, tmp_path, num_workers, end, number):
    "However a process ends, its children do. Ctrl-C goes to the whole group, as a terminal sends it"
    process, children = begin(folder, tmp_path, num_workers, end)
    assert len(children) >= 2
    time.sleep(.5*(end == 'busy'))
    if number is not None: (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    printed = process.communicate(timeout=60)[1]
    assert all(map(ends, children))
    if number is None: assert (process.returncode, printed) == (0, '')
    if number == signal.SIGINT and not num_workers:
        assert printed.count('Traceback') == 1 and printed.endswith('KeyboardInterrupt\n')


def test_source_in_memory_and_stretch(folder, watcher, tmp_path):
    "Bytes go to the child through the pipe; of a stretch only its place does"
    pytest.importorskip('umt.data.video').VideoReader
    content = (folder/'clip.mp4').read_bytes()
    (tmp_path/'shard').write_bytes(b'x'*777 + content + b'y'*333)
    for source in (Source('nowhere', name='a.mp4', content=content),
                   Source(str(tmp_path/'shard'), 777, len(content), 'shard/a.mp4')):
        assert greys(watcher.read_frames(source, [0, 11])[0]) == [0, 11]
