"""Odd files, grouped by kind: names, file system, sizes, playlists, limits. They show the right frames, or cost one
clip (a `VideoError`); nothing else is opened, nothing hangs, no memory is taken for what a header claims."""
import errno, io, os, re, socket, struct, threading, zipfile
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from media_matrix import (
    AV1, COUNT, MPEG2, MPEG4, VP8, VP9, X264, X265, boxes, encode, in_order, inputs, picture, read_numbers, run)
from PIL import Image

from umt.data import decoders, index, video
from umt.data.containers import EmptyVideo, Limits, MissingVideo, Source, TruncatedVideo, VideoError
from umt.data.media import MediaDataset
from umt.data.tables import read_manifest
from umt.data.transforms import pretrain_transform
from umt.data.video import probe, read_frames

try: from torchcodec.decoders import VideoDecoder
except (ImportError, RuntimeError, OSError): VideoDecoder = None # not installed, or without FFmpeg's shared libraries
BACKENDS = ['auto', 'pyav', 'decord', *(['torchcodec'] if VideoDecoder else [])]
each_backend = pytest.mark.parametrize('backend', BACKENDS)
INDICES = [0, 7, 19]


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "The bytes of an MP4 of 20 numbered frames; PyAV's encoder"
    path = tmp_path_factory.mktemp('clip')/'clip.mp4'
    write(path, 'libx264', [picture(n) for n in range(20)])
    return path.read_bytes()

def write(path, codec, pictures, pixels='yuv420p'):
    with av.open(str(path), 'w') as out:
        stream = out.add_stream(codec, rate=25)
        (stream.height, stream.width), stream.pix_fmt = pictures[0].shape[:2], pixels
        for each in pictures: out.mux(stream.encode(av.VideoFrame.from_ndarray(each, format='rgb24')))
        out.mux(stream.encode())
    return path

def numbers(source, indices=INDICES, backend='auto', **options):
    return read_numbers(read_frames(source, indices, backend, **options).permute(0, 2, 3, 1)).tolist()

def assert_as_in_order(path, few=False):
    "What FFmpeg decodes from the start; a named backend may refuse. `few`: auto and PyAV may refuse as well"
    frames, _ = in_order(path)
    last = len(frames) - 1
    for backend in BACKENDS:
        for indices in ([last], [0, last//2, last], [last//3, last*2//3]):
            try: got = read_frames(path, indices, backend).permute(0, 2, 3, 1).numpy()
            except VideoError:
                assert few or backend not in ('auto', 'pyav')
                continue
            for i, each in zip(indices, got):
                assert each.shape == frames[i].shape and abs(each.astype(int) - frames[i]).max() <= 2, (backend, i)
    if not few: assert probe(path).length == len(frames)

def outcome(function, seconds=5):
    "What it returns or raises, from a thread: a decoder that hangs fails the test and does not hold up the others"
    found = []
    def call():
        try: found.append(function())
        except BaseException as error: found.append(error)
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f'no answer after {seconds} s'
    return found[0]

def assert_refused(source, backend='auto', kind=VideoError, **options):
    "Soon, with an error that names the file in one line"
    error = outcome(lambda: read_frames(source, [0], backend, **options))
    assert isinstance(error, kind), type(error)
    name = os.fsdecode(source) if not isinstance(source, Source) else str(source)
    assert str(error).startswith(f'{name}: ')
    assert error.reason and '\n' not in error.reason


# ---- names

PROTOCOLS = ['co:lon.mp4', 'http:x.mp4', 'file:y.mp4', 'https:x.mp4', 'concat:a.mp4|b.mp4', 'pipe:0.mp4',
             'data:video.mp4', 'fd:x.mp4', 'subfile,,start,0,end,9,,:x.mp4', 'cache:x.mp4', 'crypto:x.mp4',
             'async:x.mp4']
PATTERNS = ['%03d.mp4', 'c%d.mp4', 'a*b?.mp4', '[1].mp4', '-i.mp4', '-', '$HOME.mp4', '~.mp4', 'x#y?z=1.mp4']
LETTERS = ['two words.mp4', 'new\nline.mp4', "quo'te\".mp4", 'ñ.mp4', '\udce9\udcff.mp4', 'a'*250 + '.mp4', '.mp4']
EXTENSIONS = ['noextension', 'clip.jpg', 'clip.m3u8', 'clip.txt', 'clip.sdp']
NAMES = PROTOCOLS + PATTERNS + LETTERS + EXTENSIONS

@each_backend
@pytest.mark.parametrize('name', NAMES, ids=lambda name: ascii(name[:30]))
def test_names_are_names(tmp_path, monkeypatch, clip, name, backend):
    "Whatever a file is called, what it holds counts; relative as well as absolute"
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(clip)
    for path in (name, tmp_path/name, os.fsencode(name), Path(name)):
        try: assert numbers(path, backend=backend) == INDICES
        except VideoError:
            if backend in ('auto', 'pyav'): raise

def test_paths_of_every_type(tmp_path, clip):
    path = tmp_path/'clip.mp4'
    path.write_bytes(clip)
    class Named(os.PathLike):
        def __fspath__(self): return str(path)
    for each in (path, str(path), os.fsencode(path), Named()):
        assert numbers(each) == INDICES
        assert probe(each).length == 20

@each_backend
@pytest.mark.parametrize('name', ['a'*300 + '.mp4', 'a/'*3000 + 'b.mp4', 'nul\0.mp4', 'missing.mp4',
                                  'clip.mp4/inside.mp4', ''], ids=lambda name: ascii(name[:30]))
def test_names_that_no_file_can_have(tmp_path, monkeypatch, clip, name, backend):
    monkeypatch.chdir(tmp_path)
    Path('clip.mp4').write_bytes(clip)
    for source in (name, Source(name), Source(name, 10, 100)):
        with pytest.raises(VideoError): read_frames(source, [0], backend)
    with pytest.raises(VideoError): probe(name)


# ---- the file system

@contextmanager
def as_nobody():
    "Without root's right to read everything"
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)

@each_backend
def test_links_in_a_circle(tmp_path, backend):
    (tmp_path/'self.mp4').symlink_to('self.mp4')
    (tmp_path/'one.mp4').symlink_to('two.mp4')
    (tmp_path/'two.mp4').symlink_to('one.mp4')
    (tmp_path/'dangling.mp4').symlink_to('nowhere.mp4')
    for name in ('self.mp4', 'one.mp4', 'dangling.mp4'): assert_refused(tmp_path/name, backend)

@each_backend
def test_rights(tmp_path, clip, backend):
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent): parent.chmod(0o755)
    readable, closed, folder = tmp_path/'readable.mp4', tmp_path/'closed.mp4', tmp_path/'folder'
    folder.mkdir()
    for path in (readable, closed, folder/'inside.mp4'): path.write_bytes(clip)
    numbers(readable, backend=backend) # imports what reading needs
    closed.chmod(0)
    folder.chmod(0)
    with as_nobody():
        for path in (closed, folder/'inside.mp4'): assert_refused(path, backend)
    folder.chmod(0o755)

