"Shards that others wrote, damaged ones, their index, and other stores."
import http.server
import io
import json
import multiprocessing
import os
import re
import tarfile
import threading

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from umt.core.delimited import ManifestError
from umt.core.stores import write_file
from umt.data.annotations import read_annotations
from umt.data.captions import read_captions
from umt.data.containers import UnreadableVideo
from umt.data.shards import index_shards, read_shards, write_shards
from umt.data.tables import DataError, Manifest

INDEX = 'shards.index.parquet'


def pack(path, *members):
    "A shard of (name, content); content may be text, an object for JSON, or a TarInfo's changes."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict) and 'type' in content:
                for key, value in content.items(): setattr(info, key, value)
                tar.addfile(info)
                continue
            data = content if isinstance(content, bytes) else (
                content if isinstance(content, str) else json.dumps(content)).encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labels(folder):
    m = read_shards(folder)
    return [(m.name(i).split('.tar/')[1], int(m.labels[i])) for i in range(len(m))]


def films(folder, names):
    "A manifest of files that hold their own names."
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(name.encode())
    n = len(names)
    return Manifest(str(folder), pa.array(names, pa.large_string()), np.arange(n), np.arange(n) + 7, {})


# ---- Nothing vanishes ----

def test_whatever_is_written_is_read(tmp_path):
    names = ['a b.mp4', 'x,y.mp4', 'ü.mp4', 'UP.MP4', 'v.abc.mp4', 'v.def.MTS', 'a.M4V', 'b.ts', 'c.mpg', 'd.ogv',
             'e.3gp', 'f.flv', 'g.wmv', 'sub/a b.mp4', 'clip.1', 'h.gif', 'i.vob']
    plain = films(tmp_path/'films', names)
    packed = read_shards(write_shards(plain, tmp_path/'shards', max_clips=4))
    assert [packed.read(i).decode() for i in range(len(packed))] == names
    assert packed.labels.tolist() == plain.labels.tolist() and packed.ids.tolist() == plain.ids.tolist()
    again = read_shards(write_shards(packed, tmp_path/'again', max_clips=9))
    assert [again.read(i).decode() for i in range(len(again))] == names, 'shards of shards'


@pytest.mark.parametrize('member', [
    '1.MP4', '1.M4V', '1.ts', '1.mpg', '1.ogv', '1.3gp', '1.flv', '1.wmv', '1.mts', './1.mp4', 'v.1.mp4',
    'a/b.c/1.x.webm', 'ü 1.mp4', '1' * 300 + '.mp4'])
def test_names_of_others(tmp_path, member):
    stem = member.rpartition('.')[0]
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.json', {'label': 3}), (member, b'y'), (f'{stem}.json', {'label': '4'}))
    assert labels(tmp_path) == [('0.mp4', 3), (member.removeprefix('./'), 4)]


def test_dots_in_captioned_names(tmp_path):
    pack(tmp_path/'0.tar', ('0.jpg', b'x'), ('0.txt', 'red'), ('img.1.jpg', b'y'), ('img.1.txt', 'blue'),
         ('2.frame.jpg', b'z'), ('2.txt', 'webdataset key'))
    m = read_captions(tmp_path)
    assert m.columns['caption'].to_pylist() == [['red'], ['blue'], ['webdataset key']]


@pytest.mark.parametrize('members, found', [
    ([('0.mp4', b'x'), ('0.webm', b'y')], '0.mp4 and 0.webm'),
    ([('0.mp4', b'x'), ('0.mp4', b'y')], '0.mp4 is there twice'),
    ([('0.left.mp4', b'x'), ('0.right.mp4', b'y'), ('0.cls', '1')], '0.left.mp4 and 0.right.mp4'),
    ([('0.mp4', b'x'), ('0.json', '{')], '0.json: not JSON'),
    ([('0.mp4', b'x'), ('0.JSON', '{}'), ('0.json', '{}')], '0.json is there in another spelling'),
])
def test_two_of_one_key(tmp_path, members, found):
    pack(tmp_path/'0.tar', *members)
    with pytest.raises(DataError, match=f'0.tar: damaged.*{re.escape(found)}'): read_shards(tmp_path)


