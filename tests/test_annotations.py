"Edge cases of the official annotation files (the formats themselves are shown in nbs/data/16_annotations.ipynb)"
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from umt.data import emoji_motion, emoji_scenes
from umt.data.annotations import ANNOTATION_FORMATS, existing_clips, read_annotations, read_classes
from umt.data.media import MediaDataset
from umt.data.shards import read_shards, write_shards
from umt.data.tables import ManifestError, read_manifest

KINETICS = 'label,youtube_id,time_start,time_end,split\n'
SSV2 = dict(id='7', label='holding a cup', template='Holding [something]', placeholders=['a cup'])


def complaints(call, *args, **kwargs):
    with pytest.raises(ManifestError) as e: call(*args, **kwargs)
    return e.value.rows


@pytest.mark.parametrize('name, content, expected', [
    ('bom.txt', b'\xef\xbb\xbfb\r\na\r\n\r\n', ['b', 'a']),
    ('commas.txt', 'push, then pull\nclap\nsing, 2\n', ['push, then pull', 'clap', 'sing, 2']),
    ('pairs.txt', 'push, then pull,1\nclap , 0\n', ['clap', 'push, then pull']),
    ('names.json', '["ü", "b"]', ['ü', 'b']),
    ('numbers.json', '{"a": 1, "b": 0}', ['b', 'a'])])
def test_class_files(write, name, content, expected): assert read_classes(write(name, content)) == expected


@pytest.mark.parametrize('name, content, lines', [
    ('empty.txt', '', [1]),
    ('empty.json', '{}', [1]),
    ('blank.txt', 'a\n\nb', [2]),
    ('twice.txt', 'a\nb\na', [3]),
    ('bytes.txt', b'a\n\xff\n', [2]),
    ('gap.txt', 'a,0\nb,2', [2]),
    ('same.txt', 'a,0\nb,0', [2]),
    ('missing.txt', 'a,0\nb,1\nc', [3]),
    ('one.txt', 'a,1\nb,2', [2]),
    ('twice.json', '{"a": "0",\n"b": "1",\n"a": "2"}', [3]),
    ('gap.json', '{"a": "0",\n"b": "5"}', [2]),
    ('bool.json', '{"a": false,\n"b": true}', [1, 2]),
    ('objects.json', '[{"name": "a"}]', [1]),
    ('broken.json', '{"a": "0",\n', [2]),
    ('number.json', '3', [1])])
def test_bad_class_files(write, name, content, lines):
    assert [line for line, _ in complaints(read_classes, write(name, content))] == lines


def test_kinetics_as_downloaded(write, tmp_path):
    "Byte order mark, Windows line ends, quotes, columns in another order, blank lines"
    file = write('val.csv', b'\xef\xbb\xbfyoutube_id,time_start,time_end,label,split\r\n'
                 b'-_a,7,17,"tai chi, slow",validate\r\n\r\n"b",0,10,abseiling,validate\r\n')
    manifest, names = read_annotations('kinetics', file, tmp_path, first_id=100)
    assert names == ['abseiling', 'tai chi, slow']
    assert manifest.labels.tolist() == [1, 0] and manifest.ids.tolist() == [100, 101]
    assert manifest.paths.to_pylist() == ['-_a_000007_000017.mp4', 'b_000000_000010.mp4']
    assert manifest.columns['time_end'].to_pylist() == [17, 10]
    assert set(manifest.columns) == {'youtube_id', 'time_start', 'time_end', 'split'}


def test_every_bad_row_is_reported(write, tmp_path):
    rows = ['abseiling,a,0,10,train', 'abseiling,,0,10,train', ',c,0,10,train', 'abseiling,d,0.5,10,train',
            'abseiling,e,0,10', 'Abseiling,f,0,10,train', 'abseiling,../../g,0,10,train', 'archery,h,0,10,train']
    file = write('train.csv', KINETICS + '\n'.join(rows))
    found = complaints(read_annotations, 'kinetics', file, tmp_path, ['abseiling', 'archery'])
    assert [line for line, _ in found] == [3, 4, 5, 6, 7, 8]
    expected = ["no 'youtube_id'", 'no class', "time_start '0.5'", 'expected 5 fields', "did you mean 'abseiling'?",
                "expected a video's id"]
    assert all(part in wrong for part, (_, wrong) in zip(expected, found))
    headless = complaints(read_annotations, 'kinetics', write('headless.csv', '\n'.join(rows[:2])), tmp_path)
    assert [line for line, _ in headless] == [1, 2] and 'header' in headless[0][1]
    empty = complaints(read_annotations, 'kinetics', write('only.csv', KINETICS), tmp_path)
    assert empty == [(1, 'the file has no rows')]


