"""A folder as people have them: forty files of many kinds, three of them broken. It trains, names the three, and not a
bit depends on workers."""
import json

import av
import numpy as np
import pytest

from umt.core.files import file_hash
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