@each_backend
def test_what_is_no_file(tmp_path, backend):
    (tmp_path/'folder.mp4').mkdir()
    os.mkfifo(tmp_path/'fifo.mp4')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path/'s.mp4'))
        for path in (tmp_path/'folder.mp4', tmp_path/'fifo.mp4', tmp_path/'s.mp4', '/dev/null', '/dev/zero'):
            assert_refused(path, backend)
            assert_refused(Source(str(path), 10, 1000), backend)

@pytest.mark.parametrize('code', [errno.ESTALE, errno.EIO, errno.EACCES, errno.ENOMEM, errno.EMFILE, errno.ETIMEDOUT],
                         ids=errno.errorcode.get)
def test_errors_of_the_file_system(tmp_path, monkeypatch, clip, code):
    path = tmp_path/'clip.mp4'
    path.write_bytes(clip)
    fail_for(monkeypatch, path, OSError(code, os.strerror(code)))
    for backend in BACKENDS: assert_refused(path, backend)

def test_memory_that_is_not_there(tmp_path, monkeypatch, clip):
    path = tmp_path/'clip.mp4'
    path.write_bytes(clip)
    def no_memory(*args, **options): raise MemoryError
    monkeypatch.setattr(av, 'open', no_memory)
    assert_refused(path)
    assert_refused(path, 'pyav')

def fail_for(monkeypatch, path, error):
    "Whoever opens or asks for this file gets the error"
    def failing(function):
        def call(name, *args, **options):
            if not isinstance(name, int) and str(getattr(name, 'name', name)).endswith(path.name): raise error
            return function(name, *args, **options)
        return call
    for owner, name in ((os, 'stat'), (os, 'open'), (io, 'open'), (av, 'open')):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    monkeypatch.setattr('builtins.open', io.open)


@pytest.mark.parametrize('error', [MemoryError(), OSError(errno.ESTALE, 'Stale file handle')], ids=repr)
@pytest.mark.parametrize('place', [
    (decoders._Pictures, 'put'), (np, 'empty'), (decoders, 'read_index'), (decoders, '_in_order')],
    ids=lambda place: place[1])
def test_memory_or_the_server_fails_while_reading(tmp_path, monkeypatch, place, error):
    "Wherever it happens, it is this clip's error"
    path = write(tmp_path/'clip.avi', 'mpeg4', [picture(n) for n in range(20)])
    def failing(*arguments, **options): raise error
    index.forget()
    monkeypatch.setattr(*place, failing)
    with pytest.raises(VideoError, match='clip.avi: '): read_frames(path, [0, 19])

@pytest.mark.parametrize('file', ['h264.mp4', 'h264_open.mkv', 'mpeg4_b.avi', 'h264.ts', 'gif.gif'])
def test_files_that_change_while_they_are_open(media, tmp_path, file):
    "Deleted or exchanged: the open file is read on. Cut or written over: the right frames, or this clip's error"
    content, other, indices = (media[0]/file).read_bytes(), (media[0]/'h264_no_b.mp4').read_bytes(), [0, 50, 99]
    def exchange(path):
        (tmp_path/'new').write_bytes(other)
        (tmp_path/'new').replace(path)
    def overwrite(path):
        with open(path, 'r+b') as stream: stream.write(other)
    for change, sure in [(Path.unlink, True), (exchange, True), (overwrite, False),
                         (lambda path: os.truncate(path, 1000), False)]:
        path = tmp_path/file
        path.write_bytes(content)
        with video.VideoReader(path) as reader:
            change(path)
            try: found = read_numbers(reader.read(indices)).tolist()
            except VideoError: assert not sure
            else: assert found == indices


# ---- sizes of pictures

@each_backend
@pytest.mark.parametrize('height,width', [(192, 1), (1, 192), (1, 1), (2, 2), (2, 192), (3, 5)])
def test_tiny_pictures(tmp_path, height, width, backend):
    "A clip that the transforms can use, or a typed error"
    path = write(tmp_path/'tiny.mov', 'png', [np.full((height, width, 3), 40*n, np.uint8) for n in range(6)], 'rgb24')
    try: frames = read_frames(path, [0, 2, 5, 5], backend)
    except VideoError: return
    assert frames.shape == (4, 3, height, width)
    assert frames.float().mean((1, 2, 3)).tolist() == pytest.approx([0, 80, 200, 200], abs=2)
    assert pretrain_transform(32)(frames).shape[-2:] == (32, 32)

