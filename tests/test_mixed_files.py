"""A folder as people have them: forty files of many kinds, three of them broken. It trains, names the three, and not a
bit depends on workers. A clip whose decoder hangs costs that clip, and no decoder outlives a run, however it ends."""
import json
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from PIL import Image
from test_watching import PROGRAM, ends

from umt.core.config import UsageError
from umt.core.files import file_hash
from umt.data.captions import read_captions
from umt.data.media import LoaderConfig, MediaDataset
from umt.data.tables import read_manifest
from umt.data.watching import Watcher
from umt.tasks import stage1

KINDS = [('mp4', 'libx264'), ('avi', 'mpeg4'), ('mkv', 'libvpx-vp9'), ('ts', 'mpeg2video'), ('webm', 'libvpx'),
         ('mov', 'prores_ks'), ('flv', 'flv'), ('mpg', 'mpeg1video'), ('mp4', 'libx265'), ('avi', 'mjpeg'),
         ('gif', 'gif')]
FORMATS = {'libx264': 'yuv420p', 'prores_ks': 'yuv422p10le', 'mjpeg': 'yuvj420p', 'gif': 'rgb8'}
BROKEN = {'cut.mp4': 'TruncatedVideo', 'notes.mp4': 'UnreadableVideo', 'playlist.mp4': 'UnreadableVideo'}
COUNT = 40


