"Data sets with real files: workers, bad clips, order of a run, shards, manifests that somebody else wrote."
import json
from dataclasses import replace

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from umt.data import emoji_motion
from umt.data.annotations import read_annotations
from umt.data.galleries import gallery_dataset
from umt.data.media import DataError, MediaDataset, Quarantine, StepSampler, TooManyBadClips, collate, evaluation_order
from umt.data.shards import read_shards, write_shards
from umt.data.tables import ManifestError, read_manifest
from umt.data.transforms import pretrain_transform
from umt.data.video import BACKENDS, LinkError, VideoError

N = 12
BAD = 2, 7


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "Twelve good clips."
    root = tmp_path_factory.mktemp('clips')/'emoji'
    return emoji_motion.generate(root, {'train': N}, num_objects=8, image_size=64, num_frames=12, num_workers=0)


@pytest.fixture
def damaged(clips, tmp_path):
    "The same clips as links under a root of their own, two of them cut in half."
    manifest = read_manifest(clips/'action_train.csv')
    for i in range(N):
        data = (clips/manifest.name(i)).read_bytes()
        path = tmp_path/manifest.name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:len(data)//2] if i in BAD else data)
    return read_manifest(clips/'action_train.csv', root=tmp_path)


def dataset(manifest, **options): return MediaDataset(manifest, 4, 'sparse', pretrain_transform(32), **options)


def loader(data, sampler, workers=0):
    return DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers)


def run(data, workers=0, **options):
    return list(loader(data, StepSampler(len(data), 4, seed=3, **{'epochs': 2, **options}), workers))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and x['failures'] == y['failures']
        assert all(torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k] for k in x)


@pytest.mark.parametrize('num_sample', [1, 2])
def test_workers_do_not_change_a_bit(damaged, num_sample):
    data = dataset(damaged, num_sample=num_sample)
    alone = run(data)
    assert any(batch['failures'] for batch in alone) and len(alone[0]['video']) == 4*num_sample
    torch.rand(3) # the global generator has no say
    for workers in (0, 1, 2): assert_same(run(data, workers), alone)


def test_resumed_loader_goes_on_exactly(damaged):
    data = dataset(damaged)
    whole = run(data, accumulate=2)
    assert_same(run(data, workers=1, accumulate=2, start_step=3), whole[6:])


def test_replacement_is_whole_and_deterministic(damaged):
    data = dataset(damaged)
    for epoch in range(3):
        for i in BAD:
            sample = data[epoch, i]
            other = data[epoch, sample['sample_id']]
            assert sample['sample_id'] not in BAD and sample['failures'][0][:2] == (i, damaged.name(i))
            assert torch.equal(sample['video'], other['video'])
            assert (sample['label'], sample['key'], other['failures']) == (other['label'], other['key'], [])
            assert sample['label'] == damaged.labels[sample['sample_id']]
    assert len({data[epoch, BAD[0]]['sample_id'] for epoch in range(6)}) > 1, 'not always the same stand-in'


def test_quarantine_counts_each_clip_once_and_survives(damaged, tmp_path):
    file = tmp_path/'quarantine.jsonl'
    quarantine = Quarantine(file, N, limit=.2)
    for batch in run(dataset(damaged)): quarantine.update(batch['failures'])
    written = [json.loads(line)['sample_id'] for line in file.read_text().splitlines()]
    assert written == list(quarantine.clips) and set(quarantine.clips) == set(BAD)
    resumed = Quarantine(file, N, limit=.2)
    with pytest.raises(TooManyBadClips, match='3 of 12 clips') as stop: resumed.update([(9, 'nine.mp4', 'cut off')])
    assert all(damaged.name(i) in str(stop.value) for i in BAD) and 'nine.mp4' in str(stop.value)
    assert len(Quarantine(file, N)) == 3