def test_the_picture_of_a_song_in_front(media, tmp_path):
    "It is no video, wherever it stands"
    Image.fromarray(picture(255)).save(tmp_path/'cover.png')
    for name in ('front.mp4', 'behind.mp4'):
        maps = ['-map', '0', '-map', '1'] if name == 'front.mp4' else ['-map', '1', '-map', '0']
        cover = '0' if name == 'front.mp4' else '1'
        run('-i', tmp_path/'cover.png', '-i', media[0]/'h264.mp4', *maps, '-c', 'copy',
            f'-disposition:v:{cover}', 'attached_pic', tmp_path/name)
        for backend in BACKENDS:
            try: assert numbers(tmp_path/name, [0, 57, 99], backend) == [0, 57, 99]
            except VideoError: assert backend not in ('auto', 'pyav')

@pytest.mark.parametrize('file', ['two.avi', 'two.mkv'])
@pytest.mark.parametrize('larger', [0, 1], ids=['larger first', 'larger second'])
def test_two_videos_in_one_file(media, tmp_path, file, larger):
    "All backends read the one that ffmpeg chooses: by size and, where the container has such a mark, by default"
    path = tmp_path/file
    run(*inputs(media[0]), '-map', '0:v', '-map', '0:v', '-c:v', 'mpeg4', '-q:v', 4, f'-s:v:{larger}', '192x128', path)
    pixels = len(run('-i', path, '-frames:v', 1, '-f', 'rawvideo', '-pix_fmt', 'gray', '-'))
    for backend in BACKENDS:
        try: height, width = read_frames(path, [3], backend).shape[-2:]
        except VideoError: assert backend not in ('auto', 'pyav')
        else: assert height*width == pixels, backend


# ---- other streams, and sound that is longer

SOUNDS = [('avi', MPEG4 + '-c:a mp2'), ('mkv', X264 + '-c:a aac'), ('mp4', X264 + '-c:a aac'), ('mov', X264),
          ('ts', X264 + '-c:a aac'), ('flv', X264 + '-c:a aac'), ('asf', '-c:v wmv2 -q:v 4 -c:a wmav2'),
          ('webm', VP9 + '-c:a libopus'), ('ogv', '-c:v libtheora -q:v 6 -c:a libvorbis')]

@pytest.mark.parametrize('delay', [0, 2], ids=['together', 'video later'])
@pytest.mark.parametrize('extension,arguments', SOUNDS, ids=lambda each: each[:4])
def test_sound_goes_on_after_the_last_picture(media, tmp_path, extension, arguments, delay):
    "20 pictures, 8 seconds of sound: not a video that was cut off"
    path, pictures = tmp_path/f'sound.{extension}', inputs(media[0])[:-4]
    run('-itsoffset', delay, *pictures, *'-f lavfi -i sine=duration=8 -map 0 -map 1 -pix_fmt yuv420p'.split(),
        *arguments.split(), '-frames:v', 20, path)
    assert_as_in_order(path)
    assert numbers(path, [0, 19]) == [0, 19]

@pytest.mark.parametrize('extension,arguments', SOUNDS, ids=lambda each: each[:4])
def test_one_picture_and_a_song(media, tmp_path, extension, arguments):
    path = tmp_path/f'song.{extension}'
    run(*inputs(media[0])[:-4], *'-f lavfi -i sine=duration=8 -map 0 -map 1 -pix_fmt yuv420p'.split(),
        *arguments.split(), '-frames:v', 1, path)
    assert numbers(path, [0, 0]) == [0, 0]
    info = probe(path)
    assert info.length == 1 and np.isfinite(info.fps)

def test_subtitles_and_attachments_in_front(media, tmp_path):
    (tmp_path/'words.srt').write_text('1\n00:00:00,100 --> 00:00:20,000\nhello\n\n')
    Image.fromarray(picture(255)).save(tmp_path/'font.png')
    words = ['-i', tmp_path/'words.srt', '-i', media[0]/'h264.mp4', '-map', '0', '-map', '1', '-c:v', 'copy']
    run(*words, '-attach', tmp_path/'font.png', '-metadata:s:t', 'mimetype=image/png', tmp_path/'words.mkv')
    run(*words, '-c:s', 'mov_text', '-timecode', '01:00:00:00', tmp_path/'words.mp4')
    for name in ('words.mkv', 'words.mp4'):
        assert numbers(tmp_path/name, [0, 57, 99]) == [0, 57, 99]
        assert probe(tmp_path/name).length == COUNT

@pytest.mark.parametrize('kind', ['several', 'interlaced', 'cropped', 'keys missing', 'keys wrong'])
def test_other_decoders_refuse_what_they_take_for_something_else(media, tmp_path, kind):
    "H.264 that they would read from another stream, in other colours or sizes, or from what is no key frame"
    source = media[0]/'h264.mp4'
    path = tmp_path/('odd.mkv' if kind == 'interlaced' else 'odd.mp4')
    if kind == 'several':
        run(*inputs(media[0])[:-4], *f'-map 0 -map 0 -pix_fmt yuv420p {X264}-b:v:0 20k -b:v:1 900k'.split(), path)
    if kind == 'interlaced': encode(media[0], X264 + '-g 10 -x264-params interlaced=1:tff=1', path)
    if kind == 'cropped': run('-i', source, '-c', 'copy', '-bsf:v', 'h264_metadata=crop_left=8:crop_right=8', path)
    if kind.startswith('keys'): path.write_bytes(box_changed(source.read_bytes(), *KEYS[kind]))
    assert_as_in_order(path)
    for backend in BACKENDS[2:]: assert_refused(path, backend)