def test_unlabelled_lists(write, tmp_path):
    "Without the column, or with nothing in it; the class names of the training list stay what they are"
    for content in ('youtube_id,time_start,time_end,split\na,0,10,test\n', KINETICS + ',a,0,10,test\n'):
        manifest, names = read_annotations('kinetics', write('test.csv', content), tmp_path, ['x', 'y'])
        assert manifest.labels.tolist() == [-1] and names == ['x', 'y']
        assert read_annotations('kinetics', write('test.csv', content), tmp_path)[1] is None
    file = write('test.csv', 'youtube_id,time_start,time_end\na,0,10\n')
    with pytest.raises(ValueError, match='layout'):
        read_annotations('kinetics', file, tmp_path, layout='{label}/{youtube_id}.mp4')


def test_ssv2(write, tmp_path):
    labels = write('labels.json', json.dumps({'Dropping something': '1', 'Holding something': '0'}))
    def read(entries):
        return read_annotations('ssv2', write('train.json', json.dumps(entries, indent=0)), tmp_path, labels)
    manifest, names = read([SSV2, SSV2 | dict(id='8')])
    assert manifest.paths.to_pylist() == ['7.webm', '8.webm'] and 'label' not in manifest.columns
    assert names == ['Holding something', 'Dropping something']
    bad = complaints(read, [SSV2, dict(id='9'), SSV2 | dict(template='Droping [something]'), 5])
    expected = 'no class', "did you mean 'Dropping something'?", 'expected an object'
    assert len(bad) == 3 and all(part in wrong for part, (_, wrong) in zip(expected, bad))
    assert read([SSV2, SSV2 | dict(id=8)])[0].paths.to_pylist() == ['7.webm', '8.webm'], 'an id is text'
    assert complaints(read_annotations, 'ssv2', write('broken.json', '[{"id": "7"},\n{'), tmp_path)[0][0] == 2


def test_moments(write, tmp_path):
    categories = write('moments_categories.txt', 'clapping,1\npraying,0\n')
    file = write('trainingSet.csv', 'clapping/a, b.mp4,clapping,3,0\npraying/c.mp4,praying,x,1\nd.mp4,2\n')
    with pytest.raises(ValueError, match='moments_categories.txt'): read_annotations('mit', file, tmp_path)
    assert [line for line, _ in complaints(read_annotations, 'mit', file, tmp_path, categories)] == [2, 3]
    manifest, _ = read_annotations('mit', write('one.csv', file.read_text().split('\n')[0]), tmp_path, categories)
    assert (manifest.name(0), manifest.labels.tolist()) == ('clapping/a, b.mp4', [1])
    assert manifest.columns['votes_for'].to_pylist() == [3]


def test_lists_are_read_as_manifests(write, tmp_path):
    table = pa.table(dict(path=['a/b.mp4', 'c'], label=[1, 0], fps=[12, 25]))
    parquet.write_table(table, tmp_path/'list.parquet')
    text, lines = write('list.txt', 'a/b c.mp4 1\nc 0\n'), write('list.jsonl', '{"path": "a", "label": 2, "fps": 3}\n')
    for file in (tmp_path/'list.parquet', text, lines):
        ours, theirs = read_annotations('list', file, tmp_path)[0], read_manifest(file, tmp_path)
        assert ours.paths == theirs.paths and ours.columns == theirs.columns
        assert ours.labels.tolist() == theirs.labels.tolist()
    bad = write('bad.csv', 'a.mp4,0\nb.mp4,\nc.mp4,2\n')
    assert complaints(read_annotations, 'list', bad, tmp_path, ['x', 'y'])[1] == (3, 'label 2: expected 0 to 1')