def test_partial_members_are_reported(tmp_path, caplog):
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.json', {'label': 3}), ('1.mp4', b'y'), ('2.json', {'label': 5}),
         ('3.txt', 'lost'), ('clip', b'no suffix'), ('._0.mp4', b'of macOS'), ('0.wav', b'sound'),
         ('d', {'type': b'5'}))
    assert labels(tmp_path) == [('0.mp4', 3), ('1.mp4', -1)]
    for name in ('2.json', '3.txt', 'clip', '._0.mp4'): assert f'0.tar/{name}' in caplog.text
    assert '0.wav' not in caplog.text and '1 of 2 clips have no label' in caplog.text and '0.tar/1.mp4' in caplog.text
    caplog.clear()
    read_shards(tmp_path)
    assert '0.tar/2.json' in caplog.text, 'also when the index is read'


def test_links(tmp_path, caplog):
    link = {'type': tarfile.LNKTYPE, 'linkname': '0.mp4'}
    symbolic = {'type': tarfile.SYMTYPE, 'linkname': '0.mp4'}
    pack(tmp_path/'0.tar', ('0.mp4', b'film'), ('1.mp4', link), ('2.mp4', symbolic),
         ('3.mp4', {**link, 'linkname': 'none.mp4'}), ('4.mp4', {'type': tarfile.FIFOTYPE}))
    m = read_shards(tmp_path)
    assert [(m.name(i), m.read(i)) for i in range(len(m))] == [('0.tar/0.mp4', b'film'), ('0.tar/1.mp4', b'film')]
    for text in ('2.mp4 (a symbolic link to 0.mp4)', '3.mp4 (a hard link to none.mp4', '4.mp4 (no file)'):
        assert text in caplog.text


def test_names_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path/'0.tar', 'w', encoding='latin-1', format=tarfile.GNU_FORMAT) as tar:
        for name in ('é.mp4', 'é.cls'):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b'3'))
    assert labels(tmp_path) == [('\\xe9.mp4', 3)]


# ---- Labels, ids, other fields ----

@pytest.mark.parametrize('label', ['abseiling', 3.7, True, [3], '3.0', 10**30, {}])
@pytest.mark.parametrize('kind', ['label', 'sample_id'])
def test_labels_and_ids_that_are_no_integers(tmp_path, label, kind):
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.json', {kind: label, 'caption': 'a dog'}))
    with pytest.raises(DataError, match=rf'(?s)0.tar: damaged {kind} of 0.mp4: .*expected an integer'):
        read_shards(tmp_path)
    if kind == 'label': assert len(read_captions(tmp_path)) == 1, 'who needs no labels is not disturbed'


def test_cls_members(tmp_path):
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.cls', ' 3\n'), ('1.mp4', b'x'), ('1.cls', '4'),
         ('1.json', {'label': '4'}))
    assert labels(tmp_path) == [('0.mp4', 3), ('1.mp4', 4)]
    for bad in ('dog', '\xff'.encode('latin-1')):
        pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.cls', bad))
        with pytest.raises(DataError, match='0.tar: damaged label of 0.mp4'): read_shards(tmp_path)
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.cls', '3'), ('0.json', {'label': 4}))
    with pytest.raises(DataError, match='3 in .cls, 4 in .json'): read_shards(tmp_path)


def test_ids_are_all_there_and_differ(tmp_path):
    def two(*about): return pack(tmp_path/'0.tar', *[(f'{i}.{k}', v) for i, a in enumerate(about)
                                                     for k, v in (('mp4', b'x'), ('json', a))])
    two({'sample_id': 3}, {})
    with pytest.raises(DataError, match='some have none: 0.tar/0.mp4, 0.tar/1.mp4'): read_shards(tmp_path)
    two({'sample_id': 3}, {'sample_id': '3'})
    with pytest.raises(DataError, match='0.tar/0.mp4 and 0.tar/1.mp4 have one sample_id, 3'): read_shards(tmp_path)
    two({'sample_id': 3, 'path': 'a.mp4'}, {'sample_id': 3, 'path': 'a.mp4'})
    assert read_shards(tmp_path).ids.tolist() == [3, 3], 'one file in two rows'