# ---- codecs and containers that are rarely met

RARE = [
    ('svq1.mov', '-c:v svq1 -pix_fmt yuv410p -q:v 3 -s 128x96'), ('cinepak.avi', '-c:v cinepak -pix_fmt rgb24 -g 10'),
    ('msvideo1.avi', '-c:v msvideo1 -pix_fmt rgb555le'), ('smc.mov', '-c:v smc -pix_fmt pal8'),
    ('utvideo.avi', '-c:v utvideo -pix_fmt yuv422p'), ('magicyuv.avi', '-c:v magicyuv -pix_fmt gbrp'),
    ('ffvhuff.avi', '-c:v ffvhuff -pix_fmt yuv411p'), ('zmbv.avi', '-c:v zmbv -pix_fmt bgr0'),
    ('flashsv.flv', '-c:v flashsv -pix_fmt bgr24'), ('snow.avi', '-c:v snow -strict -2 -q:v 3'),
    ('cfhd.mov', '-c:v cfhd -pix_fmt yuv422p10le'), ('jpeg2000.mov', '-c:v jpeg2000 -pix_fmt yuv420p'),
    ('vc2.drc', '-c:v vc2 -pix_fmt yuv422p -strict -1 -f dirac'), ('hap.mov', '-c:v hap -pix_fmt rgba'),
    ('h261.mkv', '-c:v h261 -s 176x144 -q:v 3'), ('h261.h261', '-c:v h261 -s 176x144 -q:v 3'),
    ('h263p.avi', '-c:v h263p -q:v 3'), ('yuyv.avi', '-c:v rawvideo -pix_fmt yuyv422'),
    ('i420.avi', '-c:v rawvideo -pix_fmt yuv420p'), ('v210.mov', '-c:v v210 -pix_fmt yuv422p10le'),
    ('gray16.mkv', '-c:v ffv1 -pix_fmt gray16le'), ('rgb48.mov', '-c:v png -pix_fmt rgb48be'),
    ('mono.avi', '-c:v png -pix_fmt monob'), ('y4m.y4m', '-strict -1'), ('vp8.ivf', VP8 + '-g 10'),
    ('av1.obu', AV1 + '-g 10'), ('vp8.ogv', VP8 + '-g 10 -f ogg'), ('vp9.avi', VP9 + '-g 10'),
    ('mjpeg.mjpeg', '-c:v mjpeg -q:v 3'), ('mpeg4.m4v', MPEG4 + '-f m4v -bf 2'),
    ('mpeg2.m2v', MPEG2 + '-bf 2'), ('h264.wtv', X264 + '-g 10 -f wtv'), ('h264.ismv', X264 + '-g 10'),
    ('hevc12.mp4', X265 + 'keyint=10 -pix_fmt yuv444p12le'),
    ('lossless.mp4', '-c:v libx264 -qp 0 -preset ultrafast'), ('gray.mp4', X264 + '-pix_fmt gray'),
    ('rgb.mkv', '-c:v libx264rgb -qp 0 -preset ultrafast -pix_fmt rgb24'),
    ('pyramid.mkv', X264 + '-bf 16 -g 30 -x264-params b-pyramid=strict:b-adapt=0:ref=4:open-gop=1'),
    ('pyramid.ts', X264 + '-bf 16 -g 30 -x264-params b-pyramid=strict:b-adapt=0:ref=4:open-gop=1'),
    ('cmaf.mp4', X264 + '-g 10 -movflags cmaf+frag_keyframe'),
    ('every.mp4', X264 + '-g 10 -movflags frag_every_frame+empty_moov+default_base_moof'),
    ('dash.mp4', X264 + '-g 10 -movflags dash+global_sidx+frag_keyframe+delay_moov'),
    ('hours.mkv', X264 + '-g 10 -fps_mode passthrough -vf settb=1/25,setpts=N*90000'),
    ('early.mkv', X264 + '-g 10 -output_ts_offset -1 -avoid_negative_ts disabled'),
    ('coarse.mp4', X264 + '-video_track_timescale 7 -fps_mode passthrough -bf 2'),
    ('fine.mp4', X264 + '-video_track_timescale 1000000000'), ('odd.mkv', X264 + '-r 1000000/33333 -bf 2')]

@pytest.mark.parametrize('file,arguments', RARE, ids=[file for file, _ in RARE])
def test_rare_codecs_and_containers(media, tmp_path, file, arguments):
    assert_as_in_order(encode(media[0], arguments + ' -frames:v 30', tmp_path/file))

@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('extension,arguments', [
    ('mp4', X264), ('mkv', X264), ('avi', MPEG4), ('ts', X264), ('mpg', MPEG2), ('webm', VP9), ('flv', X264),
    ('mov', MPEG4 + '-bf 2'), ('ogv', '-c:v libtheora'), ('asf', '-c:v wmv2'), ('gif', '')], ids=lambda each: each[:4])
def test_few_frames(media, tmp_path, extension, arguments, count):
    path = encode(media[0], f'{arguments} -frames:v {count}', tmp_path/f'few.{extension}')
    try: in_order(path)
    except av.FFmpegError: return assert_refused(path) # so few packets are no stream
    assert_as_in_order(path)
    info = probe(path)
    assert info.length == count and 1 < info.fps <= 1000 # ASF does not say how long a single one is shown


