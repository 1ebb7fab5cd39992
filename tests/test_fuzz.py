"""Damaged and hostile files, a fixed number from a fixed seed: readers raise their typed errors and nothing else.

Every case is `Random(f'{SEED} {what} {i}')`, so a failure's case number is enough to see it again."""
import io
import json
import os
import random
import re
import shutil
import sqlite3
import struct
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from PIL import Image

from umt.core.files import read_json
from umt.data.annotations import read_annotations, read_classes
from umt.data.captions import read_caption_shards, read_captions
from umt.data.containers import VideoError
from umt.data.galleries import read_gallery
from umt.data.images import ImageError, read_image
from umt.data.shards import read_shards
from umt.data.tables import read_manifest
from umt.data.watching import Watcher
from umt.models.weights import WeightsError, read_state_dict, read_visual

SEED = 9
pytestmark = pytest.mark.timeout(300)

# ---- mutations

NUMBERS = ['-1', '0', '99999999999999999999', '1e999', 'NaN', '-Infinity', '9'*5000, '0x10', '1_0', '٣', '²', '1.5',
           '', 'null']
ODD = ['"', "'", ',', ';', '\t', '\r', '\n', '\r\n', '\0', '\x1a', '\x85', '\u2028', '\ufeff', '\ufffd', 'é', 'e\u0301',
       '\u202e', '😀', '\\', '\\ud800', '\\u0000', '{', '}', '[', ']', ':', '#', '$', '%', '../', '/', 'C:\\', '""',
       '"'*99]
ENCODINGS = ['utf-8-sig', 'utf-16', 'utf-16-le', 'utf-32', 'latin-1', 'cp1252', 'cp037', 'utf-7']


def mutate_text(text: str, chance: random.Random) -> bytes:
    "A text with a few odd places, in any encoding"
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(text) + 1)
        numbers, lines = list(re.finditer(r'\d+', text)), text.splitlines(keepends=True)
        what = chance.randrange(9)
        if what == 0 and numbers:
            found = chance.choice(numbers)
            text = text[:found.start()] + chance.choice(NUMBERS) + text[found.end():]
        elif what == 1: text = text[:at]
        elif what == 2: text = text[:at] + text[at + chance.randrange(1, 9):]
        elif what == 3 and lines: text = ''.join(chance.choices(lines, k=len(lines) + 1))
        elif what == 4: text = text[:at] + chance.choice(['[', '{"a":', '"'])*chance.choice([3, 50_000]) + text[at:]
        elif what == 5: text = text.replace(chance.choice(',\t" :'), chance.choice(ODD))
        elif what == 6: text = text[:at] + text[at:at + 40]*chance.choice([2, 1000]) + text[at:]
        else: text = text[:at] + chance.choice(ODD) + text[at:]
    encoding = chance.choice(ENCODINGS) if chance.random() < .15 else 'utf-8'
    content = text.encode(encoding, errors='replace')
    return mutate(content, chance, 1) if chance.random() < .15 else content


EXTREMES = [struct.pack(form, value) for form, values in (
    ('>I', (0, 1, 2**31 - 1, 2**31, 2**32 - 1)), ('<I', (1, 2**31 - 1, 2**32 - 2)),
    ('>Q', (2**63 - 1, 2**64 - 1, 2**40)), ('<Q', (2**62, 2**40)),
    ('>H', (0, 1, 2**15, 2**16 - 1)), ('<H', (1, 2**15))) for value in values]


def mutate(content: bytes, chance: random.Random, most: int = 6, others: tuple[bytes, ...] = (b'x'*64, )) -> bytes:
    "Bytes with flips, cuts, repetitions, splices and numbers that are extreme"
    content = bytearray(content)
    for _ in range(chance.randint(1, most)):
        at, size = chance.randrange(len(content) + 1), chance.choice([1, 2, 4, 16, 100, 1000])
        what = chance.randrange(8)
        if what == 0: del content[at:]
        elif what == 1: del content[at:at + size]
        elif what == 2: content[at:at] = content[at:at + size]
        elif what == 3:
            other = chance.choice(others)
            there = chance.randrange(len(other))
            content[at:at + size] = other[there:there + size]
        elif what == 4: content[at:at + size] = chance.randbytes(size)
        elif what < 7:
            value = chance.choice(EXTREMES)
            content[at:at + len(value)] = value
        elif content: content[min(at, len(content) - 1)] ^= 1 << chance.randrange(8)
    return bytes(content)


# ---- what may be raised