def test_fields_of_mixed_types(tmp_path, caplog):
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.json', {'duration': 3, 'w': 1, 'o': {'a': 1}, 'offset': 'mine'}),
         ('1.mp4', b'x'), ('1.json', {'duration': 'n/a', 'w': None, 'half': '\ud800', 'o': {'b': []}}))
    pack(tmp_path/'1.tar', ('2.mp4', b'x'), ('2.json', {'duration': 4, 'w': 2.5, 'big': 2**70, 'label': None}))
    pack(tmp_path/'2.tar', ('3.mp4', b'x'), ('3.json', {'duration': 4, 'w': None, 'z': 'x'}))
    columns = {k: v.to_pylist() for k, v in read_shards(tmp_path).columns.items()}
    assert columns['duration'] == ['3', 'n/a', '4', '4'] and columns['w'] == [1, None, 2.5, None]
    assert columns['o'][:2] == ['{"a": 1}', '{"b": []}'] and columns['big'][2] == str(2**70)
    assert columns['offset'][0] == 'mine'
    assert "'duration': 3 in 0.tar/0.mp4, 'n/a' in 0.tar/1.mp4" in caplog.text
    assert "'o'" not in caplog.text


@pytest.mark.parametrize('content, found', [
    ('[' * 100_000, 'nested too deeply'), ('[1]', 'holds no object'), ('3', 'holds no object'), ('{', 'not JSON'),
    (b'{"a": "\xe9"}', 'not JSON'), ('{"a": ' + '1' * 5000 + '}', 'not JSON'), ('{}' + ' ' * 2**24, 'bytes, at most'),
])
def test_json_that_is_none(tmp_path, content, found):
    pack(tmp_path/'7.tar', ('0.mp4', b'x'), ('0.json', content))
    with pytest.raises(DataError, match=f'7.tar: damaged.*0.json.*{found}'): read_shards(tmp_path)


def test_captions_that_are_no_utf8(tmp_path):
    pack(tmp_path/'0.tar', ('0.jpg', b'x'), ('0.txt', 'café'.encode('latin-1')))
    with pytest.raises(DataError, match='0.tar: damaged caption of 0.jpg'): read_captions(tmp_path)
    pack(tmp_path/'0.tar', ('0.jpg', b'x'), ('0.txt', 'café'.encode('utf-8-sig')))
    assert read_captions(tmp_path).columns['caption'].to_pylist() == [['café']]


# ---- Damaged and hostile tar files ----