# ---- headers that say something else

def box_changed(content, names, offset, value):
    "An MP4 with another number at this place of a box"
    content, (start, _) = bytearray(content), boxes(content, names, 0, len(content))[-1]
    struct.pack_into('>I', content, start + offset, value)
    return bytes(content)

def box_named(content, names, new):
    "An MP4 in which a box has another name"
    start, _ = boxes(content, names, 0, len(content))[-1]
    return content[:start + 4] + new + content[start + 8:]

def with_edit_list(content, entries):
    "An MP4 with these edits: (1/1000 s that it lasts, where it begins in units of the track, rate)"
    *around, (start, end) = boxes(content, [b'moov', b'trak', b'edts', b'elst'], 0, len(content))
    table = b''.join(struct.pack('>IiI', *entry) for entry in entries)
    table = struct.pack('>I4sII', 16 + len(table), b'elst', 0, len(entries)) + table
    changed = bytearray(content)
    for box, box_end in around: struct.pack_into('>I', changed, box, box_end - box + len(table) - (end - start))
    return bytes(changed[:start] + table + changed[end:])

TRACK = [b'moov', b'trak']
TABLE = [*TRACK, b'mdia', b'minf', b'stbl']
KEYS = {'keys missing': ([*TABLE, b'stss'], 4, int.from_bytes(b'free', 'big')),
        'keys wrong': ([*TABLE, b'stss'], 20, 30)}
NUMBERS = { # whose header is wrong, but FFmpeg shows all frames
    'no duration of the track': ([*TRACK, b'mdia', b'mdhd'], 24, 0),
    'duration not known': ([*TRACK, b'mdia', b'mdhd'], 24, 2**32 - 1),
    'no duration of the film': ([b'moov', b'mvhd'], 24, 0), 'track not enabled': ([*TRACK, b'tkhd'], 8, 0),
    'no key frames': ([*TABLE, b'stss'], 12, 0), 'a brand that nobody knows': ([b'ftyp'], 8, 0x58585858), **KEYS}

@pytest.mark.parametrize('kind', NUMBERS)
def test_numbers_in_the_header_of_an_mp4(media, tmp_path, kind):
    path = tmp_path/'odd.mp4'
    path.write_bytes(box_changed((media[0]/'h264.mp4').read_bytes(), *NUMBERS[kind]))
    assert_as_in_order(path)
    assert numbers(path, [0, 57, 99]) == [0, 57, 99]

WRONG = {
    'no ends of time': ([*TABLE, b'stts'], 20, 0), 'times run back': ([*TABLE, b'stts'], 20, 2**32 - 16),
    'half of the times': ([*TABLE, b'stts'], 16, 50), 'too many times': ([*TABLE, b'stts'], 16, 150),
    'fewer sizes': ([*TABLE, b'stsz'], 16, 90), 'a size of nothing': ([*TABLE, b'stsz'], 20 + 4*50, 0),
    'another place': ([*TABLE, b'stco'], 16, 41), 'no unit of time': ([*TRACK, b'mdia', b'mdhd'], 20, 0),
    'an endless duration': ([*TRACK, b'mdia', b'mdhd'], 24, 10**8)}

@pytest.mark.parametrize('kind', WRONG)
def test_tables_of_an_mp4_that_are_damaged(media, tmp_path, kind):
    "What FFmpeg makes of it, or this clip's error"
    path = tmp_path/'odd.mp4'
    path.write_bytes(box_changed((media[0]/'h264.mp4').read_bytes(), *WRONG[kind]))
    try: truth = in_order(path)[0]
    except av.FFmpegError: truth = None
    if truth: assert_as_in_order(path, few=True)
    else: assert isinstance(outcome(lambda: read_frames(path, list(range(90)))), VideoError)

ONE = 1 << 16 # normal speed; in the track's units a frame lasts 512, and the first is shown at 1024
EDITS = dict(
    empty_first=[(2000, -1, ONE), (4000, 1024, ONE)], only_empty=[(2000, -1, ONE)], none_at_all=[],
    a_gap=[(1000, 1024, ONE), (1000, -1, ONE), (1000, 13824, ONE)], of_no_length=[(0, 1024, ONE)],
    before_the_first=[(4000, 0, ONE)], very_many=[(40, 1024 + 1024*i, ONE) for i in range(50)],
    backwards=[(200, 1024 + (90 - 5*i)*512, ONE) for i in range(15)], stopped=[(1000, 1024, 0), (3000, 1024, ONE)],
    twice_as_fast=[(2000, 1024, 2*ONE)], behind_the_end=[(4000, 10**8, ONE)], too_long=[(400_000, 1024, ONE)],
    again_and_again=[(1000, 1024, ONE)]*4, of_a_negative_time=[(4000, -5, ONE)], tiny=[(1, 1024, ONE)],
    within_frames=[(1333, 1357, ONE)], the_last_ones=[(500, 46080, ONE)])

@pytest.mark.parametrize('kind', EDITS)
def test_edit_lists(media, tmp_path, kind):
    path = tmp_path/'edits.mp4'
    path.write_bytes(with_edit_list((media[0]/'h264.mp4').read_bytes(), EDITS[kind]))
    if in_order(path)[0]: assert_as_in_order(path)
    else: assert_refused(path)