def write_clip(path, codec: str, seed: int):
    "Twenty noisy frames, a size of its own, a key frame every eight."
    draw, height, width = np.random.default_rng(seed), 112 + 16*(seed % 3), 128 + 16*(seed % 4)
    with av.open(str(path), 'w', options={'movflags': 'faststart'} if path.suffix == '.mp4' else {}) as out:
        options = {'x265-params': 'log-level=none'} if codec == 'libx265' else {}
        stream = out.add_stream(codec, rate=25, width=width, height=height, options=options)
        stream.pix_fmt, stream.gop_size = FORMATS.get(codec, 'yuv420p'), 8
        still = draw.integers(0, 256, (height//16, width//16, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 4*i, 1), 'rgb24')
            out.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        out.mux(stream.encode(None))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The files and their list."
    root = tmp_path_factory.mktemp('mixed')
    for i in range(COUNT - len(BROKEN)):
        suffix, codec = KINDS[i % len(KINDS)]
        write_clip(root/f'clip {i:02d}.{suffix}', codec, i)
    whole = (root/'clip 00.mp4').read_bytes()
    (root/'cut.mp4').write_bytes(whole[:len(whole)//2])
    (root/'notes.mp4').write_text('no pixels here\n'*50)
    (root/'playlist.mp4').write_text("ffconcat version 1.0\nfile 'clip 00.mp4'\n")
    names = sorted(path.name for path in root.iterdir())
    assert len(names) == COUNT
    (root/'list.csv').write_text('path,label\n' + ''.join(f'{name},0\n' for name in names))
    return root


def train(folder, run, workers):
    stage1.main([
        '--preset', 'quick_emoji', '--data-root', str(folder), '--train-list', 'list.csv', '--val-list', 'none',
        '--run-dir', str(run), '--epochs', '2', '--batch-size', '8', '--num-workers', str(workers),
        '--bad-clip-limit', '.1'])
    return run


def test_it_trains_names_what_is_broken_and_does_not_depend_on_workers(folder, tmp_path):
    runs = [train(folder, tmp_path/f'{workers} workers', workers) for workers in (0, 1, 2)]
    assert len({file_hash(run/'model.safetensors') for run in runs}) == 1
    for run in runs:
        listed = [json.loads(line) for line in (run/'quarantine.jsonl').read_text().splitlines()]
        assert {clip['path']: clip['reason'].split(':')[0] for clip in listed} == BROKEN
        result = json.loads((run/'result.json').read_text())
        assert result['quarantined'] == 3 and sum(result['read_by'].values()) == 80
        read_by = json.loads((run/'environment.json').read_text())[-1]['read_by']
        assert any('by key frame' in how for how in read_by) and any('in order' in how for how in read_by)


# ---- A decoder that hangs

@pytest.fixture(scope='module')
def hanging(tmp_path_factory):
    "Eight clips, and a list in which a ninth hangs."
    root = tmp_path_factory.mktemp('hanging')
    for i in range(8): write_clip(root/f'{i}.mp4', 'libx264', i)
    (root/'hang.mp4').write_bytes((root/'0.mp4').read_bytes())
    names = [*(f'{i}.mp4' for i in range(8)), 'hang.mp4']
    (root/'list.csv').write_text('path,label\n' + ''.join(f'{name},0\n' for name in names))
    return root


def options(folder, run, workers, timeout=2, batch=8):
    return ['--preset', 'quick_emoji', '--data-root', str(folder), '--train-list', 'list.csv', '--val-list', 'none',
            '--run-dir', str(run), '--epochs', '1', '--batch-size', str(batch), '--num-workers', str(workers),
            '--bad-clip-limit', '.2', '--clip-timeout', str(timeout), '--checkpoint-every', '1']


def program(folder):
    "A decoder that hangs where the name says so, and leaves its process id in a folder."
    pids = folder/'pids'
    pids.mkdir(exist_ok=True)
    return f'{PROGRAM}\nopen({str(pids)!r} + f"/{{os.getpid()}}", "w").close()'


def quarantined(run): return [json.loads(line) for line in (run/'quarantine.jsonl').read_text().splitlines()]


def decoders(tmp_path): return [int(path.name) for path in (tmp_path/'pids').iterdir()]


def test_a_clip_that_hangs_costs_itself_with_any_number_of_workers(hanging, tmp_path, monkeypatch):
    monkeypatch.setattr(Watcher, 'program', program(tmp_path))
    for workers in (0, 2):
        stage1.main(options(hanging, tmp_path/f'{workers}', workers))
        clip, = quarantined(tmp_path/f'{workers}')
        assert clip['path'] == 'hang.mp4' and clip['reason'].startswith('DecoderTimeout: still not decoded after 2 s')
    assert file_hash(tmp_path/'0/model.safetensors') == file_hash(tmp_path/'2/model.safetensors')
    assert len(decoders(tmp_path)) >= 4 and sum(not ends(pid) for pid in decoders(tmp_path)) == 0


SCRIPT = """
import sys
from umt.data.watching import Watcher
from umt.tasks import stage1
Watcher.program = sys.argv.pop(1)
stage1.main(sys.argv[1:])
"""


def start(hanging, tmp_path, *command, **how):
    (tmp_path/'script.py').write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, *command, tmp_path/'script.py', program(tmp_path),
         *options(hanging, tmp_path/'run', **how)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_a_clip_that_hangs_costs_itself_in_two_processes(hanging, tmp_path):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    run = start(hanging, tmp_path, *torchrun, workers=1, timeout=2)
    printed, _ = run.communicate(timeout=280)
    assert run.returncode == 0, printed
    assert [clip['path'] for clip in quarantined(tmp_path/'run')] == ['hang.mp4']
    assert all(map(ends, decoders(tmp_path)))


@pytest.mark.parametrize('number, code', [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, -signal.SIGINT)])
def test_no_decoder_outlives_a_run_that_is_ended(hanging, tmp_path, number, code):
    run = start(hanging, tmp_path, workers=2, timeout=500, batch=4)
    for _ in range(1200):
        if (tmp_path/'pids').exists() and len(decoders(tmp_path)) == 2: break
        time.sleep(.1)
    time.sleep(1)
    os.kill(run.pid, number)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == code, printed
    assert len(decoders(tmp_path)) == 2 and all(map(ends, decoders(tmp_path)))


# ---- Options of the loader

def first_failure(dataset, index):
    failures = dataset[0, index]['failures']
    return failures[0][2] if failures else None


def test_limits_are_of_images_and_videos(hanging, tmp_path):
    clips = read_manifest(hanging/'list.csv').subset(range(8))
    Image.new('RGB', (200, 100)).save(tmp_path/'big.png')
    Image.new('RGB', (20, 10)).save(tmp_path/'small.png')
    (tmp_path/'pairs.json').write_text(json.dumps([{'image': f'{n}.png', 'caption': n} for n in ('big', 'small')]))
    pairs = {'image': [read_captions(tmp_path/'pairs.json')]}
    encode = lambda sentence: np.zeros(1)
    for watched in (0, 30):
        small = LoaderConfig(clip_timeout=watched, max_frame_pixels=128*112, max_image_pixels=1000)
        found = first_failure(MediaDataset(clips, 2, loader=small), 1) # 128 x 144
        assert 'UnreadableVideo: frames of ' in found and 'more than' in found
        assert 'ImageError' in first_failure(MediaDataset(pairs, 1, encode=encode, loader=small), 0)
        assert first_failure(MediaDataset(pairs, 1, encode=encode, loader=small), 1) is None
        assert first_failure(MediaDataset(clips, 2, loader=LoaderConfig(clip_timeout=watched)), 1) is None


def test_a_failure_in_a_worker_is_one_line_with_the_clips(hanging, tmp_path):
    args = [*options(hanging, tmp_path/'run', 1), '--max-frame-pixels', '100']
    with pytest.raises(UsageError) as error: stage1.main(args)
    assert error.value.code == 1 and 'Traceback' not in error.value.message
    assert ': failed: none of 9 clips could be decoded:\n  ' in error.value.message
    with pytest.raises(UsageError, match='timeout 1 s: expected more than clip_timeout, 2 s'):
        stage1.main([*options(hanging, tmp_path/'run', 1), '--loader.timeout', '1'])


@pytest.mark.parametrize('said, reason', [
    ('20', None), ('', None), ('-1', None), ('0', None), ('20.0', None), ('19', '19 frames expected, 20 in the file'),
    ('2000', '2000 frames expected, 20 in the file'), ('many', "num_frames 'many' in the list: expected a number"),
    ('inf', "num_frames 'inf' in the list: expected a number"), ('1e400', 'expected a number')])
def test_wrong_counts_in_a_list(hanging, tmp_path, said, reason):
    (tmp_path/'list.csv').write_text(f'path,label,num_frames\n1.mp4,0,{said}\n2.mp4,0,\n')
    found = first_failure(MediaDataset(read_manifest(tmp_path/'list.csv', hanging), 2), 0)
    assert (found is None) if reason is None else (reason in found)