def is_typed(error: Exception, name: str) -> bool:
    "An error of ours, or a plain ValueError that names the file"
    if not str(error) or len(str(error)) > 20_000: return False # a list of 50 rows at most
    if type(error).__module__.startswith('umt.'): return True
    return type(error) in (ValueError, FileNotFoundError) and name in str(error)


def escapes(what, cases, read, name):
    "Reads mutated files; what was raised beside typed errors"
    found, right, typed = [], 0, 0
    for i, case in enumerate(cases):
        try:
            read(case)
            right += 1
        except Exception as error:
            if is_typed(error, name): typed += 1
            else: found.append(f'{what} {i}: {type(error).__name__}: {str(error)[:150]}')
    assert found == [], f'{len(found)} of {right + typed + len(found)}\n' + '\n'.join(found[:20])
    return right, typed


# ---- tables

ROWS = [('a.mp4', 0, 'a dog runs'), ('b c.mp4', 1, 'a "red" cat, asleep'), ('dir/ü.mp4', 2, "it's 12:30")]
TEXTS = {
    'list.txt': 'a.mp4 0\nb c.mp4 1\ndir/ü.mp4 2\n',
    'list.csv': 'path,label,video,caption\na.mp4,0,a.mp4,a dog runs\n'
                '"b c.mp4",1,b.mp4,"a ""red"" cat, asleep"\ndir/ü.mp4,2,c.mp4,it\'s 12:30\n',
    'list.tsv': 'path\tlabel\tvideo\tcaption\na.mp4\t0\ta.mp4\ta dog runs\nb c.mp4\t1\tb.mp4\ta cat\n',
    'list.json': json.dumps([dict(path=p, label=n, video=p, caption=c) for p, n, c in ROWS]),
    'list.jsonl': ''.join(json.dumps(dict(path=p, label=n, video=p, caption=c)) + '\n' for p, n, c in ROWS)}
FORMATS = {
    'kinetics': 'label,youtube_id,time_start,time_end,split\nabseiling,0347ZoDXyP0,95,105,train\n'
                '"air drumming",xyz,3,13,train\n',
    'ssv2': json.dumps([dict(id=str(i), label='putting a cup', template='Putting [something]', placeholders=['a cup'])
                        for i in range(3)]),
    'mit': 'a/b_1.mp4,walking,3,0\nc/d_2.mp4,running,2,1\n',
    'list': 'a.mp4 0\nb.mp4 1\n'}
GALLERIES = {
    'json': json.dumps([dict(video=p, caption=[c, c + ' again']) for p, _, c in ROWS]),
    'msrvtt': 'key,vid_key,video_id,sentence\nret0,msr1,video7010,a man walks\nret1,msr2,video7011,"a cat, asleep"\n',
    'didemo': json.dumps([dict(video='a.mp4', description='a dog', times=[[0, 1]])]*2),
    'activitynet': json.dumps({'v_1': dict(duration=9.5, timestamps=[[0, 4], [4, 9]], sentences=['x', 'y'])}),
    'lsmdc': '1_a\t00.10.1\t00.10.5\t0\t0\tSOMEONE walks.\n1_b\t00.11.1\t00.11.5\t0\t0\tSOMEONE runs.\n',
    'msvd': 'vid1 a man walks\nvid1 a man runs\nvid2 a cat\n',
    'ssv2_label': FORMATS['ssv2']}
DEEP = {
    'depth.json': '['*100_000, 'depth.jsonl': '{"path":'*100_000 + '\n',
    'digits.json': '[{"path": "a", "label": ' + '1'*5000 + '}]', 'digits.csv': 'path,label\na.mp4,' + '1'*5000 + '\n',
    'digits.txt': 'a.mp4 ' + '9'*5000 + '\n', 'scalars.json': '[1, "a", null, [2]]',
    'scalars.jsonl': '1\n"a"\nnull\n[]\n',
    'string.json': '"text"', 'null.json': 'null', 'nan.json': '[{"path": "a", "label": NaN}]',
    'surrogate.json': '[{"path": "\\ud800.mp4", "label": 0}]', 'nul.json': '[{"path": "a\\u0000b", "label": 0}]',
    'nul.csv': 'path,label\na\0b,0\n', 'empty.csv': '', 'blank.txt': '\n\n\n',
    'long.csv': 'path,label\n' + 'a'*3_000_000 + ',0\n', 'wide.csv': ','*20_000 + '\n' + ','*20_000 + '\n',
    'quotes.csv': 'path,label\n' + '"'*100_001 + ',0\n', 'objects.json': '{"a": {"b": {"c": 1}}}',
    'text.parquet': 'PAR1 no table PAR1', 'text.sqlite': 'SQLite format 3\0 no table', 'empty.parquet': '',
    'empty.sqlite': ''}