def laid_out(content, kind):
    "The boxes of an MP4 (ftyp, free, mdat, moov) in another arrangement"
    data, header = content.index(b'mdat') - 4, content.index(b'moov') - 4
    if kind == 'a 64-bit size':
        return content[:data - 8] + struct.pack('>I4sQ', 1, b'mdat', header - data + 8) + content[data + 8:]
    if kind == 'moov in the middle': return content + struct.pack('>I4s', 5008, b'mdat') + bytes(5000)
    if kind == 'a box of a camera': return content + struct.pack('>I4s16s', 40, b'uuid', b'x'*16) + bytes(16)
    if kind == 'no ftyp': return content.replace(b'ftyp', b'wide', 1)

@pytest.mark.parametrize('kind', ['a 64-bit size', 'moov in the middle', 'a box of a camera', 'no ftyp'])
def test_boxes_of_an_mp4(media, tmp_path, kind):
    path = tmp_path/'boxes.mp4'
    path.write_bytes(laid_out((media[0]/'h264.mp4').read_bytes(), kind))
    assert_as_in_order(path)
    assert numbers(path, [0, 57, 99]) == [0, 57, 99]

@pytest.mark.parametrize('kind', ['moov missing', 'encrypted'])
def test_an_mp4_that_nobody_can_play(media, tmp_path, kind):
    path, key = tmp_path/'closed.mp4', 'a7e61c373e219033c21091fa607bf3b8'
    if kind == 'encrypted':
        run('-i', media[0]/'h264.mp4', *f'-c copy -encryption_scheme cenc-aes-ctr -encryption_key {key} '
            f'-encryption_kid {key}'.split(), path)
    else: path.write_bytes(box_named((media[0]/'h264.mp4').read_bytes(), [b'moov'], b'junk'))
    assert isinstance(outcome(lambda: read_frames(path, list(range(100)))), VideoError)

AVI = {'count of one': ('strh', 40, 1), 'count of none': ('strh', 40, 0), 'a late start': ('strh', 36, 50),
       'another total': ('avih', 24, 5), 'a short RIFF': ('RIFF', 4, 100), 'no size of the RIFF': ('RIFF', 4, 0)}

@pytest.mark.parametrize('kind', AVI)
def test_numbers_in_the_header_of_an_avi(media, tmp_path, kind):
    path, content = tmp_path/'odd.avi', bytearray((media[0]/'mpeg4_b.avi').read_bytes())
    name, offset, value = AVI[kind]
    struct.pack_into('<I', content, content.index(name.encode()) + offset, value)
    path.write_bytes(content)
    assert_as_in_order(path)
    assert probe(path).length == COUNT

def packets_of(kind, packets):
    "The packets of a transport stream as recorders leave them"
    null = b'\x47\x1f\xff\x10' + b'\xff'*184
    if kind == '204 bytes': return b''.join(p + bytes(16) for p in packets)
    if kind == '192 bytes': return b''.join(b'\0\0\0\1' + p for p in packets)
    if kind == 'stuffed': return b''.join(p + 3*null for p in packets)
    if kind == 'begins within a packet': return b'x'*50 + b''.join(packets)
    if kind == 'zeros behind': return b''.join(packets) + bytes(300_000)
    if kind == 'zeros between': return b''.join(packets[:200]) + bytes(200_000) + b''.join(packets[200:])

@pytest.mark.parametrize('kind', ['204 bytes', '192 bytes', 'stuffed', 'begins within a packet', 'zeros behind',
                                  'zeros between'])
def test_packets_of_a_transport_stream(media, tmp_path, kind):
    content, path = (media[0]/'h264_open.ts').read_bytes(), tmp_path/'odd.ts'
    path.write_bytes(packets_of(kind, [content[i:i + 188] for i in range(0, len(content), 188)]))
    assert numbers(path, [0, 20, 57, 99]) == [0, 20, 57, 99]
    assert probe(path).length == COUNT


# ---- files that name other files

@pytest.fixture
def silent_server():
    "A port that accepts connections and never answers"
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.setblocking(False)
        yield server

def playlists(folder, port):
    address = f'http://127.0.0.1:{port}/clip.ts'
    hls = '#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n'
    end = '#EXT-X-ENDLIST\n'
    dash = ('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
            '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL>'
            '</Representation></AdaptationSet></Period></MPD>')
    sdp = ('v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n'
           'a=rtpmap:96 H264/90000\n')
    return dict(
        ffconcat="ffconcat version 1.0\nfile 'secret.mp4'\n", ffconcat_bare="ffconcat version 1.0\nfile secret.mp4\n",
        ffconcat_absolute=f"ffconcat version 1.0\nfile '{folder}/secret.mp4'\n",
        ffconcat_url=f"ffconcat version 1.0\nfile '{address}'\n",
        ffconcat_outside="ffconcat version 1.0\nfile '../secret.mp4'\n", hls=hls.format('secret.mp4') + end,
        hls_absolute=hls.format(f'file://{folder}/secret.mp4') + end, hls_url=hls.format(address) + end,
        hls_live=hls.format('secret.mp4'), hls_live_url=hls.format(address), dash=dash.format('secret.mp4'),
        dash_url=dash.format(address), sdp=sdp, m3u='#EXTM3U\nsecret.mp4\n', plain='secret.mp4\n', url=f'{address}\n',
        rtsp=f'rtsp://127.0.0.1:{port}/x\n', asx=f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>',
        reference=f'[Reference]\nRef1={address}\n', redirect=f'RTSPtext\nrtsp://127.0.0.1:{port}/x\n')