def test_limit_stops_the_run_with_the_list(damaged, tmp_path):
    quarantine = Quarantine(tmp_path/'q.jsonl', N) # 1 % of 12 clips: none
    with pytest.raises(TooManyBadClips, match='train_0000'):
        for batch in run(dataset(damaged)): quarantine.update(batch['failures'])


@pytest.mark.parametrize('workers', [0, 1])
def test_nothing_decodes_fails_at_once(tmp_path, workers):
    (tmp_path/'list.txt').write_text(''.join(f'missing/{i}.mp4 0\n' for i in range(100)))
    data = dataset(read_manifest(tmp_path/'list.txt'))
    batches = iter(loader(data, StepSampler(100, 4, epochs=1), workers))
    with pytest.raises(DataError, match='none of 10 clips could be decoded'): next(batches)


def test_evaluation_replaces_nothing(damaged):
    with pytest.raises(DataError, match=damaged.name(2)): dataset(damaged, tries=1)[0, 2]


@pytest.mark.parametrize('world_size, accumulate', [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_steps_do_not_depend_on_the_machine(world_size, accumulate):
    def steps(world_size, accumulate, start_step=0):
        def sampler(rank): return StepSampler(27, 8, 5, rank, world_size, accumulate, start_step, epochs=2)
        ranks = [list(sampler(rank)) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {(6 - start_step)*accumulate} == {len(sampler(0))}
        def step(s): return sum((sum(batches[s*accumulate:][:accumulate], []) for batches in ranks), [])
        return [sorted(step(s)) for s in range(6 - start_step)]
    plain = steps(1, 1)
    assert steps(world_size, accumulate) == plain
    assert steps(world_size, accumulate, start_step=4) == plain[4:]
    for epoch in (0, 1):
        seen = sum(plain[3*epoch:][:3], [])
        # no repeats; the last 3 of 27 wait for another epoch
        assert len(set(seen)) == 24 and {e for e, _ in seen} == {epoch}
    assert sorted(i for _, i in sum(plain[:3], [])) != sorted(i for _, i in sum(plain[3:], []))


def test_eval_sampler_sees_everything_once():
    for n, size, world in [(10, 4, 3), (2, 4, 3), (9, 3, 1)]:
        ranks = [evaluation_order(n, size, r, world) for r in range(world)]
        assert sorted(i for r in ranks for batch in r for _, i in batch) == list(range(n))


def test_shards_give_the_same_samples(damaged, tmp_path):
    shards = read_shards(write_shards(damaged, tmp_path/'packed 100%', max_clips=5))
    assert len({shards.name(i).split('/')[0] for i in range(N)}) == 3
    for a, b in zip(run(dataset(damaged)), run(dataset(shards), workers=1), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ('video', 'label', 'sample_id', 'key'))
        assert [f[0] for f in a['failures']] == [f[0] for f in b['failures']]
    part = shards.subset([4, 0])
    assert torch.equal(dataset(part)[1, 0]['video'], dataset(damaged)[1, 4]['video'])
    with pytest.raises(FileExistsError): write_shards(damaged, tmp_path/'packed 100%')
    shard = tmp_path/'packed 100%'/'000001.tar'
    shard.write_bytes(shard.read_bytes()[:-15_000])
    with pytest.raises(DataError, match='000001.tar: damaged'): read_shards(tmp_path/'packed 100%')


def test_foreign_shards(clips, tmp_path):
    "What webdataset itself writes, in folders, with .cls labels and thumbnails."
    import webdataset
    manifest = read_manifest(clips/'action_train.csv')
    with webdataset.TarWriter(str(tmp_path/'a.tar')) as tar:
        for i in range(3):
            video = (clips/manifest.name(i)).read_bytes()
            sample = {'__key__': f'k400.v1/clip {i}', 'mp4': video, 'cls': i + 5, 'thumb.jpg': b''}
            tar.write(sample | ({'webm.txt': 'no'} if i else {}))
    shards = read_shards(tmp_path)
    assert [shards.name(i) for i in range(3)] == [f'a.tar/k400.v1/clip {i}.mp4' for i in range(3)]
    assert shards.labels.tolist() == [5, 6, 7] and shards.ids.tolist() == [0, 1, 2]
    assert torch.equal(dataset(shards)[0, 1]['video'], dataset(manifest)[0, 1]['video'])


@pytest.mark.parametrize('path', ['../out.mp4', 'a/../../out.mp4', '/etc/passwd', '{root}2/out.mp4', ''])
def test_paths_stay_inside_the_root(tmp_path, path):
    root = tmp_path/'data'
    rows = [{'path': 'fine.mp4', 'label': 0}, {'path': path.format(root=root), 'label': 0}]
    (tmp_path/'list.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(ManifestError) as e: read_manifest(tmp_path/'list.jsonl', root=root)
    assert [line for line, _ in e.value.rows] == [2]


def test_links_stay_inside_the_root(clips, tmp_path):
    manifest = read_manifest(clips/'action_train.csv')
    (tmp_path/'in.mp4').write_bytes((clips/manifest.name(0)).read_bytes())
    (tmp_path/'alias.mp4').symlink_to('in.mp4')
    (tmp_path/'out.mp4').symlink_to(clips/manifest.name(0))
    (tmp_path/'folder').symlink_to(clips/'videos')
    (tmp_path/'list.csv').write_text('alias.mp4 0\nout.mp4 0\nfolder/train/train_000000.mp4 0\n')
    data = dataset(read_manifest(tmp_path/'list.csv'))
    assert data[0, 0]['failures'] == []
    for i in (1, 2):
        with pytest.raises(LinkError, match='outside the root'): data.load(0, i)
    # The root itself may be a link, and absolute paths may use either name.
    (tmp_path/'root').symlink_to(clips)
    for name in (clips, tmp_path/'root'):
        (tmp_path/'absolute.txt').write_text(f'{name/manifest.name(0)} 1\n')
        assert dataset(read_manifest(tmp_path/'absolute.txt', root=tmp_path/'root'))[0, 0]['failures'] == []


# ---- one clip's errors stay that clip's error

def write_frames(path, frames, codec='mpeg4', pix_fmt='yuv420p'):
    "A file of given frames, uint8 [H, W, 3] each; their sizes may differ where the container allows it"
    with av.open(str(path), 'w') as out:
        stream = out.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for frame in frames: out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        out.mux(stream.encode())
    return path


def join_sizes(path):
    "A Matroska file of Motion JPEG whose pictures change from 64x48 to 32x24 half way"
    parts = []
    for n, shape in enumerate(((48, 64, 3), (24, 32, 3))):
        part = write_frames(path.with_name(f'part{n}.mkv'), [np.full(shape, 90, np.uint8)]*6, 'mjpeg', 'yuvj420p')
        with av.open(str(part)) as source:
            packets = [bytes(packet) for packet in source.demux(source.streams.video[0]) if packet.size]
            parts.append(packets)
    with av.open(str(path.with_name('part0.mkv'))) as source, av.open(str(path), 'w') as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for n, content in enumerate(sum(parts, [])):
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, source.streams.video[0].time_base
            packet.pts = packet.dts = round(n/12/packet.time_base)
            out.mux(packet)
    return path


def odd_file(kind, path, good):
    "Makes `path` a clip of an odd kind; what its error is called and says"
    path.unlink()
    if kind == 'link out of the root': path.symlink_to(good)
    if kind == 'link in a circle': path.symlink_to(path.name)
    if kind == 'frames that change their size': join_sizes(path.with_suffix('.mkv')).rename(path)
    if kind == 'one column of pixels':
        column = [np.zeros((48, 1, 3), np.uint8)]*12
        write_frames(path.with_suffix('.mkv'), column, 'mjpeg', 'yuvj444p').rename(path)
    if kind == 'a folder': path.mkdir()
    return ODD[kind]


ODD = {
    'link out of the root': ('LinkError', 'outside the root'),
    'link in a circle': ('LinkError', 'leads back to itself'),
    'frames that change their size': ('UnreadableVideo', 'change their size: 32x24, 64x48'),
    'one column of pixels': ('UnreadableVideo', '1 pixels wide and 48 high'),
    'a folder': ('UnreadableVideo', 'not a file'),
}


@pytest.mark.parametrize('kind', ODD)
def test_an_odd_clip_is_replaced_and_listed(clips, tmp_path, kind, monkeypatch):
    if kind == 'frames that change their size': # decord resizes them; what it cannot open, as AV1, goes to PyAV
        monkeypatch.setitem(BACKENDS, 'auto', BACKENDS['pyav'])
    manifest, root = read_manifest(clips/'action_train.csv').subset(range(4)), tmp_path/'data'
    for i in range(4):
        path = root/manifest.name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((clips/manifest.name(i)).read_bytes())
    name, reason = odd_file(kind, root/manifest.name(1), clips/manifest.name(0))
    data = dataset(read_manifest(clips/'action_train.csv', root=root).subset(range(4)))
    data.choose = lambda length: list(range(length))
    with pytest.raises(VideoError, match=reason) as error: data.load(0, 1)
    assert type(error.value).__name__ == name and manifest.name(1) in error.value.path
    sample = data[0, 1]
    (sample_id, path, why), = sample['failures']
    assert (sample_id, path) == (1, manifest.name(1)) and why.startswith(name) and reason in why
    assert sample['sample_id'] != 1 and torch.equal(sample['video'], data[0, sample['sample_id']]['video'])
    quarantine = Quarantine(tmp_path/'q.jsonl', 4, limit=.5)
    quarantine.update(sample['failures'])
    assert list(quarantine.clips) == [1]
    # The same clip in the two other data sets that read videos.
    videos = gallery_dataset(data.manifest, 4, 32)
    assert videos[0, 1]['failures'][0][1] == manifest.name(1) and not videos[0, 0]['failures']
    captioned = replace(data.manifest, columns={'caption': pa.array(['a', 'b', 'c', 'd'], pa.large_string())})
    pairs = MediaDataset({'video': [captioned]}, 4, data.choose, encode=lambda text: torch.tensor([len(text)]))
    assert pairs[0, 1]['failures'][0][1] == manifest.name(1) and pairs[0, 1]['sample_id'] != 1


# ---- lists that somebody else wrote

ROWS = [('a b/my clip.mp4', 3), ('c,d.mp4', 0), ('e', 709)]


@pytest.mark.parametrize('name, text', [
    ('comma.csv', 'a b/my clip.mp4,3\nc,d.mp4,0\n\ne,709\n'),
    ('space.csv', 'a b/my clip.mp4 3\r\nc,d.mp4 0\r\ne 709'),
    ('tab.txt', 'a b/my clip.mp4\t3\nc,d.mp4\t0\ne\t709\n'),
    ('bom.list', '\ufeffa b/my clip.mp4, 3\nc,d.mp4, 0\ne, 709\n'),
    ('header.csv', 'label,path,split\n3,a b/my clip.mp4,x\n0,"c,d.mp4",y\n709,e,z\n'),
    ('rows.jsonl', ''.join(json.dumps(dict(path=p, label=l)) + '\n' for p, l in ROWS)),
    ('rows.json', json.dumps([dict(path=p, label=str(l)) for p, l in ROWS], indent=2)),
])
def test_every_format_reads_the_same(tmp_path, name, text):
    (tmp_path/name).write_bytes(text.encode())
    manifest = read_manifest(tmp_path/name, first_id=100)
    assert [(manifest.name(i), int(manifest.labels[i])) for i in range(3)] == ROWS
    assert manifest.ids.tolist() == [100, 101, 102]
    assert manifest.source(2).path == str(tmp_path/'e.mp4')
    if name == 'header.csv': assert manifest.columns['split'].to_pylist() == ['x', 'y', 'z']


def test_parquet_and_other_column_names(tmp_path):
    table = pd.DataFrame({'video': [path for path, _ in ROWS], 'class': np.int32([label for _, label in ROWS])})
    table.assign(caption=[['a', 'b'], [], ['c']]).to_parquet(tmp_path/'x.parquet')
    manifest = read_manifest(tmp_path/'x.parquet', path='video', label='class')
    assert [(manifest.name(i), int(manifest.labels[i])) for i in range(3)] == ROWS
    assert manifest.columns['caption'].to_pylist() == [['a', 'b'], [], ['c']]
    with pytest.raises(ManifestError, match="no 'path'"): read_manifest(tmp_path/'x.parquet')
    (tmp_path/'raw.txt').write_text('my folder/x 120 4\n')
    raw = read_manifest(tmp_path/'raw.txt', columns=['path', 'frames', 'label'])
    assert (raw.name(0), raw.labels[0], raw.columns['frames'][0].as_py()) == ('my folder/x', 4, '120')


@pytest.mark.parametrize('name, text, lines', [
    ('list.csv', 'a.mp4 1\nb.mp4\n\nc.mp4 x\nd.mp4 1.5\ne.mp4 2\n../f.mp4 3\n', [2, 4, 5, 7]),
    ('comma.csv', 'a.mp4,1\nb.mp4 2\nc.mp4,\n,3\n', [2, 3, 4]),
    ('header.csv', 'path,label\na.mp4,1\nb.mp4\nc.mp4,2,3\n"d\n.mp4",x\n', [3, 4, 6]),
    ('rows.jsonl', '{"path": "a.mp4", "label": 1}\n{"path": 5, "label": 1}\n{"path": "b.mp4", "label": true}\n'
     'nope\n"text"\n{"label": 1}', [2, 3, 4, 5, 6]),
    ('rows.json', '[\n {"path": "a.mp4",\n  "label": 1},\n {"path": "b.mp4"}, 7,\n\n'
     ' {"path": "../c.mp4", "label": 2}]', [4, 4, 6]),
    ('cut.json', '[\n {"path": "a.mp4", "label": 1},\n {"path": ', [3]),
    ('latin.csv', 'a.mp4 1\ncaf\udce9.mp4 2\n', [2]),
    ('empty.csv', '\n\n', [1]),
])
def test_every_malformed_row_is_listed(tmp_path, name, text, lines):
    (tmp_path/name).write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(ManifestError) as e: read_manifest(tmp_path/name)
    assert [line for line, _ in e.value.rows] == lines
    assert all(f'line {line}:' in str(e.value) for line in lines) and str(tmp_path/name) in str(e.value)


@pytest.mark.parametrize('text', ['v/10 24 3\nv/11 30 0\n', 'v/10,24,3\n', 'k400/a.mp4 300 7\nk400/b.mp4\t300\t8\n'])
def test_lists_of_raw_frames_are_refused_by_their_layout(tmp_path, text):
    (tmp_path/'train.csv').write_text(text)
    for read in (read_manifest, lambda file: read_annotations('list', file, tmp_path)):
        with pytest.raises(ManifestError, match="line 1: .*the layout 'path num_frames label'"):
            read(tmp_path/'train.csv')
    named = read_manifest(tmp_path/'train.csv', columns=['path', 'num_frames', 'label'])
    assert named.labels.tolist()[0] in (3, 7)


def test_very_long_complaints_are_cut_but_complete_in_rows(tmp_path):
    (tmp_path/'all.csv').write_text('x.mp4\n'*1000)
    with pytest.raises(ManifestError, match='1000 malformed rows') as e: read_manifest(tmp_path/'all.csv')
    assert len(e.value.rows) == 1000 and len(str(e.value)) < 10_000 and 'and 950 more' in str(e.value)
