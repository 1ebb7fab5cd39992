"""Frame i is the i-th frame that FFmpeg shows when it decodes the file from the start, for every container, codec and
backend, or the backend refuses with a `VideoError`. The files and the truth are those of media_matrix.py."""
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
from media_matrix import (
    CASES, COUNT, HEIGHT, WIDTH, in_order, missing, numbers_in_order, read_numbers, requests, run)

from umt.data import video
from umt.data.containers import Source, VideoError
from umt.data.video import probe, read_frames

try: from torchcodec.decoders import VideoDecoder
except (ImportError, RuntimeError, OSError): VideoDecoder = None # not installed, or without FFmpeg's shared libraries
READERS = 'auto', 'pyav' # that read every file
BACKENDS = ['auto', 'pyav', 'decord', *(['torchcodec'] if VideoDecoder else [])]
each_case = pytest.mark.parametrize('case', CASES, ids=[case.file for case in CASES])
each_backend = pytest.mark.parametrize('case,backend', [
    pytest.param(case, backend, id=f'{case.file}-{backend}') for case, backend in product(CASES, BACKENDS)])
needs_ffmpeg = pytest.mark.skipif(missing() is not None, reason=str(missing()))
decoded = lru_cache(1)(in_order) # the tests of one file follow each other

def pictures(source, indices, backend='auto', **options):
    "uint8 [T,H,W,3], as `read_frames` reads them"
    return read_frames(source, indices, backend, **options).permute(0, 2, 3, 1).numpy()

def difference(one, other):
    "The largest difference of two pictures, in levels of 256"
    assert one.shape == other.shape
    return abs(one.astype(int) - other).max()


# ---- the matrix

@each_case
def test_pyav_shows_what_ffmpeg_shows(media, case):
    folder, truth = media
    assert len(truth[case.file]) > 10
    assert numbers_in_order(folder/case.file) == truth[case.file]

@each_backend
def test_right_frames(media, case, backend):
    folder, truth = media
    path, numbers = folder/case.file, truth[case.file]
    frames, keys = decoded(path)
    refusals = []
    for indices in requests(COUNT if case.sizes else len(numbers), keys): # COUNT: the frames of the first size
        try: got = pictures(path, indices, backend)
        except VideoError as error: refusals.append(str(error))
        else:
            assert read_numbers(got).tolist() == [numbers[i] for i in indices], f'{indices} asked'
            if backend in READERS: assert difference(got, np.stack([frames[i] for i in indices])) <= 2
    if backend in READERS and not case.rare: assert not refusals

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('case', [case for case in CASES if case.sizes], ids=lambda case: case.file)
def test_sizes_that_change(media, case, backend):
    "Frames of two sizes cannot be one clip: refused, or scaled to one size as ffmpeg does"
    folder, truth = media
    try: got = pictures(folder/case.file, [0, 150], backend)
    except VideoError: return
    assert read_numbers(got).tolist() == [truth[case.file][i] for i in (0, 150)]

@each_case
def test_probe_counts_what_is_shown(media, case):
    folder, truth = media
    try: info = probe(folder/case.file)
    except VideoError:
        if not case.rare: raise
        return
    numbers = truth[case.file]
    assert info.length == len(numbers)
    if case.clock:
        seconds = np.diff(seconds_of(case, numbers)[[0, -1]])[0]
        assert info.fps == pytest.approx((len(numbers) - 1)/seconds, rel=.03)

@each_case
def test_one_reader_reads_many_times(media, case):
    folder, truth = media
    numbers = truth[case.file]
    try: reader = video.VideoReader(folder/case.file)
    except VideoError:
        if not case.rare: raise
        return
    with reader:
        assert reader.length == len(numbers)
        for indices in requests(COUNT if case.sizes else len(numbers), []):
            assert read_numbers(reader.read(indices)).tolist() == [numbers[i] for i in indices]
        assert reader.how


# ---- times

def seconds_of(case, numbers):
    "When frames of these numbers are shown, seconds"
    numbers = np.array(numbers)
    return case.clock(numbers) if callable(case.clock) else numbers/case.clock

@pytest.mark.parametrize('case', [case for case in CASES if case.clock], ids=lambda case: case.file)
def test_times(media, case):
    "Seconds since the first frame that is shown; containers round them to 10 ms at worst"
    folder, truth = media
    expected = seconds_of(case, truth[case.file])
    try: reader = video.VideoReader(folder/case.file)
    except VideoError:
        if not case.rare: raise
        return
    with reader: times = reader.times()
    assert times.dtype == np.float64 and times[0] == 0
    np.testing.assert_allclose(times, expected - expected[0], atol=.011)