READERS = {
    'manifest': lambda file: read_manifest(file),
    'manifest without labels': lambda file: read_manifest(file, label=None),
    'captions': lambda file: read_captions(file, medium='video'),
    'classes': lambda file: read_classes(file)}


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('name', TEXTS)
def test_text_tables(tmp_path, name, reader):
    what = f'{reader} {name}'
    chances = [random.Random(f'{SEED} {what} {i}') for i in range(100)]
    cases = (write(tmp_path/name, mutate_text(TEXTS[name], chance)) for chance in chances)
    right, typed = escapes(what, cases, READERS[reader], name)
    assert typed > 5, 'they are damaged'


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('name', DEEP)
def test_hostile_tables(tmp_path, name, reader):
    escapes(f'{reader} {name}', [write(tmp_path/name, DEEP[name].encode())], READERS[reader], name)


def binary_tables(folder):
    table = pa.table(dict(zip(('path', 'label', 'caption'), map(list, zip(*ROWS)))))
    pa.parquet.write_table(table.append_column('video', table['path']), folder/'list.parquet', compression='none')
    with sqlite3.connect(folder/'list.sqlite') as base:
        base.execute('create table clips (path text, label integer, video text, caption text)')
        base.executemany('insert into clips values (?, ?, ?, ?)', [(p, n, p, c) for p, n, c in ROWS])
    base.close()
    return {name: (folder/name).read_bytes() for name in ('list.parquet', 'list.sqlite')}


@pytest.mark.parametrize('reader', ['manifest', 'captions'])
@pytest.mark.parametrize('name', ['list.parquet', 'list.sqlite'])
def test_binary_tables(tmp_path, name, reader):
    content, what = binary_tables(tmp_path)[name], f'{reader} {name}'
    chances = [random.Random(f'{SEED} {what} {i}') for i in range(200)]
    cases = (write(tmp_path/name, mutate(content, chance)) for chance in chances)
    escapes(what, cases, READERS[reader], name)


@pytest.mark.parametrize('kind', FORMATS)
def test_annotations(tmp_path, kind):
    name = 'file.json' if FORMATS[kind].startswith('[') else 'file.csv'
    chances = [random.Random(f'{SEED} {kind} {i}') for i in range(100)]
    cases = (write(tmp_path/name, mutate_text(FORMATS[kind], chance)) for chance in chances)
    classes = dict(ssv2=['Putting something'], mit=['walking', 'running']).get(kind)
    escapes(kind, cases, lambda file: read_annotations(kind, file, tmp_path, classes), name)


@pytest.mark.parametrize('kind', GALLERIES)
def test_galleries(tmp_path, kind):
    name = 'file.json' if GALLERIES[kind].startswith(('[', '{')) else 'file.csv'
    chances = [random.Random(f'{SEED} {kind} {i}') for i in range(100)]
    cases = (write(tmp_path/name, mutate_text(GALLERIES[kind], chance)) for chance in chances)
    escapes(kind, cases, lambda file: read_gallery(kind, file, tmp_path), name)


def test_json_of_runs(tmp_path):
    content = json.dumps(dict(module='umt.tasks.stage1', identity=dict(lr=.1, epochs=3), inputs={'a': 'b'}))
    chances = [random.Random(f'{SEED} json {i}') for i in range(200)]
    cases = [write(tmp_path/f'{i}.json', mutate_text(content, chance)) for i, chance in enumerate(chances)]
    cases += [write(tmp_path/name, text.encode()) for name, text in DEEP.items() if name.endswith('.json')]
    (tmp_path/'loop.json').symlink_to('loop.json')
    os.mkfifo(tmp_path/'pipe.json')
    cases += [tmp_path/'loop.json', tmp_path/'pipe.json', tmp_path, Path('/dev/zero'), tmp_path/('x'*300)]
    for case in cases: escapes(case.name, [case], read_json, case.name)


# ---- shards

def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