@each_backend
@pytest.mark.parametrize('kind', playlists('', 0))
def test_playlists_are_refused(tmp_path, clip, silent_server, kind, backend):
    "Also as a member of a shard and as bytes; what they name is not opened"
    for path in (tmp_path/'data'/'secret.mp4', tmp_path/'secret.mp4'):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(clip)
    content = playlists(tmp_path/'data', silent_server.getsockname()[1])[kind].encode()
    for name in ('c.mp4', 'c.m3u8', 'c.ffconcat', 'c.sdp', 'c.ts'):
        (tmp_path/'data'/name).write_bytes(content)
        assert_refused(tmp_path/'data'/name, backend)
    path = tmp_path/'data'/'shard.tar'
    path.write_bytes(b'x'*512 + content + b'\0'*512)
    assert_refused(Source(str(path), 512, len(content), 'shard.tar/c.mp4'), backend)
    assert_refused(Source(str(tmp_path/'data'/'c.mp4'), content=content), backend)
    with pytest.raises(BlockingIOError): silent_server.accept() # nobody came

def test_image_patterns_are_names(tmp_path, monkeypatch):
    "`%d` in the name of an image does not make FFmpeg read the images that lie beside it"
    monkeypatch.chdir(tmp_path)
    for n in range(3): Image.fromarray(picture(n)).save(f'frame{n}.jpg')
    Path('frame%d.jpg').write_bytes(Path('frame1.jpg').read_bytes())
    for name in ('frame%d.jpg', 'frame*.jpg', 'frame%d.mp4'): assert_refused(name)


# ---- stretches and bytes