SPANS = [
    ('h264_vfr.mp4', (0, 2), range(50)), ('h264_vfr.mp4', (2, 3.9), range(50, 60)),
    ('vp9_vfr.webm', (1, 2.5), range(25, 53)), ('gif_vfr.gif', (0, 2), range(50)),
    ('h264_gap.mp4', (0, 50), range(30)), ('h264_gap.mp4', (61.2, 62), range(30, 50)),
    ('h264_cut.mp4', (0, 1), range(33, 58)), ('h264_late.mp4', (0, 1), range(25)),
    ('h264_31.ts', (1, 2), range(25, 50)), ('h264_33.ts', (1, 3), range(25, 75)),
    ('theora.ogv', (2, 3), range(50, 75)), ('mpeg4_b.avi', (1, 2), range(25, 50)),
]

@pytest.mark.parametrize('file,span,expected', SPANS)
def test_spans_are_seconds(media, file, span, expected):
    "By time stamps, not by a nominal rate: two seconds of a recording whose rate falls are its first 50 frames"
    folder, _ = media
    expected, wanted = list(expected), None
    def every(length):
        nonlocal wanted
        wanted = length
        return range(length)
    assert read_numbers(pictures(folder/file, every, span=span)).tolist() == expected
    assert wanted == len(expected)


# ---- files inside files

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('file', ['h264.mp4', 'h264_open.mkv', 'h264_31.ts', 'mpeg4_b.avi', 'vp9.webm', 'gif.gif',
                                  'mpeg2.mpg'])
def test_stretches_and_bytes(media, tmp_path, file, backend):
    "A member of a shard, and bytes of another store, show what the file shows"
    folder, truth = media
    content, indices = (folder/file).read_bytes(), [0, 99, 31, 57]
    shard = tmp_path/'shard.tar'
    shard.write_bytes(b'x'*1000 + content + b'y'*1000)
    for source in [Source(str(shard), 1000, len(content), f'shard.tar/{file}'), Source(file, content=content)]:
        try: got = pictures(source, indices, backend)
        except VideoError: assert backend not in READERS
        else: assert read_numbers(got).tolist() == [truth[file][i] for i in indices]


# ---- colours

LEVELS = 20, 120, 235
COLOURS = np.array([(r, g, b) for r in LEVELS for g in LEVELS for b in LEVELS][1:25]).reshape(4, 6, 3)
ENCODERS = dict(h264=('mp4', '-c:v libx264 -qp 1'), hevc=('mp4', '-c:v libx265 -x265-params log-level=none:qp=1'),
                vp9=('webm', '-c:v libvpx-vp9 -b:v 4M -deadline realtime'))
CHARTS = [pytest.param(*each, id='-'.join(map(str, each))) for each in product(
    ENCODERS, ['yuv420p', 'yuv420p10le'], ['limited', 'full'], ['bt601', 'bt709'])]

def centres(picture): return picture[8::16, 8::16]

def chart(folder, encoder, pixels, levels, matrix):
    "A video of 24 colours"
    extension, arguments = ENCODERS[encoder]
    raw, path = folder/'chart.rgb', folder/f'chart.{extension}'
    raw.write_bytes(np.kron(COLOURS, np.ones((16, 16, 1))).astype(np.uint8).tobytes()*5)
    out_range, tag = {'limited': 'tv', 'full': 'pc'}[levels], {'bt601': 'smpte170m', 'bt709': 'bt709'}[matrix]
    run(*f'-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r 25 -i {raw} {arguments} -color_range {out_range} '
        f'-vf scale=out_range={out_range}:out_color_matrix={matrix},format={pixels} -colorspace {tag} '
        f'-color_primaries {tag} -color_trc {tag} {path}'.split())
    return path

@needs_ffmpeg
@pytest.mark.parametrize('encoder,pixels,levels,matrix', CHARTS)
def test_colours(tmp_path, encoder, pixels, levels, matrix):
    path = chart(tmp_path, encoder, pixels, levels, matrix)
    reference = pictures(path, [2], 'pyav')[0]
    assert difference(centres(reference), COLOURS) <= 5
    assert difference(pictures(path, [2], 'auto')[0], reference) <= 2 # at the edges of colours, too
    for backend in BACKENDS[2:]:
        try: picture = pictures(path, [2], backend)[0]
        except VideoError: continue
        assert difference(centres(picture), centres(reference)) <= 2, backend