FIELDS = [(0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (329, 8), (345, 155)]
VALUES = [b'\0', b'7'*12, b'\x80' + b'\xff'*11, b'\xff'*12, b'\x80\0\0\0\0\0\0\1\0\0\0\0', b'../../x.mp4',
          b'/etc/x.mp4', b' '*12, b'-1', b'1', b'2', b'5', b'6', b'L', b'K', b'S', b'x', b'g',
          b'\xfc.mp4', b'a'*155, b'0.mp4']


def mutate_tar(content: bytes, chance: random.Random) -> bytes:
    "Headers with other values and a checksum that is right, so that they are believed"
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = 512*chance.randrange(len(content)//512)
        start, size = chance.choice(FIELDS)
        content[at + start:at + start + size] = chance.choice(VALUES)[:size].ljust(size, b'\0')
        content[at + 148:at + 156] = b' '*8
        content[at + 148:at + 156] = b'%06o\0 ' % sum(content[at:at + 512])
    return mutate(bytes(content), chance, 2) if chance.random() < .3 else bytes(content)


CLIP = {'mp4': b'video', 'json': b'{"label": 1, "sample_id": 7, "duration": 3.5}', 'cls': b'1'}
PAIR = {'jpg': b'image', 'txt': 'ein hübscher Hund'.encode(), 'json': b'{"caption": "a dog", "key": "000"}'}
SHARDS = {'clips': (read_shards, CLIP), 'captions': (partial(read_caption_shards, medium='image'), PAIR)}


@pytest.mark.parametrize('kind', SHARDS)
def test_shards(tmp_path, kind):
    read, sample = SHARDS[kind]
    members = {f'{i}.{end}': content for i in range(3) for end, content in sample.items()}
    def cases():
        for i in range(200):
            chance = random.Random(f'{SEED} {kind} {i}')
            inner = dict(members)
            if chance.random() < .4:
                name = chance.choice([name for name in inner if name[-3:] != 'mp4' and name[-3:] != 'jpg'])
                inner[name] = mutate_text(inner[name].decode(), chance)
            folder = tmp_path/f'{i}'
            folder.mkdir()
            change = mutate_tar if chance.random() < .7 else mutate
            write(folder/'0.tar', change(tar_of(inner), chance))
            yield folder
            shutil.rmtree(folder)
    escapes(kind, cases(), read, '.tar')


# ---- weights

def weights_files():
    state = {'conv1.weight': torch.randn(4, 3, 2, 2), 'class_embedding': torch.randn(4), 'proj': torch.randn(4).half()}
    files = {'a.safetensors': safetensors.torch.save(state)}
    for name, zipped in (('a.pth', True), ('old.pth', False)):
        buffer = io.BytesIO()
        torch.save(dict(model=state, epoch=3, sizes=dict(width=4)), buffer, _use_new_zipfile_serialization=zipped)
        files[name] = buffer.getvalue()
    return files


def mutate_archive(content: bytes, chance: random.Random) -> bytes:
    "A PyTorch file whose pickle is damaged, in an archive that is not"
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, 'w') as new:
        for name in old.namelist():
            inner = old.read(name)
            if name.endswith('data.pkl'): inner = mutate(inner, chance, 3)
            new.writestr(name, inner)
    return buffer.getvalue()


@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth', 'old.pth', 'inner.pth'])
def test_weights(tmp_path, name):
    files = weights_files()
    content = files.get(name, files['a.pth'])
    for read in (read_state_dict, read_visual):
        chances = [random.Random(f'{SEED} {name} {i}') for i in range(100)]
        change = mutate_archive if name == 'inner.pth' else mutate
        cases = (write(tmp_path/name, change(content, chance)) for chance in chances)
        escapes(f'{read.__name__} {name}', cases, read, name)


def hostile_weights():
    "What a pickle of tensors alone can say"
    loop = {}
    loop['model'] = loop
    tensor, small = torch.randn(2), torch.zeros(1)
    return {
        'loop': loop, 'numbers as names': {0: tensor, 1: tensor}, 'mixed': {'model': {'a': tensor, 3: tensor}},
        'a tensor of 2**60 from 4 bytes': {'model': {'a': small.as_strided((2**20, 2**40), (0, 0))}},
        'overlapping': {'model': {'a': small.expand(2**33)}}, 'sparse': {'a': torch.eye(3).to_sparse()},
        'meta': {'a': torch.empty(2**40, device='meta')}, 'list': [tensor], 'tensor': tensor, 'none': None,
        'nothing': {},
        'nested': {'model': {'module': {'state_dict': {}}}}, 'no name': {'': tensor}, 'prefix': {'module.': tensor},
        'twice': {'a': tensor, '_orig_mod.a': tensor}, 'complex': {'conv1.weight': torch.randn(2, 3, 2, 2).cfloat()},
        'scalar': {'conv1.weight': torch.tensor(1.), 'class_embedding': tensor}}


@pytest.mark.parametrize('what', hostile_weights())
@pytest.mark.parametrize('read', [read_state_dict, read_visual])
def test_hostile_weights(tmp_path, read, what):
    torch.save(hostile_weights()[what], tmp_path/'a.pth')
    escapes(what, [tmp_path/'a.pth'], read, 'a.pth')


@pytest.mark.parametrize('read', [read_state_dict, read_visual])
def test_what_is_no_weights_file(tmp_path, read):
    os.mkfifo(tmp_path/'pipe.pth')
    (tmp_path/'loop.pth').symlink_to('loop.pth')
    with zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a/data.pkl', b'\x80\x02}.')
        archive.writestr('a/data/0', bytes(2**24))
    (tmp_path/'head.pth').write_bytes(struct.pack('<Q', 2**29) + b'{')
    (tmp_path/'depth.safetensors').write_bytes(struct.pack('<Q', 100_001) + b'{"a":' + b'['*99_996)
    for name in ('pipe.pth', 'loop.pth', 'bomb.pth', 'head.pth', 'depth.safetensors', 'x'*300, 'none.pth', '.'):
        with pytest.raises((WeightsError, FileNotFoundError), match=str(tmp_path/name)): read(tmp_path/name)


