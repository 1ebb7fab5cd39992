"Images of every kind, and files that are none: a picture, or an ImageError that says why."
import io
import os
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from umt.data.containers import Limits, Source
from umt.data.images import IMAGE_FORMATS, ImageError, read_image

SIDE = 48


def picture(height=SIDE, width=SIDE):
    "A smooth colour picture"
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255*x/width, 255*y/height, 255 - 128*x/width], 2).astype(np.uint8))


def saved(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(width, height, depth, colour, rows, *chunks):
    "A PNG by hand: `rows` are the filtered bytes of the picture"
    head = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join([
        chunk(b'IHDR', head), *chunks, chunk(b'IDAT', zlib.compress(rows, 1)), chunk(b'IEND', b'')])


def png16(values, colour):
    "A 16-bit PNG of an array [H, W, channels]"
    height, width, _ = values.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    return png(width, height, 16, colour, rows)


def far(found, expected):
    "The mean difference of two pictures"
    return (found.float() - expected.float()).abs().mean().item()


# ---- every kind is a picture

@pytest.mark.parametrize('kind, options, most', [
    ('PNG', {}, 0), ('BMP', {}, 0), ('TIFF', {}, 0), ('TIFF', dict(compression='tiff_lzw'), 0),
    ('WEBP', dict(lossless=True), 0), ('JPEG', dict(quality=95), 3), ('JPEG', dict(progressive=True, quality=95), 3)])
def test_formats(kind, options, most):
    expected = read_image(saved(picture()))
    assert expected.dtype == torch.uint8 and expected.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(expected[0].permute(1, 2, 0), torch.from_numpy(np.asarray(picture()).copy()))
    assert far(read_image(saved(picture(), kind, **options)), expected) <= most


@pytest.mark.parametrize('colour, channels', [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_png_is_scaled(colour, channels):
    values = np.linspace(0, 65535, 32*32*channels).reshape(32, 32, channels).astype(np.uint16)
    found = read_image(png16(values, colour))[0].permute(1, 2, 0)
    expected = (values >> 8)[:, :, :3] if channels > 2 else np.repeat(values[:, :, :1] >> 8, 3, 2)
    assert far(found, torch.from_numpy(expected.astype(np.uint8))) <= 1
    assert found.unique().numel() > 200


@pytest.mark.parametrize('order', ['<', '>'])
def test_sixteen_bit_tiff_is_scaled(order):
    grey = np.linspace(0, 65535, 32*32).reshape(32, 32).astype(np.uint16)
    head = b'II*\0' if order == '<' else b'MM\0*'
    tags = [(256, 3, 32), (257, 3, 32), (258, 3, 16), (259, 3, 1), (262, 3, 1),
            (273, 4, 200), (278, 3, 32), (279, 4, 2048)]
    entries = b''.join(struct.pack(order + ('HHIHxx' if kind == 3 else 'HHII'), tag, kind, 1, value)
                       for tag, kind, value in tags)
    file = head + struct.pack(order + 'IH', 8, len(tags)) + entries + b'\0'*4
    file = file.ljust(200, b'\0') + grey.astype(order + 'u2').tobytes()
    found = read_image(file)[0, 0]
    assert torch.equal(found, torch.from_numpy((grey >> 8).astype(np.uint8)))


@pytest.mark.parametrize('mode, most', [
    ('L', None), ('1', None), ('P', 8), ('CMYK', 3), ('YCbCr', 3), ('RGBA', 0), ('LA', None)])
def test_modes(mode, most):
    kind = {'CMYK': 'JPEG', 'YCbCr': 'JPEG'}.get(mode, 'PNG')
    image = picture().quantize(256) if mode == 'P' else picture().convert(mode)
    found = read_image(saved(image, kind, **(dict(quality=95) if kind == 'JPEG' else {})))
    if most is None: assert torch.equal(found[0, 0], found[0, 2]), 'grey'
    else: assert far(found, read_image(saved(picture()))) <= most
    assert found.unique().numel() > 1


def test_transparency_is_dropped_as_in_the_reference():
    veiled = picture()
    veiled.putalpha(7)
    assert torch.equal(read_image(saved(veiled)), read_image(saved(picture())))
    palette = picture().quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = read_image(saved(palette, transparency=bytes(range(16))))
    assert torch.equal(found, read_image(saved(palette)))


def test_orientation_is_not_applied_as_in_the_reference():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(saved(picture(40, 60), 'JPEG', exif=exif, quality=95))
    assert torch.equal(turned, read_image(saved(picture(40, 60), 'JPEG', quality=95)))


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_first_picture_of_an_animation(kind):
    rest = [Image.new('RGB', (SIDE, SIDE), colour) for colour in ('red', 'blue')]
    lossless = dict(lossless=True) if kind == 'WEBP' else {}
    first = Image.new('RGB', (SIDE, SIDE), 'lime')
    found = read_image(saved(first, kind, save_all=True, append_images=rest, **lossless))
    assert found[0, :, 5, 5].tolist() == [0, 255, 0]


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'BMP'])
def test_truncated_is_read_as_far_as_it_goes(kind):
    whole = saved(picture(256, 256), kind, **(dict(interlace=0) if kind == 'GIF' else {}))
    found, expected = read_image(whole[:len(whole)*3//4]), read_image(whole)
    assert found.shape == (1, 3, 256, 256)
    begin = slice(-99, None) if kind == 'BMP' else slice(99)
    assert torch.equal(found[:, :, begin], expected[:, :, begin]) and not torch.equal(found, expected)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'BMP'])
def test_an_image_without_a_single_pixel_is_not_black(kind):
    "Cut off before the pixels begin: refused. An image that is black is one"
    black = saved(Image.new('RGB', (SIDE, SIDE)), kind)
    assert not read_image(black).any()
    begin = {'PNG': black.index(b'IDAT') + 8 if kind == 'PNG' else 0, 'TIFF': len(black) - SIDE*SIDE*3, 'BMP': 54}[kind]
    with pytest.raises(ImageError): read_image(black[:begin])


def test_rubbish_around():
    "What follows an image (the film of a phone's live picture, an archive) does not count; in front of it, it is none"
    for kind in ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP'):
        content = saved(picture(), kind)
        expected = read_image(content)
        for tail in (bytes(10_000), b'PK\3\4'*100, b'\0\0\0\x18ftypmp42'*10, b'<html></html>'):
            assert torch.equal(read_image(content + tail), expected)
        for head in (b'\xef\xbb\xbf', b'\r\n', b'HTTP/1.1 200 OK\r\n\r\n'):
            with pytest.raises(ImageError): read_image(head + content)
    for content in (b'<!DOCTYPE html><html>404</html>', b'version https://git-lfs.github.com/spec/v1\noid', bytes(1000),
                    b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(100), saved(picture()).replace(b'\r\n', b'\n')):
        with pytest.raises(ImageError): read_image(content)


def test_numbers_of_which_none_is_white_are_refused():
    for dtype, kind in ((np.float32, 'floating-point'), (np.int32, '32-bit')):
        with pytest.raises(ImageError, match=f'x: its pixels are {kind} numbers'):
            read_image(saved(Image.fromarray(np.ones((8, 8), dtype)), 'TIFF'), 'x')


# ---- where it lies

def test_sources(tmp_path):
    content = saved(picture())
    (tmp_path/'a.png').write_bytes(content)
    (tmp_path/'shard').write_bytes(b'x'*1000 + content + b'y'*1000)
    expected = read_image(content)
    for source in (tmp_path/'a.png', str(tmp_path/'a.png'), Source(str(tmp_path/'a.png')),
                   Source(str(tmp_path/'shard'), 1000, len(content)), Source('a', content=content)):
        assert torch.equal(read_image(source), expected)


@pytest.mark.parametrize('offset, size', [
    (0, 10**15), (1500, None), (10**9, None), (10**9, 0), (0, 0), (-5, 3), (0, -1)])
def test_stretch_that_is_not_there(tmp_path, offset, size):
    (tmp_path/'shard').write_bytes(b'x'*1500)
    with pytest.raises(ImageError, match='shard/0.png: '):
        read_image(Source(str(tmp_path/'shard'), offset, size, 'shard/0.png'))


def test_claims_of_a_sparse_file_take_no_memory(tmp_path):
    with open(tmp_path/'sparse.jpg', 'wb') as file:
        file.write(saved(picture(), 'JPEG')[:300])
        file.truncate(2**40)
    with pytest.raises(ImageError, match='more than'): read_image(tmp_path/'sparse.jpg')


def test_what_is_no_file_does_not_wait(tmp_path):
    os.mkfifo(tmp_path/'pipe.png')
    (tmp_path/'loop.png').symlink_to('loop.png')
    (tmp_path/'folder.png').mkdir()
    found = {}
    def read(name):
        try: read_image(tmp_path/name if isinstance(name, str) else name)
        except ImageError as e: found[name] = e.reason
    names = ['pipe.png', 'loop.png', 'folder.png', 'none.png', 'x'*300 + '.png', 'nul\0.png', '/dev/zero', '/dev/stdin']
    threads = [threading.Thread(target=read, args=[name], daemon=True) for name in names]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    assert sorted(found) == sorted(names)
    assert found['none.png'] == 'no such file' and found['pipe.png'] == found['/dev/zero'] == 'not a file'


# ---- what it may claim

HUGE = {
    'PNG': png(13_000, 13_000, 8, 2, b''), 'PNG, 2**31': png(2**31 - 1, 2**31 - 1, 8, 2, b''),
    'GIF': struct.pack('<6sHHBBB', b'GIF89a', 65535, 65535, 0, 0, 0)
    + struct.pack('<cHHHHBB', b',', 0, 0, 65535, 65535, 0, 2),
    'BMP': struct.pack('<2sIHHI', b'BM', 54, 0, 0, 54)
    + struct.pack('<IiiHHIIIIII', 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    'JPEG': saved(picture(), 'JPEG').replace(struct.pack('>BHH', 8, SIDE, SIDE), struct.pack('>BHH', 8, 65000, 65000))}


@pytest.mark.parametrize('name', HUGE)
def test_too_many_pixels_are_refused_before_they_take_memory(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match='pixels'): read_image(HUGE[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, 'kB'


def test_limit_is_exact():
    limits = Limits(image_pixels=SIDE**2)
    read_image(saved(picture()), limits=limits)
    with pytest.raises(ImageError, match=rf'{SIDE*(SIDE + 1)} pixels.*at most {SIDE**2}'):
        read_image(saved(picture(SIDE + 1)), limits=limits)
    with warnings.catch_warnings(): # above the limit of Pillow itself, which is a user's to raise here
        warnings.simplefilter('error')
        large = png(100_000, 2_000, 8, 0, bytes(100_001*2_000))
        assert read_image(large, limits=Limits(image_pixels=2**28)).shape == (1, 3, 2_000, 100_000)


@pytest.mark.parametrize('kind, head', [
    (b'zTXt', b'Comment\0\0'), (b'iTXt', b'Comment\0\1\0\0\0'), (b'iCCP', b'icc\0\0')])
def test_bombs_beside_the_picture(kind, head):
    bomb = head + zlib.compress(bytes(2**28), 9)
    rows = (b'\0' + bytes(3*8))*8
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = png(8, 8, 8, 2, rows, *[chunk(kind, bomb)]*3)
    try: assert read_image(content).shape == (1, 3, 8, 8)
    except ImageError: pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, 'kB: the bomb itself is built here'


def test_any_exception_is_an_image_error(monkeypatch):
    for error in (MemoryError(), RecursionError('deep'), struct.error('x'), SystemError('x'), KeyError(3), OSError()):
        def convert(self, mode): raise error
        monkeypatch.setattr(Image.Image, 'convert', convert)
        with pytest.raises(ImageError, match='^a.png: '): read_image(saved(picture()), 'a.png')


def test_rules_of_pillow_are_what_they_were_and_nothing_is_printed():
    "160 damaged pictures, in a process of its own (libtiff prints its errors; nobody can keep it from that)"
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError): read_image(b'no image')
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before
    script = '''
import io, random
import numpy as np
from PIL import Image
from umt.data.images import ImageError, read_image
chance = random.Random(3)
for kind in ('JPEG', 'PNG', 'WEBP', 'GIF'):
    buffer = io.BytesIO()
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))
    picture.save(buffer, kind)
    for _ in range(40):
        content = bytearray(buffer.getvalue())
        for _ in range(8): content[chance.randrange(len(content))] = chance.randrange(256)
        try: read_image(bytes(content))
        except ImageError: pass
'''
    done = subprocess.run([sys.executable, '-W', 'always', '-c', script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, '')
    assert [line for line in done.stderr.splitlines() if 'PIL' in line or 'jpeg' in line.lower()] == []


def test_formats_are_few():
    "Formats that run programs or that are hardly ever images (EPS, PDF, MPEG) are not tried"
    assert set(IMAGE_FORMATS) == {'JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF'}
    for kind in ('PPM', 'ICO', 'PDF', 'EPS', 'TGA'):
        with pytest.raises(ImageError): read_image(saved(picture(), kind))