def test_numbers_as_classes(write, tmp_path):
    "Of a table that has Kinetics' columns"
    classes = ('a', 0), ('b', 12)
    rows = [{'youtube_id': name, 'time_start': 0, 'time_end': 10, 'label': label} for name, label in classes]
    manifest, names = read_annotations('kinetics', write('train.json', json.dumps(rows)), tmp_path)
    assert names == ['0', '12'] and manifest.labels.tolist() == [0, 1]
    unknown = complaints(read_annotations, 'kinetics', tmp_path/'train.json', tmp_path, ['0'])
    assert 'class 12 is none' in unknown[0][1]


def test_bad_arguments(write, tmp_path):
    file = write('train.csv', KINETICS + 'a,b,0,10,train\n')
    with pytest.raises(ValueError, match=f'expected one of .*{ANNOTATION_FORMATS[1]}'):
        read_annotations('kinetic', file, tmp_path)
    with pytest.raises(ValueError, match='different names'): read_annotations('kinetics', file, tmp_path, ['a', 'a'])
    with pytest.raises(ValueError, match='expected fields'):
        read_annotations('kinetics', file, tmp_path, layout='{}.mp4')
    assert 'format code' in complaints(read_annotations, 'kinetics', file, tmp_path, layout='{split:d}.mp4')[0][1]


def test_only_existing_looks_at_the_disk(write, tmp_path, monkeypatch):
    "And lists a folder once, however many clips are in it"
    root = tmp_path/'clips'
    for folder in ('abseiling', 'tai chi'): (root/folder).mkdir(parents=True)
    classes = 'abseiling', 'tai chi', 'gone'
    rows = [f'{classes[i % 3]},clip{i:02},0,10,train\n' for i in range(60)]
    file = write('train.csv', KINETICS + ''.join(rows))
    for name in ('realpath', 'exists', 'isfile'):
        monkeypatch.setattr(os.path, name, lambda path: pytest.fail(f'looks at {path}'))
    manifest, _ = read_annotations('kinetics', file, root, layout='{label}/{youtube_id}.mp4')
    for i in range(0, 30):
        if i % 3 < 2: (root/manifest.name(i)).touch()
    (root/manifest.name(30)).mkdir()                          # a folder is no clip,
    (root/manifest.name(31)).symlink_to(root/'nowhere.mp4')   # nor is a broken link,
    (root/manifest.name(33)).symlink_to(root/manifest.name(0))  # but a good one is
    calls, scandir = [], os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: (calls.append(path), scandir(path))[1])
    found, missing = existing_clips(manifest)
    assert sorted(calls) == sorted(f'{root}/{folder}' for folder in ('abseiling', 'tai chi', 'gone'))
    assert found.ids.tolist() == [i for i in range(30) if i % 3 < 2] + [33] and len(found) + len(missing) == 60
    assert missing[:2] == ['gone/clip02.mp4', 'gone/clip05.mp4']
    assert found.columns['youtube_id'].to_pylist()[-1] == 'clip33'


def test_from_annotations_to_samples(write, tmp_path):
    "Real clips under Kinetics' names; one of them is gone"
    specs = [emoji_scenes.clip_spec('train', i, num_objects=16, image_size=48, num_frames=6) for i in range(3)]
    rows = [f'{spec.lead.action},yt{i:09},{i},{i + 10},train\n' for i, spec in enumerate(specs)]
    train, names = read_annotations('kinetics', write('train.csv', KINETICS + ''.join(rows)), tmp_path/'clips')
    (tmp_path/'clips').mkdir()
    for i in (0, 2): emoji_motion.write_mp4(tmp_path/'clips'/train.name(i), emoji_scenes.render(specs[i]), fps=6)
    found, missing = existing_clips(train)
    assert missing == ['yt000000001_000001_000011.mp4']
    samples = [MediaDataset(found, 2)[0, i] for i in range(2)]
    assert [names[sample['label']] for sample in samples] == [specs[0].lead.action, specs[2].lead.action]
    assert samples[0]['video'].shape == (2, 3, 48, 48)
    shards = read_shards(write_shards(found, tmp_path/'shards'))
    assert existing_clips(shards) == (shards, [])