# ---- images and videos

def images():
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8))
    def saved(kind, **options):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()
    kinds = {kind: saved(kind) for kind in ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF')}
    return kinds | {'progressive': saved('JPEG', progressive=True), 'LZW': saved('TIFF', compression='tiff_lzw')}


@pytest.mark.parametrize('kind', images())
def test_images(kind):
    contents = images()
    found = []
    for i in range(100):
        content = mutate(contents[kind], random.Random(f'{SEED} {kind} {i}'), 6, tuple(contents.values()))
        try: image = read_image(content, 'a.jpg')
        except ImageError as e: assert str(e).startswith('a.jpg: ')
        else: found.append(image.shape)
    assert all(shape[:2] == (1, 3) for shape in found)


MEDIA = {'mp4': ('libx264', 'yuv420p'), 'mkv': ('libx265', 'yuv420p'), 'avi': ('mpeg4', 'yuv420p'),
         'gif': ('gif', 'rgb8'), 'ts': ('mpeg2video', 'yuv420p'), 'webm': ('libvpx', 'yuv420p'),
         'mov': ('prores_ks', 'yuv422p10le')}


@pytest.fixture(scope='module')
def media(tmp_path_factory):
    "Videos of a few kB"
    folder, made = tmp_path_factory.mktemp('media'), {}
    for end, (codec, form) in MEDIA.items():
        with av.open(str(folder/f'a.{end}'), 'w') as out:
            options = {'x265-params': 'log-level=none'} if codec == 'libx265' else {}
            stream = out.add_stream(codec, rate=12, options=options)
            stream.height, stream.width, stream.pix_fmt = 48, 64, form
            for i in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20*i, np.uint8), format='rgb24')
                out.mux(stream.encode(frame.reformat(format=form)))
            out.mux(stream.encode())
        made[end] = (folder/f'a.{end}').read_bytes()
    return made


@pytest.mark.parametrize('end', MEDIA)
def test_videos(tmp_path, media, end):
    "A decoder may end as it likes, in its own process; here there are only errors of the clip"
    watcher, found = Watcher(timeout=20, memory=2**30), []
    for i in range(30):
        content = mutate(media[end], random.Random(f'{SEED} {end} {i}'), 4, tuple(media.values()))
        file = write(tmp_path/f'{i}.{end}', content)
        try: frames, _ = watcher.read_frames(file, lambda length: [0, length//2, length - 1])
        except VideoError as e: assert f'{i}.{end}' in str(e)
        else: found.append(frames.shape[:2])
    watcher.close()
    assert all(shape == (3, 3) for shape in found)


# ---- names in pictures

NAMES = ['$a$', '$x_{', 'a$b', '$\\frac$', '\\$a$', '100%^_&#~{}\\', '\udcff', 'ü😀', 'a\nb', '']


@pytest.mark.filterwarnings('ignore:Glyph')
def test_names_in_pictures():
    "A name that looks like a formula, or is none that UTF-8 can say, is drawn as it is"
    import matplotlib.pyplot as plt
    import pandas as pd

    from umt.data.transforms import show_frames
    from umt.experiments.results import show_table
    from umt.tasks.evaluators import show_confusion
    frames = torch.zeros(len(NAMES), 3, 8, 8, dtype=torch.uint8)
    rows = [name for name in NAMES if name.isprintable() or "\n" in name] # which a table cannot hold
    found = pd.DataFrame(dict(task=NAMES[0], row=rows, mean=.5, half_width=.1, n=2))
    for name in NAMES:
        drawn = [show_frames(frames, NAMES)[0], show_confusion(torch.eye(len(NAMES)), NAMES, name)]
        drawn += [show_table(found, label=name, metric=name, beside={name: found})[0]]
        for ax in drawn: ax.figure.canvas.draw()
        plt.close('all')
