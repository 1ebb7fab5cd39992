"Pairs: files of every kind, files that somebody else wrote, ids over corpora, bad media, the order of a run."
import csv
import io
import json
import logging
import sqlite3
import tarfile
import zlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from umt.data import emoji_motion, emoji_scenes
from umt.data.captions import read_captions, share_ids, write_captions
from umt.data.corpora import Corpus, build_corpora, find_corpora, read_published
from umt.data.media import DataError, Quarantine
from umt.data.shards import write_shards
from umt.data.rows import ManifestError, json_rows
from umt.data.images import ImageError, read_image
from umt.data.media import MediaDataset, StepSampler, collate
from umt.data.transforms import pair_transform
from umt.data.transforms import denormalize
from umt.data.video import LinkError

CLIPS, STILLS = 12, 16


@pytest.fixture(scope='module')
def emoji(tmp_path_factory):
    "Clips and stills, all good."
    root = tmp_path_factory.mktemp('pairs')/'emoji'
    emoji_motion.generate(root, {'train': CLIPS}, num_objects=8, image_size=64, num_frames=12, num_workers=0)
    emoji_motion.generate_stills(root, STILLS, num_objects=8, image_size=64, num_workers=0)
    return root


@pytest.fixture
def damaged(emoji, tmp_path):
    "The same files under a root of their own; clips 2 and 7 and stills 3 and 4 cannot be read."
    for kind in ('captions_train.json', 'captions_stills_train.json'):
        for i, entry in enumerate(json.loads((emoji/kind).read_text())):
            name = entry.get('video') or entry['image']
            bad = i in ((2, 7) if 'video' in entry else (3, 4))
            path = tmp_path/name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((emoji/name).read_bytes()[:300] if bad else (emoji/name).read_bytes())
        (tmp_path/kind).write_text((emoji/kind).read_text())
    (tmp_path/'images/train/train_000004.jpg').unlink()
    return tmp_path


def encode(caption): return torch.tensor([101, *(len(word) for word in caption.split())])


def pairs(root, **options):
    stills, clips = (read_captions(root/name) for name in ('captions_stills_train.json', 'captions_train.json'))
    transform = pair_transform(32, flip=False)
    corpora = {'image': [stills], 'video': [clips]}
    return MediaDataset(corpora, 4, 'rand', transform, 3, encode=encode, **options)