def test_members_that_claim_too_much(tmp_path):
    sparse = tarfile.TarInfo('0.mp4')
    sparse.size = 2**42
    (tmp_path/'0.tar').write_bytes(sparse.tobuf() + bytes(10240))
    with pytest.raises(DataError, match='0.mp4 claims 4398046511104 bytes'): read_shards(tmp_path)
    with tarfile.open(tmp_path/'0.tar', 'w', format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo('0.mp4')
        info.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.name': '0.mp4',
                            'GNU.sparse.size': str(2**42), 'GNU.sparse.map': '0,0'}
        tar.addfile(info)
    with pytest.raises(DataError, match='0.mp4 is sparse'): read_shards(tmp_path)
    long = tarfile.TarInfo('././@LongLink')
    long.size, long.type = 2**50, tarfile.GNUTYPE_LONGNAME
    (tmp_path/'0.tar').write_bytes(long.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(DataError, match='0.tar: damaged'): read_shards(tmp_path)


def test_every_cut_is_noticed(tmp_path, caplog):
    members = [(f'{i}.{k}', v) for i in range(3) for k, v in (('mp4', b'x' * 700), ('cls', '1'))]
    data = pack(tmp_path/'0.tar', *members).read_bytes()
    whole = read_shards(tmp_path)
    assert len(whole) == 3
    for cut in range(0, len(data) - 10240, 256):
        (tmp_path/'0.tar').write_bytes(data[:cut])
        caplog.clear()
        try: m = read_shards(tmp_path)
        except DataError: continue
        assert 'its mark is missing' in caplog.text or len(m) == 3, cut


def test_every_damaged_header_is_noticed(tmp_path):
    data = pack(tmp_path/'0.tar', *[(f'{i}.mp4', b'x' * 700) for i in range(3)]).read_bytes()
    for at in range(0, 3 * 1536, 1536):
        for byte in (0, 110, 130, 150, 156):
            hurt = bytearray(data)
            hurt[at + byte] ^= 1
            (tmp_path/'0.tar').write_bytes(hurt)
            with pytest.raises(DataError, match='0.tar: damaged'): read_shards(tmp_path)


def test_folders_that_are_none(tmp_path, caplog):
    with pytest.raises(DataError, match='no clips in 0 shards'): read_shards(tmp_path)
    with pytest.raises(DataError, match='cannot be listed'): read_shards(tmp_path/'none')
    pack(tmp_path/'train/0.tar', ('0.mp4', b'x'))
    with pytest.raises(DataError, match='no shards, but 1 in sub-folders'): read_shards(tmp_path)
    pack(tmp_path/'A.TAR', ('0.mp4', b'film'))
    (tmp_path/'._A.tar').write_bytes(b'of macOS')
    m = read_shards(tmp_path)
    assert m.read(0) == b'film' and '1 shards in sub-folders are not read' in caplog.text
    for name in ('1.tar.gz', '1.tgz', '1.tar.zst'):
        (tmp_path/name).write_bytes(b'x')
        with pytest.raises(DataError, match=f'1 compressed shards, such as {name}'): read_shards(tmp_path)
        (tmp_path/name).unlink()
    with tarfile.open(tmp_path/'1.tar', 'w:gz'): pass
    with pytest.raises(DataError, match='1.tar: damaged.*gzip'): read_shards(tmp_path)


def test_empty_shards_are_fine(tmp_path):
    pack(tmp_path/'0.tar')
    pack(tmp_path/'1.tar', ('0.mp4', b'x'), ('0.json', {'a': 1}))
    assert labels(tmp_path) == [('0.mp4', -1)]


def test_captions_that_are_damaged_or_none(tmp_path, caplog):
    for text in ('dog'.encode('utf-16-le'), 'dog'.encode('utf-16'), 'x\0'):
        pack(tmp_path/'0.tar', ('0.jpg', b'x'), ('0.txt', text))
        with pytest.raises(DataError, match='damaged caption of 0.jpg'): read_captions(tmp_path)
    pack(tmp_path/'0.tar', ('0.jpg', b'x'), ('0.txt', 'nan'), ('1.jpg', b'x'), ('1.json', {'caption': 'None'}),
         ('2.jpg', b'x'), ('2.txt', 'caf\ufffd'), ('3.jpg', b'x'), ('3.txt', 'one'), ('3.json', {'caption': 'two'}))
    assert read_captions(tmp_path).columns['caption'].to_pylist() == [['caf\ufffd'], ['two']]
    for said in ('2 of 4 rows have no caption', '1 captions have lost letters', '3.txt (the .json has another caption'):
        assert said in caplog.text


@pytest.mark.parametrize('text', [
    '{"label": 1, "label": 2}', '{"caption": "a", "caption": "b"}', '{"x": {"a": 1, "a": 2}}'])
def test_names_that_repeat_in_a_json(tmp_path, text):
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.json', text))
    with pytest.raises(DataError, match='0.json: not JSON .several values of'): read_shards(tmp_path)


def test_labels_under_other_names_are_reported(tmp_path, caplog):
    pack(tmp_path/'0.tar', ('0.video.mp4', b'x'), ('0.label.cls', '1'), ('1.mp4', b'x'), ('1.meta.json', {'label': 3}),
         ('2.mp4', b'x'), ('2.mp4.json', {'label': 3}))
    assert [label for _, label in labels(tmp_path)] == [-1] * 3
    for name in ('0.label.cls', '1.meta.json', '2.mp4.json'): assert f'0.tar/{name}' in caplog.text


def test_names_of_classes_beside_shards(tmp_path):
    "As `umt shards` leaves them"
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.cls', '1'), ('1.mp4', b'x'), ('1.cls', '0'), ('2.mp4', b'x'))
    assert read_annotations('list', tmp_path, tmp_path)[1] is None
    (tmp_path/'classes.json').write_text('["run", "sit"]')
    for classes, found, names in ((None, [1, 0, -1], ['run', 'sit']), ('sorted', [1, 0, -1], ['run', 'sit']),
                                  (['jump', 'sit', 'run'], [1, 2, -1], ['jump', 'sit', 'run'])):
        m, said = read_annotations('list', tmp_path, tmp_path, classes)
        assert m.labels.tolist() == found and said == names
    for content, classes in (('["run", "sit"]', ['run', 'jump']), ('["run"]', None), ('["run"', None)):
        (tmp_path/'classes.json').write_text(content)
        with pytest.raises(ManifestError, match='classes.json'): read_annotations('list', tmp_path, tmp_path, classes)


def test_img2dataset_folder(tmp_path):
    about = {'caption': 'a dog', 'url': 'http://x', 'key': '000000000', 'status': 'success', 'width': 256, 'exif': '{}'}
    pack(tmp_path/'00000.tar', ('000000000.jpg', b'x'), ('000000000.txt', 'a dog'), ('000000000.json', about))
    pack(tmp_path/'00001.tar', ('000010000.jpg', b'x'), ('000010000.json', {**about, 'caption': None, 'width': None}))
    pa_table = pa.table({'url': ['http://x'], 'status': ['failed_to_download']})
    parquet.write_table(pa_table, tmp_path/'00000.parquet')
    (tmp_path/'00000_stats.json').write_text('{}')
    m = read_captions(tmp_path)
    assert (m.name(0), m.columns['caption'].to_pylist()) == ('00000.tar/000000000.jpg', [['a dog']])


# ---- JPEG frames ----

def frames(key, n, numbers=None):
    about = {'frame_numbers': list(range(n) if numbers is None else numbers), 'frame_times': [.1 * i for i in range(n)],
             'label': 2}
    return [*((f'{key}.f{i:04d}.jpg', f'{key} {i}'.encode()) for i in range(n)), (f'{key}.json', about)]


def test_clips_of_frames(tmp_path):
    pack(tmp_path/'s/0.tar', *frames('a.b', 3), ('1.mp4', b'film'), ('1.cls', '4'), *frames('c', 1))
    m = read_shards(tmp_path/'s')
    assert labels(tmp_path/'s') == [('a.b.frames', 2), ('1.mp4', 4), ('c.frames', 2)]
    def pictures(m, i):
        source = m.source(i)
        data = open(source.path, 'rb').read() if source.content is None else source.content
        return [data[at:at + size].decode() for at, size in source.frames]
    assert [pictures(m, i) for i in range(3)] == [['a.b 0', 'a.b 1', 'a.b 2'], [], ['c 0']]
    assert pictures(m.subset([2, 0]), 1) == pictures(m, 0)
    assert m.columns['frame_numbers'].to_pylist() == [[0, 1, 2], None, [0]]
    again = read_shards(write_shards(m, tmp_path/'again'))
    assert [pictures(again, i) for i in range(3)] == [pictures(m, i) for i in range(3)]
    write_file('memory://frames', '0.tar', (tmp_path/'s/0.tar').read_bytes())
    assert pictures(read_shards('memory://frames'), 0) == pictures(m, 0)
    for bad in (frames('a', 3)[1:], frames('a', 2, [0, 4, 9]), frames('a', 2, 'x')):
        pack(tmp_path/'s/0.tar', *bad)
        with pytest.raises(DataError, match='a: .* of its .* frames'): read_shards(tmp_path/'s')


# ---- The index ----

def test_index_is_used_and_never_in_the_way(tmp_path, caplog, monkeypatch):
    pack(tmp_path/'0.tar', ('0.mp4', b'x'), ('0.json', {'label': 3, 'a': [1, 2]}))
    first = read_shards(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr('umt.data.shards.shard_members', lambda *_: pytest.fail('reads a shard again'))
        again = read_shards(tmp_path)
    assert again.labels.tolist() == [3] and again.columns['a'].equals(first.columns['a'])
    whole = (tmp_path/INDEX).read_bytes()
    other = pa.table({'x': [1]}).replace_schema_metadata(parquet.read_schema(tmp_path/INDEX).metadata)
    for data in (b'PAR1', b'', whole[:-9], whole[:200] + b'\0' * 40 + whole[240:], other):
        if isinstance(data, bytes): (tmp_path/INDEX).write_bytes(data)
        else: parquet.write_table(data, tmp_path/INDEX)
        assert labels(tmp_path) == [('0.mp4', 3)]
        assert (tmp_path/INDEX).read_bytes() == whole, 'made anew'
    pack(tmp_path/'0.tar', ('0.mp4', b'y'), ('0.json', {'label': 4, 'a': [1, 2]}))
    assert labels(tmp_path) == [('0.mp4', 4)], 'of the same size'
    (tmp_path/INDEX).unlink()
    (tmp_path/INDEX).mkdir()
    (tmp_path/INDEX/'x').write_text('')
    monkeypatch.setattr('umt.data.shards.write_file', lambda *_: (_ for _ in ()).throw(PermissionError('read only')))
    assert labels(tmp_path) == [('0.mp4', 4)] and 'cannot be kept' in caplog.text


def test_index_that_promises_too_much(tmp_path):
    pack(tmp_path/'0.tar', ('0.mp4', b'film'))
    m = read_shards(tmp_path)
    (tmp_path/'0.tar').write_bytes((tmp_path/'0.tar').read_bytes()[:514])
    with pytest.raises(UnreadableVideo, match='0.tar/0.mp4: cut off: 2 of 4 bytes'): m.read(0)


# ---- Other stores ----

class Ranges(http.server.SimpleHTTPRequestHandler):
    "A server of files that knows ranges, as object stores and nginx do."
    ranges = True

    def do_GET(self):
        path = self.translate_path(self.path)
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not self.ranges or not asked or not os.path.isfile(path): return super().do_GET()
        data = open(path, 'rb').read()
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header('Content-Range', f'bytes {start}-{end}/{len(data)}')
        self.send_header('Content-Length', str(end - start + 1))
        self.end_headers()
        self.wfile.write(data[start:end + 1])

    def end_headers(self):
        if self.ranges: self.send_header('Accept-Ranges', 'bytes')
        super().end_headers()

    def log_message(self, *_): pass


class Whole(Ranges): ranges = False


def serve(handler, folder):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), lambda *a: handler(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}'


@pytest.fixture
def packed(tmp_path):
    "Shards of files that hold their names, and these names."
    names = [f'{i} clip.mp4' for i in range(7)]
    write_shards(films(tmp_path/'films', names), tmp_path/'shards', max_clips=3)
    return tmp_path/'shards', names


def everything(m): return [(m.read(i).decode(), int(m.labels[i]), int(m.ids[i])) for i in range(len(m))]


@pytest.mark.parametrize('store', ['file', 'memory', 'http'])
def test_shards_in_another_store(packed, store, request):
    folder, names = packed
    if store == 'http':
        pytest.importorskip('aiohttp')
        server, url = serve(Ranges, folder)
        request.addfinalizer(server.shutdown)
    else:
        url = f'file://{folder}' if store == 'file' else 'memory://everything'
        for file in folder.iterdir() if store == 'memory' else (): write_file(url, file.name, file.read_bytes())
    m, here = read_shards(url), read_shards(folder)
    assert everything(m) == everything(here) and [text for text, *_ in everything(m)] == names
    assert m.paths.equals(here.paths)
    if store == 'http': # with the index that is there by now
        assert everything(read_shards(url)) == everything(here)


def in_child(m, answers):
    answers.put(everything(m))


@pytest.mark.parametrize('store', ['memory', 'http'])
def test_reading_after_a_fork(packed, store, request):
    if store == 'http':
        pytest.importorskip('aiohttp')
        server, url = serve(Ranges, packed[0])
        request.addfinalizer(server.shutdown)
    else:
        url = 'memory://forked'
        for file in packed[0].glob('*.tar'): write_file(url, file.name, file.read_bytes())
    m, fork = read_shards(url), multiprocessing.get_context('fork')
    before, answers = everything(m), fork.Queue()
    child = fork.Process(target=in_child, args=(m, answers), daemon=True)
    child.start()
    assert answers.get(timeout=60) == before
    child.join()


def test_a_server_without_ranges(packed, request):
    pytest.importorskip('aiohttp')
    server, url = serve(Whole, packed[0])
    request.addfinalizer(server.shutdown)
    m = read_shards(url) # small ones are fetched whole
    with pytest.raises(DataError, match='whole files, not parts'): m.source(3)
    assert everything(read_shards(f'simplecache::{url}')) == everything(read_shards(packed[0]))
    pack(packed[0]/'9.tar', *[(f'{i}.mp4', bytes(2**22)) for i in range(4)])
    with pytest.raises(DataError, match='sends whole files only'): read_shards(url)


def test_a_store_that_loses_a_shard(packed):
    for file in packed[0].glob('*.tar'): write_file('memory://lost', file.name, file.read_bytes())
    m = read_shards('memory://lost')
    write_file('memory://lost', '000001.tar', b'short')
    assert m.read(0) == b'0 clip.mp4'
    with pytest.raises(UnreadableVideo, match='000001.tar/.*cut off'): m.source(3)
    with pytest.raises(DataError, match='000001.tar: damaged'): read_shards('memory://lost')


def test_many_shards_are_indexed_by_their_headers(tmp_path):
    for n in range(40): pack(tmp_path/f'{n:03}.tar', *[(f'{i}.mp4', b'x' * 5000) for i in range(5)])
    index = index_shards(tmp_path)
    assert len(index.table) == 200 and index.shards == 40
    assert index.table['path'].to_pylist()[-1] == '039.tar/4.mp4'
