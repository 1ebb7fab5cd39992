"""Odd files, grouped by kind: names, file system, sizes, playlists, limits. They show the right frames, or cost one
clip (a `VideoError`); nothing else is opened, nothing hangs, no memory is taken for what a header claims."""
import errno, io, os, re, socket, threading
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from media_matrix import COUNT, inputs, picture, read_numbers, run
from PIL import Image

from umt.data import video
from umt.data.containers import EmptyVideo, Limits, MissingVideo, Source, VideoError
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