def run(data, workers=0, **options):
    sampler = StepSampler(data.media.values(), 4, seed=3, **{'epochs': 2, **options})
    return list(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x: assert torch.equal(x[k], y[k]) if isinstance(x[k], torch.Tensor) else x[k] == y[k], k


def rows(m): return [(m.name(i), m.columns['caption'][i].as_py(), int(m.ids[i])) for i in range(len(m))]


# ---- pairs stay pairs

def test_a_bad_medium_never_trains_with_anothers_caption(damaged):
    data = pairs(damaged)
    texts = {name: set(caption) for m in data.corpora for name, caption, _ in rows(m)}
    bad = {('image', 3), ('image', 4), ('video', 2), ('video', 7)}
    replaced = 0
    for epoch in range(4):
        for medium, indices in data.media.items():
            for i in indices:
                sample = data[epoch, i]
                corpus = next(m for m in data.corpora if sample['sample_id'] in m.ids)
                row = int(np.flatnonzero(corpus.ids == sample['sample_id'])[0])
                source = int(indices.start + row)
                assert (medium, row) not in bad
                assert sample['caption'] in texts[corpus.name(row)], 'the words are those of the picture'
                assert torch.equal(sample['input_ids'], encode(sample['caption']))
                if (medium, i - indices.start) in bad:
                    replaced += 1
                    assert source != i and sample['failures'][0][1] == data.place(i)[1].name(i - indices.start)
                    other = data[epoch, source]
                    assert torch.equal(sample['video'], other['video'])
                    assert sample['video'].shape[1] == (1 if medium == 'image' else 4)
                    assert all(sample[k] == other[k] for k in ('caption', 'sample_id', 'key'))
                else: assert source == i and not sample['failures']
    assert replaced == 16


def test_failures_reach_the_quarantine_once_per_file(damaged):
    data, quarantine = pairs(damaged), Quarantine(None, CLIPS + STILLS, limit=.5)
    for batch in run(data): quarantine.update(batch['failures'])
    bad = [f'images/train/train_{i:06d}.jpg' for i in (3, 4)] + [f'videos/train/train_{i:06d}.mp4' for i in (2, 7)]
    assert sorted(path for _, path, _ in quarantine.clips.values()) == bad
    assert 'no such file' in next(reason for _, path, reason in quarantine.clips.values() if path.endswith('4.jpg'))


def test_giving_up_lists_what_was_tried(damaged):
    with pytest.raises(DataError, match='none of 1 clips could be decoded:\n.*train_000003.jpg: ImageError'):
        pairs(damaged, tries=1)[0, 3]
    for f in damaged.glob('images/train/*'): f.write_bytes(b'')
    with pytest.raises(DataError, match='none of 10 clips'): pairs(damaged)[0, 0]


def test_workers_and_resuming_do_not_change_a_bit(damaged):
    alone = run(pairs(damaged), accumulate=2)
    assert any(batch['failures'] for batch in alone)
    torch.rand(3) # the global generator has no say
    assert_same(run(pairs(damaged), workers=2, accumulate=2), alone)
    assert_same(run(pairs(damaged), workers=1, accumulate=2, start_step=3), alone[6:])


def test_captions_are_drawn_evenly_and_transforms_keep_the_global_generator(emoji):
    data = pairs(emoji)
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    drawn = Counter(data.load(epoch, STILLS)[0]['caption'] for epoch in range(40))
    assert torch.equal(torch.rand(4), expected)
    assert len(drawn) == 4 and min(drawn.values()) > 3
    assert len({data[0, i]['key'] for i in range(len(data))}) == len(data)


# ---- order

@pytest.mark.parametrize('world_size, accumulate', [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_order_depends_on_seed_and_step_alone(world_size, accumulate):
    media = [range(0, 90), range(90, 131)]
    def steps(seed=0, start=0):
        def of_rank(rank): return StepSampler(media, 8, seed, rank, world_size, accumulate, start, epochs=3)
        ranks = [list(of_rank(rank)) for rank in range(world_size)]
        micro = [sum((ranks[r][m] for r in range(world_size)), []) for m in range(len(ranks[0]))]
        return [sum(micro[at:at + accumulate], []) for at in range(0, len(micro), accumulate)]
    whole = steps()
    assert whole == list(StepSampler(media, 8, epochs=3)) and whole != steps(seed=1)
    for start in (1, 17, 20, 47): assert steps(start=start) == whole[start:]
    for step in whole: assert len({i < 90 for _, i in step}) == 1 and len({e for e, _ in step}) == 1
    for epoch in range(3):
        seen = Counter(i for step in whole for e, i in step if e == epoch)
        assert max(seen.values()) == 1
        assert sum(i < 90 for i in seen) == 88 and sum(i >= 90 for i in seen) == 40, 'drop_last per medium'


def test_media_are_mixed_in_proportion():
    sampler = StepSampler([range(0, 8000), range(8000, 10000)], 8, epochs=1)
    order = sampler.media_order(0)
    assert torch.bincount(order).tolist() == [1000, 250] == sampler.steps_of
    assert all(30 < n < 75 for n in order.view(5, 250).sum(1).tolist()), 'not one after the other'
    assert not torch.equal(order, sampler.media_order(1))
    assert torch.equal(order, StepSampler([range(0, 8000), range(8000, 10000)], 8, epochs=1).media_order(0))
    with pytest.raises(ValueError, match='2 processes x 3'):
        StepSampler([range(100)], 8, world_size=2, accumulate=3, epochs=1)
    with pytest.raises(ValueError, match='expected 1 to 5, all samples of the smallest'):
        StepSampler([range(100), range(100, 105)], 8, epochs=1)


# ---- ids

def write_twice(file):
    "Captions of two images, one of them twice"
    entries = [{'image': f'train_{i:06d}.jpg', 'caption': text} for i, text in ((5, 'x'), (1, 'y'), (5, 'z'))]
    file.write_text(json.dumps(entries))


def test_ids_are_of_media_over_all_corpora(emoji, tmp_path):
    stills = read_captions(emoji/'captions_stills_train.json')
    write_twice(tmp_path/'a.json')
    by_folder = read_captions(tmp_path/'a.json', emoji/'images/train')
    odd = [str(emoji/'images/train/../train/train_000005.jpg'), 'images//train/./train_000001.jpg']
    (tmp_path/'b.json').write_text(json.dumps([dict(image=path, caption='w') for path in odd]))
    absolute = read_captions(tmp_path/'b.json', emoji)
    same_name = read_captions(tmp_path/'a.json', tmp_path)
    clips = read_captions(emoji/'captions_train.json')
    assert by_folder.ids.tolist() == [0, 1, 0]
    data = MediaDataset(dict(video=[clips], image=[stills, by_folder, absolute, same_name]), 4, encode=encode)
    ids = [m.ids.tolist() for m in data.corpora]
    assert ids == [list(range(16)), [5, 1, 5], [5, 1], [16, 17, 16], list(range(18, 30))]
    assert data.media == dict(image=range(24), video=range(24, 36)) and data.place(23)[1:] == (data.corpora[3], 2)
    for bad in (-1, 36):
        with pytest.raises(IndexError): data.place(bad)


def test_ids_of_shards(emoji, tmp_path):
    write_twice(tmp_path/'a.json')
    packed = read_captions(write_shards(read_captions(tmp_path/'a.json', emoji/'images/train'), tmp_path/'shards'))
    stills = read_captions(emoji/'captions_stills_train.json')
    ids = [m.ids.tolist() for m in share_ids([stills, packed])]
    assert ids[1] == [16, 17, 16], 'one image, one id, in a folder of shards too'


# ---- caption files

ENTRIES = [('a/1.jpg', 'a "quoted", dog'), ('a/2.jpg', 'two\tcats'), ('ü/3.jpg', 'naïve'), ('a/1.jpg', 'the dog again')]


def write(folder, kind):
    table, file = pd.DataFrame(ENTRIES, columns=['image', 'caption']), folder/f'captions.{kind}'
    if kind == 'json': file.write_text(json.dumps(table.to_dict('records'), indent=2))
    if kind == 'jsonl': file.write_text('\n'.join(map(json.dumps, table.to_dict('records'))) + '\n\n')
    if kind == 'parquet': table.assign(width=3).to_parquet(file)
    if kind == 'csv': table.assign(url='http://x,y').to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC)
    if kind == 'tsv': table.to_csv(file, index=False, sep='\t')
    if kind == 'sqlite':
        table = table.rename(columns={'image': 'filename'}).assign(id=range(len(table))).sample(frac=1, random_state=0)
        with sqlite3.connect(file) as base: table.to_sql('annos', base, index=False)
    return file


@pytest.mark.parametrize('kind', ['json', 'jsonl', 'parquet', 'csv', 'tsv', 'sqlite'])
def test_every_kind_of_file_says_the_same(kind, tmp_path):
    m = read_captions(write(tmp_path, kind), tmp_path/'media')
    assert rows(m) == [(*entry, i) for entry, i in zip(ENTRIES, (0, 1, 2, 0))] and m.root == str(tmp_path/'media')
    again = read_captions(write_captions(m, tmp_path/'again.parquet', 'image'), tmp_path/'media', first_id=7)
    assert rows(again)[3] == (*ENTRIES[3], 7)
    if kind != 'sqlite':
        with pytest.raises(ManifestError, match="expected 'video' among the names"):
            read_captions(tmp_path/f'captions.{kind}', medium='video')


@pytest.mark.parametrize('kind', ['json', 'jsonl', 'parquet', 'csv', 'sqlite'])
def test_every_kind_of_file_is_checked(kind, tmp_path, monkeypatch):
    entries = [('a.jpg', 'a dog'), ('../../secret.jpg', 'x'), ('/etc/x.jpg', 'y'), ('', 'z'), ('b.jpg', ' '),
               ('a/../b.jpg', 'fine')]
    monkeypatch.setattr(f'{__name__}.ENTRIES', entries)
    file = write(tmp_path, kind)
    with pytest.raises(ManifestError) as e: read_captions(file, tmp_path)
    wrong = sorted(what for _, what in e.value.rows)
    assert len(wrong) == 4
    assert wrong[0].startswith("'../../secret.jpg' is outside") and wrong[1].startswith("'/etc/x.jpg' is outside")
    assert wrong[2:] == ['no caption', "path '': expected a path in UTF-8"]
    if kind == 'jsonl': assert [line for line, _ in e.value.rows] == [2, 3, 4, 5]


def test_lists_and_sentences_mix(tmp_path):
    entries = [{'video': '1', 'caption': 'one'}, {'video': '2', 'caption': ['two', 'zwei']}]
    (tmp_path/'a.json').write_text(json.dumps(entries))
    assert [c for _, c, _ in rows(read_captions(tmp_path/'a.json'))] == [['one'], ['two', 'zwei']]
    for caption in ([], ['a', ''], [' ']):
        (tmp_path/'a.json').write_text(json.dumps([dict(video='1', caption='one'), dict(video='2', caption=caption)]))
        with pytest.raises(ManifestError, match='line 1: no caption'): read_captions(tmp_path/'a.json')


@pytest.mark.parametrize('text, line, wrong', [
    ('[{"image": "a.jpg", "caption": "x"},\n {"image": "b.jpg", "caption": "y"', 2, 'not JSON'),
    ('[{"image": "a.jpg", "caption": "x"}', 1, 'not JSON'),
    ('{"image": "a.jpg", "caption": "x"}', 1, 'expected a list'),
    ('[\n3]', 2, 'expected an object'),
    ('[\n\n{"image": "a.jpg", "video": "b", "caption": "x"}]', 3, "expected one of"),
    ('[{"image": "a.jpg", "caption": "x"},\n{"video": "a.mp4", "caption": "x"}]', 2, "no 'image'"),
    ('[{"image": "a.jpg", "caption": 3}]', 1, 'expected text, found 3'),
    ('[{"image": "a.jpg", "caption": ["x", null]}]', 1, 'expected text, found None'),
    ('[{"image": "a.jpg", "caption": "\\ud800"}]', 1, 'surrogates'),
    ('[]', 1, 'no rows'), ('', 1, 'expected a list')])
def test_malformed_lists(tmp_path, text, line, wrong):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(ManifestError) as e: read_captions(tmp_path/'a.json')
    (at, what), = e.value.rows
    assert at == line and wrong in what


def test_blocks_do_not_matter(tmp_path):
    def caption(i): return ['"], [{', '\\', 'é' * (i % 7)][:1 + i % 3]
    entries = [{'image': f'{i}.jpg', 'caption': caption(i), 'n': [{'x': i}]} for i in range(50)]
    (tmp_path/'a.json').write_text(json.dumps(entries, indent=1, ensure_ascii=False))
    whole = list(json_rows(tmp_path/'a.json'))
    assert [entry for _, entry in whole] == entries
    for block in (1, 7, 64, 501): assert list(json_rows(tmp_path/'a.json', block)) == whole


def test_other_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.json'): read_captions(tmp_path/'nothing.json')
    with pytest.raises(ValueError, match="medium 'audio'"): read_captions(tmp_path/'nothing.json', medium='audio')
    with pytest.raises(ValueError, match='a.txt: expected a folder of shards, or a file .json'):
        read_captions(tmp_path/'a.txt')
    (tmp_path/'a.db').write_text('no database at all, but long enough to look at')
    with pytest.raises(ManifestError, match='a.db.*\n.*not a database'): read_captions(tmp_path/'a.db')
    (tmp_path/'a.csv').write_text('image,caption\na.jpg,x\nb.jpg\nc.jpg,y,z\n')
    with pytest.raises(ManifestError, match='line 3: expected 2 fields, found 1') as e: read_captions(tmp_path/'a.csv')
    assert [line for line, _ in e.value.rows] == [3, 4]
    (tmp_path/'a.csv').write_bytes(b'image,caption\na.jpg,\xff\n')
    with pytest.raises(ManifestError, match='line 2: not UTF-8: byte 0xff'): read_captions(tmp_path/'a.csv')
    pd.DataFrame(dict(image=['a.jpg'], caption=[{'en': 'x'}])).to_parquet(tmp_path/'a.parquet')
    with pytest.raises(ManifestError, match='a.parquet'): read_captions(tmp_path/'a.parquet')
    pd.DataFrame(dict(picture=['a.jpg'], caption=['x'])).to_parquet(tmp_path/'a.parquet')
    with pytest.raises(ManifestError, match="expected one of .'image', 'video'"): read_captions(tmp_path/'a.parquet')
    (tmp_path/'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(ManifestError, match='not a Parquet file'): read_captions(tmp_path/'a.parquet')


def test_links_out_of_the_root_are_refused(emoji, tmp_path):
    (tmp_path/'in').mkdir()
    (tmp_path/'in/a.jpg').symlink_to(emoji/'images/train/train_000000.jpg')
    (tmp_path/'in/a.json').write_text(json.dumps([dict(image='a.jpg', caption='x')]))
    data = MediaDataset({'image': [read_captions(tmp_path/'in/a.json')]}, 1, encode=encode)
    with pytest.raises(LinkError, match='outside the root'): data.load(0, 0)
    with pytest.raises(DataError, match='a.jpg: LinkError'): data[0, 0]


# ---- shards

@pytest.mark.parametrize('kind', ['captions_train.json', 'captions_stills_train.json'])
def test_shards_hold_the_same_pairs(emoji, tmp_path, kind):
    plain = read_captions(emoji/kind)
    packed = read_captions(write_shards(plain, tmp_path/'shards', max_clips=5))
    medium = 'video' if kind == 'captions_train.json' else 'image'
    a, b = (MediaDataset({medium: [m]}, 4, 'rand', pair_transform(32), encode=encode) for m in (plain, packed))
    for i in range(len(a)):
        x, y = a[1, i], b[1, i]
        assert torch.equal(x['video'], y['video']) and all(x[k] == y[k] for k in ('caption', 'sample_id', 'key'))


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def web_shard(emoji, path, n, text=True, start=0):
    "A shard as img2dataset writes it."
    with tarfile.open(path, 'w') as tar:
        for i in range(start, start + n):
            add(tar, f'{i:09d}.jpg', (emoji/f'images/train/train_{i:06d}.jpg').read_bytes())
            if text: add(tar, f'{i:09d}.txt', f'still {i}'.encode())
            about = {'caption': f'still {i}' if text else '', 'url': f'http://x/{i}', 'key': f'{i:09d}'}
            add(tar, f'{i:09d}.json', json.dumps(about).encode())


def test_shards_of_downloads_and_their_index(emoji, tmp_path, caplog, monkeypatch):
    web_shard(emoji, tmp_path/'00000.tar', 3)
    web_shard(emoji, tmp_path/'00001.tar', 2, start=3)
    web_shard(emoji, tmp_path/'00002.tar', 1, text=False, start=5)
    m = read_captions(tmp_path, first_id=10)
    assert rows(m) == [(f'0000{i // 3}.tar/{i:09d}.jpg', [f'still {i}'], 10 + i) for i in range(5)]
    assert '1 of 6 rows have no caption' in caplog.text
    data = MediaDataset(dict(image=[m]), 1, encode=encode)
    assert torch.equal(data.load(0, 4)[0]['video'], read_image(emoji/'images/train/train_000004.jpg'))
    before = (tmp_path/'shards.index.parquet').stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr('umt.data.shards.shard_members', lambda *_: pytest.fail('reads a shard again'))
        assert rows(read_captions(tmp_path)) == [(name, c, i - 10) for name, c, i in rows(m)], 'from the index'
    web_shard(emoji, tmp_path/'00002.tar', 1, start=6)
    assert rows(read_captions(tmp_path))[5] == ('00002.tar/000000006.jpg', ['still 6'], 5)
    assert (tmp_path/'shards.index.parquet').stat().st_mtime_ns > before


def test_bad_shards(emoji, tmp_path):
    with pytest.raises(DataError, match='found none in 0 shards'): read_captions(tmp_path)
    web_shard(emoji, tmp_path/'0.tar', 2)
    data = (tmp_path/'0.tar').read_bytes()
    (tmp_path/'0.tar').write_bytes(data[:3000])
    with pytest.raises(DataError, match='0.tar: damaged'): read_captions(tmp_path)
    with tarfile.open(tmp_path/'0.tar', 'w') as tar:
        for name in ('1.jpg', '2.mp4'): add(tar, name, b'x')
        for name in ('1.txt', '2.txt'): add(tar, name, b'words')
    with pytest.raises(DataError, match=r"found \['image', 'video'\]"): read_captions(tmp_path)
    assert rows(read_captions(tmp_path, medium='video')) == [('0.tar/2.mp4', ['words'], 0)]
    for about in ({'caption': 5}, [1], {'caption': ['a', None]}):
        with tarfile.open(tmp_path/'0.tar', 'w') as tar:
            add(tar, '1.jpg', b'x')
            add(tar, '1.json', json.dumps(about).encode())
        with pytest.raises(DataError, match='0.tar: damaged'): read_captions(tmp_path)
    with tarfile.open(tmp_path/'0.tar', 'w') as tar:
        for n, about in enumerate(('{"sample_id": 3}', '{}')):
            for ending, data in dict(jpg=b'x', txt=b'y', json=about.encode()).items(): add(tar, f'{n}.{ending}', data)
    with pytest.raises(DataError, match='some pairs have a sample_id'): read_captions(tmp_path)


# ---- published files

def test_webvid(tmp_path):
    file = tmp_path/'results.csv'
    clips = [[1035, 'https://a/1035.mp4', 'PT00H00M09S', '000001_000050', 'A dog, "running"\nfast'],
             [7, 'u', 'd', '000051', None], [8, 'u', 'd', '3', 'Sea']]
    pd.DataFrame(clips, columns=['videoid', 'contentUrl', 'duration', 'page_dir', 'name']).to_csv(file, index=False)
    found = rows(read_published('webvid', file))
    assert found == [('000001_000050/1035.mp4', 'A dog, "running"\nfast', 0), ('3/8.mp4', 'Sea', 1)]
    assert read_published('webvid', file, layout='{videoid}.webm').name(0) == '1035.webm'
    with pytest.raises(ValueError, match="layout '{id}.mp4': expected fields among"):
        read_published('webvid', file, layout='{id}.mp4')
    (tmp_path/'other.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ManifestError, match="WebVid's columns"): read_published('webvid', tmp_path/'other.csv')


@pytest.mark.parametrize('text', ['a "dog\thttp://h/d.jpg?x=1\nthe sea\thttp://h/s\n',
                                  'http://h/d.jpg?x=1\ta "dog\nhttp://h/s\tthe sea\n',
                                  'caption\turl\na "dog\thttp://h/d.jpg?x=1\nthe sea\thttp://h/s\n'])
def test_conceptual_captions(tmp_path, text):
    (tmp_path/'cc.tsv').write_text(text)
    dog, sea = (zlib.crc32(url) for url in (b'http://h/d.jpg?x=1', b'http://h/s'))
    found = rows(read_published('cc', tmp_path/'cc.tsv', layout='{index:03d}_{crc32}.jpg'))
    assert found == [(f'000_{dog}.jpg', 'a "dog', 0), (f'001_{sea}.jpg', 'the sea', 1)]
    found = rows(read_published('cc', tmp_path/'cc.tsv', layout='i/{name}'))
    assert [name for name, _, _ in found] == ['i/d.jpg', 'i/s']
    with pytest.raises(ValueError, match='a layout is needed'): read_published('cc', tmp_path/'cc.tsv')
    (tmp_path/'cc.tsv').write_text(text + 'one field\n')
    with pytest.raises(ManifestError, match='expected 2 fields, found 1'):
        read_published('cc', tmp_path/'cc.tsv', layout='{name}')


def test_coco(tmp_path):
    images = [dict(id=9, file_name='COCO_9.jpg'), dict(id=4, file_name='COCO_4.jpg')]
    notes = (4, 'a bus'), (9, 'a cup'), (4, 'the bus'), (4, 'bus')
    annotations = [{'image_id': i, 'caption': text} for i, text in notes]
    (tmp_path/'coco.json').write_text(json.dumps({'images': images, 'annotations': annotations}))
    assert rows(read_published('coco', tmp_path/'coco.json')) == [(f'COCO_{n}.jpg', c, int(n == 9)) for n, c in notes]
    fewer = rows(read_published('coco', tmp_path/'coco.json', max_captions=2, first_id=5))
    assert [text for _, text, _ in fewer] == ['a bus', 'a cup', 'the bus']
    split = [dict(filename=f'{n}.jpg', filepath='val2014', split=s, sentences=[dict(raw=f'{n} a'), dict(raw=f'{n} b')])
             for n, s in enumerate(('train', 'test', 'restval'))]
    (tmp_path/'dataset_coco.json').write_text(json.dumps(dict(images=split)))
    expected = [(f'val2014/{n}.jpg', f'{n} {letter}', i) for i, n in enumerate((0, 2)) for letter in 'ab']
    assert rows(read_published('coco', tmp_path/'dataset_coco.json')) == expected
    for wrong in ({}, [], {'images': images, 'annotations': {}}):
        (tmp_path/'coco.json').write_text(json.dumps(wrong))
        with pytest.raises(ManifestError, match='not annotations of coco'): read_published('coco', tmp_path/'coco.json')


def test_visual_genome(tmp_path):
    (tmp_path/'VG_100K_2').mkdir()
    (tmp_path/'VG_100K_2/2.jpg').write_bytes(b'')
    first = dict(id=1, regions=[dict(phrase=p, image_id=1) for p in ('a clock', ' ', 'the wall')])
    (tmp_path/'vg.json').write_text(json.dumps([first, dict(image_id=2, regions=[dict(phrase='a tree')])]))
    assert rows(read_published('vg', tmp_path/'vg.json')) == [
        ('VG_100K/1.jpg', 'a clock', 0), ('VG_100K/1.jpg', 'the wall', 0), ('VG_100K_2/2.jpg', 'a tree', 1)]
    (tmp_path/'vg.json').write_text('[{"id": 1, "regions": [')
    with pytest.raises(ManifestError, match='not JSON'): read_published('vg', tmp_path/'vg.json')


def test_sbu_and_img2dataset(tmp_path):
    urls = ['http://f/1/a_1.jpg', 'http://f/2/b_2.jpg']
    whole = {'image_urls': urls, 'captions': ['My dog.', 'Sea.'], 'user_ids': ['x', 'y']}
    (tmp_path/'sbu.json').write_text(json.dumps(whole))
    assert rows(read_published('sbu', tmp_path/'sbu.json')) == [('a_1.jpg', 'My dog.', 0), ('b_2.jpg', 'Sea.', 1)]
    (tmp_path/'sbu.json').write_text(json.dumps(dict(image_urls=['http://f/1/a_1.jpg'], captions=[])))
    with pytest.raises(ManifestError, match='1 image_urls, 0 captions'): read_published('sbu', tmp_path/'sbu.json')
    for shard, keys in (('00000', '01'), ('00001', '2')):
        (tmp_path/'web'/shard).mkdir(parents=True)
        table = pd.DataFrame([{'key': f'{shard}000{k}', 'caption': f'caption {k}'} for k in keys])
        table = table.assign(status='success', url='u')
        failed = table.assign(status='failed_to_download', key='x')
        pd.concat([table, failed]).to_parquet(tmp_path/f'web/{shard}.parquet')
        for k in keys: (tmp_path/f'web/{shard}/{shard}000{k}.{"webp" if k == "1" else "jpg"}').write_bytes(b'')
    found = [('00000/000000000.jpg', 'caption 0', 0), ('00000/000000001.webp', 'caption 1', 1),
             ('00001/000010002.jpg', 'caption 2', 2)]
    assert rows(read_published('img2dataset', tmp_path/'web')) == found
    with pytest.raises(ValueError, match="did you mean 'webvid'"): read_published('webvit', tmp_path/'sbu.json')


# ---- corpora

def test_mixtures_are_those_of_the_paper():
    assert {name: sorted(c.name for c in find_corpora(name)) for name in ('5m', '17m', '25m')} == {
        '5m': ['cc3m', 'webvid_2m'],
        '17m': ['cc12m', 'cc3m', 'coco', 'sbu', 'vg', 'webvid_2m'],
        '25m': ['cc12m', 'cc3m', 'coco', 'sbu', 'vg', 'webvid_10m']}
    assert {c.name for c in find_corpora('25m') if c.medium == 'video'} == {'webvid_10m'}
    assert find_corpora('25m,cc3m') == find_corpora('25m') and find_corpora([Corpus('x', 'image', 'y')])[0].file == 'y'
    for wrong in ('', '25M', 'audio:a.json', 'image:a:b:c'):
        with pytest.raises(ValueError, match='expected one of'): find_corpora(wrong)


def test_missing_media(damaged, caplog):
    caplog.set_level(logging.INFO)
    names = 'emoji_stills,emoji_clips'
    found = build_corpora(names, damaged)
    assert list(found) == ['image', 'video'] and [len(m) for ms in found.values() for m in ms] == [STILLS - 1, CLIPS]
    assert 'emoji_stills: 15 of 16 pairs, 15 images' in caplog.text
    assert len({i for ms in found.values() for m in ms for i in m.ids.tolist()}) == STILLS - 1 + CLIPS
    assert len(build_corpora(names, damaged, 'keep')['image'][0]) == STILLS
    missing = "emoji_stills: 1 of 16 pairs have no image under .*, such as 'images/train/train_000004.jpg'"
    with pytest.raises(DataError, match=missing):
        build_corpora(names, damaged, 'error')
    with pytest.raises(ValueError, match="missing 'skip'"): build_corpora(names, damaged, 'skip')
    for f in damaged.glob('images/train/*'): f.unlink()
    with pytest.raises(DataError, match='16 of 16'): build_corpora(names, damaged)
    with pytest.raises(FileNotFoundError, match='coco: expected its captions .coco. at .*captions_train2014.json'):
        build_corpora('coco', damaged)


def test_images_need_no_ending(emoji, tmp_path):
    (tmp_path/'1_23').write_bytes((emoji/'images/train/train_000000.jpg').read_bytes())
    (tmp_path/'a.json').write_text(json.dumps([dict(image='1_23', caption='x'), dict(image='1_24', caption='y')]))
    found = build_corpora('image:a.json', tmp_path)
    first = MediaDataset(found, 1, encode=encode)[0, 0]['video']
    assert torch.equal(first, read_image(emoji/'images/train/train_000000.jpg'))
    assert len(found['image'][0]) == 1


# ---- images and transforms

@pytest.mark.parametrize('mode, ending', [('L', 'png'), ('P', 'png'), ('RGBA', 'png'), ('CMYK', 'jpg'), ('1', 'bmp'),
                                          ('RGB', 'webp'), ('I;16', 'png'), ('P', 'gif')])
def test_any_image_is_rgb(tmp_path, mode, ending):
    Image.new(mode, (7, 5)).save(tmp_path/f'a.{ending}')
    frame = read_image(tmp_path/f'a.{ending}')
    assert frame.shape == (1, 3, 5, 7) and frame.dtype == torch.uint8


def test_bad_images_name_the_file(emoji, tmp_path):
    data = (emoji/'images/train/train_000000.jpg').read_bytes()
    postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'
    wrong = {'empty.jpg': b'', 'text.jpg': b'hello', 'a.eps': postscript, 'head.jpg': data[:300]}
    for name, content in wrong.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ImageError) as e: read_image(tmp_path/name)
        assert e.value.path.endswith(name)
    with pytest.raises(ImageError, match='shard 3: not a readable image'): read_image(b'x', 'shard 3')
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    assert read_image(data[:-200]).shape == (1, 3, 64, 64) and ImageFile.LOAD_TRUNCATED_IMAGES == before


def cubic(x, a):
    x = np.abs(x)
    return np.where(x <= 1, ((a + 2)*x - (a + 3))*x*x + 1, np.where(x < 2, ((a*x - 5*a)*x + 8*a)*x - 4*a, 0))


def test_resize_is_the_reference_formula():
    "Bicubic with a = -0.75, no antialiasing, clamped and rounded; written out here with matrices."
    video = torch.randint(256, (3, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    def weights(n, m):
        w = np.zeros((m, n))
        for j in range(m):
            x = (j + .5)*n/m - .5
            for i in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                w[j, min(max(i, 0), n - 1)] += cubic(x - i, -.75)
        return w
    exact = np.clip(weights(50, 32) @ video.numpy().astype(float) @ weights(70, 32).T, 0, 255)
    ours = denormalize(pair_transform(32, train=False)(video)).transpose(0, 1).numpy()*255
    assert np.abs(ours - exact).max() < .51 and np.abs(ours - ours.round()).max() < 1e-3
    other = denormalize(pair_transform(32, train=False, antialias=True)(video)).transpose(0, 1).numpy()*255
    assert np.abs(other - exact).max() > 20


def test_training_crops_are_large_and_one_for_all_frames():
    ramp = torch.arange(100, dtype=torch.uint8).expand(2, 3, 80, 100)
    spans, mirrored = [], 0
    torch.manual_seed(0)
    for _ in range(60):
        crop = denormalize(pair_transform(32)(ramp))*255
        assert torch.equal(crop[:, 0], crop[:, 1])
        row = crop[0, 0, 16]
        mirrored += bool(row[0] > row[-1])
        spans.append(float((row[-1] - row[0]).abs())/100)
    assert 15 < mirrored < 45 and min(spans) > .5 and min(spans) < .75
    assert not any(row[0] > row[-1] for row in (pair_transform(32, flip=False)(ramp)[0, 0, 16] for _ in range(20)))


def test_frames_are_those_of_the_reference_rule(emoji):
    "The last frame of an interval is never drawn: of 12 frames in 4 intervals, offsets 0 and 1."
    seen = Counter()
    data = MediaDataset(dict(video=[read_captions(emoji/'captions_train.json')]), 4, 'rand', encode=encode)
    inner = data.choose
    data.choose = lambda length: [seen.update(chosen := inner(length)), chosen][1]
    for epoch in range(30): data.load(epoch, 0)
    assert set(seen) == {0, 1, 3, 4, 6, 7, 9, 10}


# ---- stills

def test_stills_do_not_disturb_clips_nor_depend_on_the_cut(tmp_path):
    def contents(root):
        files = [p for p in root.rglob('*') if p.is_file() and p.name != '.lock']
        return {str(p.relative_to(root)): p.read_bytes() for p in files}
    shape = dict(num_objects=8, image_size=64, num_workers=0)
    for root in (tmp_path/'a', tmp_path/'b', tmp_path/'clips'): root.mkdir()
    emoji_motion.generate_stills(tmp_path/'a', 6, **shape)
    emoji_motion.generate(tmp_path/'a', {'train': 2}, **shape)
    emoji_motion.generate(tmp_path/'b', {'train': 2}, **shape)
    emoji_motion.generate_stills(tmp_path/'b', 4, **shape)
    (tmp_path/'b/images/train/.train_000005.jpg.tmp').write_bytes(b'half')
    emoji_motion.generate_stills(tmp_path/'b', 6, **shape)
    emoji_motion.generate(tmp_path/'clips', {'train': 2}, **shape)
    a, b, clips = map(contents, (tmp_path/'a', tmp_path/'b', tmp_path/'clips'))
    assert a == b and clips.items() <= a.items() and len(a) == len(clips) + 6 + 2
    with pytest.raises(ValueError, match='seed: 0 there, 1 wanted'):
        emoji_motion.generate_stills(tmp_path/'a', 6, seed=1, **shape)
    with pytest.raises(ValueError, match="split 'dev'"): emoji_motion.generate_stills(tmp_path/'a', 6, 'dev', **shape)
    (tmp_path/'c').mkdir()
    (tmp_path/'c/images').mkdir()
    with pytest.raises(ValueError, match='not empty'): emoji_motion.generate(tmp_path/'c', {'train': 2}, **shape)


def test_stills_show_no_heldout_object(tmp_path):
    specs = [emoji_motion.still_spec('train', i, num_objects=120)[0] for i in range(400)]
    assert not any(s.heldout for s in specs) and len({s.lead.object.name for s in specs}) > 80
    assert set(Counter(s.lead.object.category for s in specs).values()) == {50}
    shown = [emoji_motion.still_spec('train', i) for i in range(50)]
    assert all(emoji_scenes.pose(spec.lead, t, spec.num_frames)[-1] >= .5 for spec, t in shown)