@each_backend
def test_stretches_that_are_not_there(tmp_path, clip, backend):
    path = tmp_path/'shard.tar'
    path.write_bytes(clip)
    with open(tmp_path/'sparse.tar', 'wb') as sparse: sparse.truncate(2**41)
    for source, kind in [
            (Source(str(path), 0, 2**42), VideoError), (Source(str(path), len(clip) - 10, 100), VideoError),
            (Source(str(path), 2**50, 10), VideoError), (Source(str(path), 0, len(clip)//2), VideoError),
            (Source(str(path), 0, 0), EmptyVideo), (Source('x', content=b''), EmptyVideo),
            (Source(str(tmp_path/'no.tar'), 5, 10), MissingVideo),
            (Source(str(tmp_path/'sparse.tar'), 512, 2**40), VideoError),
            (Source(str(tmp_path/'sparse.tar')), VideoError)]:
        assert_refused(source, backend, kind)

def jpegs(folder, count=6):
    "A file of JPEG images one after the other, and where each lies"
    content, places = b'\0'*100, []
    for n in range(count):
        buffer = io.BytesIO()
        Image.fromarray(picture(n)).save(buffer, 'JPEG', quality=95)
        places.append((len(content), buffer.tell()))
        content += buffer.getvalue()
    path = folder/'frames.tar'
    path.write_bytes(content)
    return str(path), places

def test_frames_that_lie_as_images(tmp_path):
    path, places = jpegs(tmp_path)
    source = Source(path, name='frames.tar/clip', frames=tuple(places))
    for indices in ([0, 5], [5, 1, 1], [3]): assert numbers(source, indices) == indices
    with video.VideoReader(source) as reader: assert (reader.length, reader.how) == (6, 'jpeg frames')
    with pytest.raises(IndexError): read_frames(source, [6])

def test_images_that_are_broken(tmp_path):
    path, places = jpegs(tmp_path)
    offset, size = places[1]
    for bad in [(offset, size//3), (offset + 5, size), (2**40, 100), (offset, 2**40), (offset, 0)]:
        with pytest.raises(VideoError): read_frames(Source(path, name='shard/clip', frames=(places[0], bad)), [0, 1])
    source, small = Source(path, name='shard/clip', frames=tuple(places)), Limits(image_pixels=1000, frame_pixels=1000)
    with pytest.raises(VideoError, match='shard/clip'): read_frames(source, [0], limits=small)


# ---- limits

@contextmanager
def little_memory(megabytes=300):
    "The process's peak grows by less"
    Path('/proc/self/clear_refs').write_text('5') # the peak falls to what is in use now
    before = peak()
    yield
    assert (peak() - before)/1024 < megabytes

def peak():
    "KiB"
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])

@each_backend
def test_pictures_over_the_limit(tmp_path, clip, backend):
    path = tmp_path/'clip.mp4'
    path.write_bytes(clip)
    assert_refused(path, backend, limits=Limits(frame_pixels=96*64 - 1))
    assert_refused(Source(str(path), 0, len(clip)), backend, limits=Limits(frame_pixels=96*64 - 1))
    assert_refused(Source('c.mp4', content=clip), backend, limits=Limits(frame_pixels=96*64 - 1))

def test_pictures_at_the_limit(tmp_path, clip):
    path = tmp_path/'clip.mp4'
    path.write_bytes(clip)
    for backend in ('auto', 'pyav'):
        assert numbers(path, backend=backend, limits=Limits(frame_pixels=96*64)) == INDICES

def sized(height, width): return height.to_bytes(2, 'big') + width.to_bytes(2, 'big')

HUGE = dict( # the codec's own header claims another size than the container's
    mjpeg=('mjpeg.avi', b'\xff\xc0\x00\x11\x08' + sized(64, 96), b'\xff\xc0\x00\x11\x08' + sized(60000, 60000)),
    png=('png_alpha.mov', (96).to_bytes(4, 'big') + (64).to_bytes(4, 'big'), (30000).to_bytes(4, 'big')*2),
    gif=('gif.gif', b'GIF89a\x60\0\x40\0', b'GIF89a\x60\xea\x60\xea'),
    apng=('apng.apng', (96).to_bytes(4, 'big') + (64).to_bytes(4, 'big'), (30000).to_bytes(4, 'big')*2))

@each_backend
@pytest.mark.parametrize('kind', HUGE)
def test_headers_that_claim_gigabytes(media, tmp_path, kind, backend):
    file, old, new = HUGE[kind]
    content = (media[0]/file).read_bytes()
    assert old in content
    path = tmp_path/file
    path.write_bytes(content.replace(old, new))
    with little_memory(): assert_refused(path, backend)

def test_pictures_that_are_huge(media, tmp_path):
    "8192 x 8200 pixels: more than 8K"
    path = tmp_path/'big.avi'
    gray = '-f lavfi -i color=c=gray:s=8192x8200:r=1 -frames:v 1'
    run(*gray.split(), '-c:v', 'mjpeg', '-pix_fmt', 'yuvj420p', path)
    with little_memory(): assert_refused(path)


# ---- rubbish around, and holes

def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive: archive.writestr('a.txt', 'hello'*100)
    return buffer.getvalue()

BEHIND = dict(zip=zipped(), page=b'<html><body>502 Bad Gateway</body></html>\n', zeros=bytes(100_000),
              noise=np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes())
BEFORE = dict(mark=b'\xef\xbb\xbf', line=b'\r\n', answer=b'HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\n\r\n',
              tag=b'ID3\x03\0\0\0\0\0\x0aTALB\0\0\0\0\0\0')
FILES = ['h264.mp4', 'h264_front.mp4', 'h264_fragmented.mp4', 'h264_open.mkv', 'mpeg4_b.avi', 'h264_open.ts',
         'mpeg2.mpg', 'vp9.webm', 'h264.flv', 'wmv1.asf', 'gif.gif', 'prores.mov']

@pytest.mark.parametrize('kind', BEHIND)
@pytest.mark.parametrize('file', FILES)
def test_rubbish_behind(media, tmp_path, file, kind):
    path = tmp_path/file
    path.write_bytes((media[0]/file).read_bytes() + BEHIND[kind])
    assert probe(path).length == COUNT
    assert numbers(path, [0, 57, 99]) == [0, 57, 99]

@pytest.mark.parametrize('kind', BEFORE)
@pytest.mark.parametrize('file', FILES)
def test_rubbish_in_front(media, tmp_path, file, kind):
    path = tmp_path/file
    path.write_bytes(BEFORE[kind] + (media[0]/file).read_bytes())
    try: info = probe(path)
    except VideoError: return
    assert info.length == COUNT
    assert numbers(path, [0, 57, 99]) == [0, 57, 99]

@pytest.mark.parametrize('file', FILES[1:4] + ['mpeg4_b.avi', 'mjpeg.avi', 'vp9.webm', 'wmv1.asf'])
def test_space_that_was_reserved_and_never_filled(media, tmp_path, file):
    "A download's second half is zeros: no shorter video without a word, no frame that is not there"
    content, path = (media[0]/file).read_bytes(), tmp_path/file
    path.write_bytes(content[:len(content)//2] + bytes(len(content) - len(content)//2))
    assert isinstance(outcome(lambda: read_frames(path, [0, 90])), (VideoError, IndexError))
    try: assert probe(path).length == COUNT
    except VideoError: pass

def test_a_hole_that_swallows_fragments(media, tmp_path):
    content, path = (media[0]/'h264_fragmented.mp4').read_bytes(), tmp_path/'hole.mp4'
    path.write_bytes(content[:len(content)//3] + bytes(2048) + content[len(content)//3 + 2048:])
    assert_refused(path, kind=TruncatedVideo)


# ---- in a data set

def test_odd_files_in_a_data_set(media, tmp_path):
    "What can be read is; the others are replaced and named, and none ends the run"
    whole, broken = (media[0]/'h264.mp4').read_bytes(), {}
    for file in ('h264.avi', 'mpeg4_b.avi', 'h264_33.ts', 'vp9.webm', 'gif.gif', 'h264_two_edits.mp4'):
        (tmp_path/file).write_bytes((media[0]/file).read_bytes())
    broken['sizes.mkv'] = (media[0]/'h264_sizes.mkv').read_bytes()
    broken['list.mp4'] = b"ffconcat version 1.0\nfile 'gif.gif'\n"
    broken['empty.mp4'], broken['zeros.mp4'] = b'', bytes(10_000)
    broken['edits.mp4'] = with_edit_list(whole, EDITS['only_empty'])
    broken['no_moov.mp4'] = box_named(whole, [b'moov'], b'junk')
    for name, content in broken.items(): (tmp_path/name).write_bytes(content)
    (tmp_path/'loop.mp4').symlink_to('loop.mp4')
    os.mkfifo(tmp_path/'fifo.mp4')
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path/'list.csv').write_text('path,label\n' + ''.join(f'{name},0\n' for name in names))
    manifest = read_manifest(tmp_path/'list.csv', root=tmp_path)
    clips = MediaDataset(manifest, 4, transform=pretrain_transform(32), tries=len(names))
    listed = {path for i in range(len(names)) for _, path, _ in clips[0, i]['failures']}
    assert listed == {*broken, 'loop.mp4', 'fifo.mp4'}


# ---- cut off

@pytest.mark.parametrize('file', ['h264.mp4', 'h264_front.mp4', 'h264_fragmented.mp4', 'h264.mkv', 'mpeg4_b.avi',
                                  'vp9.webm', 'h264.flv'])
def test_downloads_that_broke_off(media, tmp_path, file):
    "The whole file's frames, or a typed error: never a shorter video without a word"
    content = (media[0]/file).read_bytes()
    path = tmp_path/file
    for share in (.2, .5, .8):
        path.write_bytes(content[:int(len(content)*share)])
        try: length = probe(path).length
        except VideoError: continue
        assert length == COUNT
