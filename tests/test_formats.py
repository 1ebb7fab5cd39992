"Odd annotation files of others, by kind: encodings, headers, quotes, types, order, clashes, repeats, damage."
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from umt.core.delimited import ManifestError
from umt.data.annotations import read_annotations, read_classes
from umt.data.corpora import Corpus, build_corpora, find_corpora, read_published
from umt.data.formats import Format, find_format, format_names, row_format
from umt.data.galleries import GALLERIES, read_gallery

KINETICS = 'label,youtube_id,time_start,time_end,split\n'
WEBVID = 'videoid,contentUrl,duration,page_dir,name\n'
MSVD = 'VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n'


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        if not isinstance(content, (str, bytes)): content = json.dumps(content)
        (tmp_path/name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path/name
    return write


def complaints(call, *args, **kwargs):
    with pytest.raises(ManifestError) as e: call(*args, **kwargs)
    return e.value.rows


def pairs(gallery): return [(gallery.manifest.name(v), gallery.texts[t]) for t, v in gallery.pairs.tolist()]


def rows(m): return [(m.name(i), m.columns['caption'][i].as_py(), int(m.ids[i])) for i in range(len(m))]


def clips(m): return list(zip(m.paths.to_pylist(), m.labels.tolist()))


# ---- The registry

def test_a_format_is_one_function(tmp_path):
    row_format('tests', 'one', '{video}.mp4', counts=(1, 2))(lambda file: iter([(1, {'video': 'a'})]))
    form = find_format('tests', 'one')
    assert isinstance(form, Format) and form.facts == dict(counts=(1, 2)) and format_names('tests') == ('one', )
    assert list(form.read(tmp_path)) == [(1, {'video': 'a'})]
    with pytest.raises(ValueError, match='there already'): row_format('tests', 'one')(print)
    with pytest.raises(ValueError, match="test set 'on'.*did you mean 'one'"): find_format('tests', 'on', 'test set')
    assert format_names('labels') == ('list', 'kinetics', 'ssv2', 'mit')
    assert format_names('captions') == ('webvid', 'cc', 'coco', 'vg', 'sbu', 'img2dataset')
    assert all('\n' in form.read.__doc__ for use in ('labels', 'captions', 'retrieval') for name in format_names(use)
               if not name.startswith('ssv2_') for form in [find_format(use, name)]), 'each shows its first lines'


# ---- Class lists

TWO = ['abseiling', 'push, then pull']


@pytest.mark.parametrize('name, content', [
    ('k400.csv', 'id,name\n0,abseiling\n1,"push, then pull"\n'),
    ('swapped.csv', 'name,id\nabseiling,0\n"push, then pull",1\n'),
    ('spaces.csv', 'id, name\n0, abseiling\n1, "push, then pull"\n'),
    ('quoted.csv', '"id","name"\n"0","abseiling"\n"1","push, then pull"\n'),
    ('order.csv', 'id,name\n1,"push, then pull"\n0,abseiling\n'),
    ('headless.csv', '0,abseiling\n1,"push, then pull"\n'),
    ('unquoted.csv', '0,abseiling\n1,push, then pull\n'),
    ('last.txt', 'abseiling,0\npush, then pull,1\n'),
    ('tabs.tsv', '0\tabseiling\n1\tpush, then pull\n'),
    ('tabs_last.tsv', 'label\tindex\nabseiling\t0\npush, then pull\t1\n'),
    ('semicolons.csv', 'id;name\n0;abseiling\n1;push, then pull\n'),
    ('blank.txt', '0 abseiling\n1 push, then pull\n'),
    ('blank_last.txt', 'abseiling 0\npush, then pull 1\n'),
    ('names.txt', 'abseiling\n"push, then pull"\n'),
    ('windows.txt', b'\xef\xbb\xbf0,abseiling\r\n1,"push, then pull"\r\n\r\n'),
    ('utf16.csv', 'id,name\r\n0,abseiling\r\n1,"push, then pull"\r\n'.encode('utf-16')),
    ('colons.txt', 'abseiling: 0\npush, then pull: 1\n'), ('colon_first.txt', '0: abseiling\n1: push, then pull\n'),
    ('dots.txt', '0. abseiling\n1. push, then pull\n'), ('dashes.txt', '0 - abseiling\n1 - push, then pull\n'),
    ('brackets.txt', '0) abseiling\n1) push, then pull\n'), ('bars.txt', '0|abseiling\n1|push, then pull\n'),
    ('floats.csv', '0.0,abseiling\n1.0,"push, then pull"\n'),
    ('index.csv', ',name\n0,abseiling\n1,"push, then pull"\n'),
    ('list.json', ['abseiling', 'push, then pull']),
    ('names.json', {'push, then pull': 1, 'abseiling': '0'}),
    ('numbers.json', {'1': 'push, then pull', '0': 'abseiling'}),
    ('quotes.json', {'"abseiling"': 0, '"push, then pull"': 1}), # as PyTorchVideo has Kinetics' names
    ('bom.json', b'\xef\xbb\xbf{"abseiling": 0, "push, then pull": 1}')])
def test_class_lists_of_every_form(write, name, content): assert read_classes(write(name, content)) == TWO


@pytest.mark.parametrize('content, names', [
    ('class 0\nclass 1\n', ['class 0', 'class 1']), # what differs is the number alone, so it belongs to the name
    ('3 point shot\nabseiling\nyoga\n', ['3 point shot', 'abseiling', 'yoga']),
    ('12,0\n10,1\n', ['12', '10']), ('0,12\n1,10\n', ['12', '10']), # numbers as names
    ('say "cheese"\n12" pipe\n', ['say "cheese"', '12" pipe'])])
def test_what_looks_like_an_index_and_is_none(write, content, names):
    assert read_classes(write('classes.txt', content)) == names


@pytest.mark.parametrize('name, content, lines', [
    ('gap.csv', 'id,name\n0,a\n2,b\n', [3]), ('empty.csv', 'id,name\n', [1]),
    ('from_one.csv', 'id,name\n1,a\n2,b\n', [3]),
    ('from_one.txt', '1 ApplyEyeMakeup\n2 ApplyLipstick\n', [2]),
    ('from_one_last.txt', 'Boxing 1\nGolf 2\n', [2]),
    ('twice.csv', 'id,name\n0,a\n1,b\n1,c\n', [4]),
    ('same.csv', 'id,name\n0,a\n1,a\n', [3]),
    ('missing.csv', 'id,name\n0,a\n1,b\nc\n', [4]),
    ('other_header.csv', 'number of it,what\n0,a\n1,b\n', [1]),
    ('header.txt', 'class_name\na\nb\n', [1]), ('audio.csv', 'mid,display_name\n/m/0a,a\n/m/0b,b\n', [1]),
    ('three.csv', ',label,id\n0,a,0\n1,b,1\n', [1]), ('headless_three.csv', '0,a,x\n1,b,y\n', [1]),
    ('three.tsv', '0\ta\tx\n1\tb\ty\n', [1, 2]), ('comment.txt', '# mine\na\nb\n', [1]),
    ('trailing.txt', 'a,\nb,\n', [1, 2]), ('json.txt', '["a", "b"]\n', [1]),
    ('forms.txt', 'caf\u00e9\ncafe\u0301\n', [2]),
    ('marks.txt', 'a\n\ufeffb\n', [2]), ('unseen.txt', 'a\u200b\na\n', [1]), ('line.txt', 'a\u2028b\nc\n', [1]),
    ('zero.json', ['a\0', 'b'], [1]), ('spaces.json', [' a', 'a'], [1]),
    ('stray.csv', 'id,name\n0,"a\n1,b\n2,c\n', [2]),
    ('latin.txt', 'a\ncafé\n'.encode('latin-1'), [2]),
    ('zero.txt', b'a\n\0\n', [2]),
    ('long.txt', f'a,{"9" * 5000}\nb,0\n', [1]),
    ('twice.json', '{"a": 0, "b": 1, "a": 2}', [1]),
    ('gap.json', {'0': 'a', '2': 'b'}, [1, 1]),
    ('types.json', {'0': ['a'], '1': 'b'}, [1]),
    ('deep.json', '[' * 100_000, [1]),
    ('nan.json', '{"a": NaN}', [1]),
    ('long.json', f'{{"a": {"9" * 5000}}}', [1])])
def test_class_lists_that_do_not_add_up(write, name, content, lines):
    assert [line for line, _ in complaints(read_classes, write(name, content))] == lines


# ---- Labels: Kinetics

@pytest.mark.parametrize('content', ['"abseiling","a","0","10","train"\n',
                                     'abseiling,a,0,10,train\nyoga,b,0,10,train\n'])
def test_a_header_of_kinetics_that_is_missing(write, tmp_path, content):
    assert 'header' in complaints(read_annotations, 'kinetics', write('k.csv', content), tmp_path)[0][1]


@pytest.mark.parametrize('header, part', [
    ('class,youtube_id,time_start,time_end,split', "is it 'class'?"),
    ('label,video_id,time_start,time_end,split', 'video_id'),
    ('label,youtube_id,start,end,split', "no 'time_start'"),
    ('Label,YouTube_ID,Time_Start,Time_End,Split', 'youtube_id'),
    ('label,youtube_id,time_start,time_end,label', "several columns 'label'")])
def test_other_headers_of_kinetics(write, tmp_path, header, part):
    file = write('k.csv', header + '\nabseiling,a,0,10,train\n')
    assert any(part in wrong for _, wrong in complaints(read_annotations, 'kinetics', file, tmp_path))


@pytest.mark.parametrize('content', [
    'label, youtube_id, time_start, time_end, split\nabseiling, a, 0, 10, train\n',
    'split,is_cc,time_end,time_start,youtube_id,label\ntrain,0,10,0,a,abseiling\n',
    KINETICS + '"abseiling","a",0,10,train\n',
    ('\ufeff' + KINETICS + 'abseiling,a,0,10,train\n').replace('\n', '\r\n'),
    (KINETICS + 'abseiling,a,0,10,train\n').encode('utf-16')])
def test_kinetics_as_spreadsheets_write_it(write, tmp_path, content):
    assert clips(read_annotations('kinetics', write('k.csv', content), tmp_path)[0]) == [('a_000000_000010.mp4', 0)]


def test_a_stray_quote_swallows_no_row(write, tmp_path):
    clean = ''.join(f'abseiling,{name},0,10,train\n' for name in 'abc')
    for text in (clean.replace('abseiling,b', '"abseiling,b'), clean.replace(',b,', ',"b,'),
                 clean.replace('abseiling,a', '"abseiling,a').replace('abseiling,c', '"abseiling,c')):
        assert complaints(read_annotations, 'kinetics', write('k.csv', KINETICS + text), tmp_path)


@pytest.mark.parametrize('change, part', [
    (dict(label=.5), "expected a class's name"), (dict(label=True), "expected a class's name"),
    (dict(label=['x']), "expected a class's name"), (dict(label=''), 'no class'), (dict(label=None), 'no class'),
    (dict(youtube_id=1.5), 'expected text'), (dict(youtube_id=None), "no 'youtube_id'"),
    (dict(time_start=True), 'whole number'), (dict(time_end='x'), 'whole number'), (dict(time_end=-1), 'whole number')])
def test_wrong_types_in_kinetics(write, tmp_path, change, part):
    good = dict(label='abseiling', youtube_id='a', time_start=0, time_end=10)
    (line, wrong), = complaints(read_annotations, 'kinetics', write('k.json', [good, good | change]), tmp_path)
    assert part in wrong


@pytest.mark.parametrize('label', ['nan', 'None', 'Abseiling', '1.0'])
def test_classes_that_nobody_has_listed(write, tmp_path, label):
    file = write('k.csv', KINETICS + f'abseiling,a,0,10,train\n{label},b,0,10,train\nabseiling ,c,0,10,train\n')
    assert len(complaints(read_annotations, 'kinetics', file, tmp_path)) > 0
    assert clips(read_annotations('kinetics', file, tmp_path, ['abseiling', label])[0])[2][1] == 0


def test_ids_that_a_spreadsheet_has_changed(write, tmp_path):
    for name in ('#NAME?', '1.00E+05', '../x', 'x y', 'https://youtu.be/x'):
        file = write('k.csv', KINETICS + f'abseiling,{name},0,10,train\n')
        assert "expected a video's id" in complaints(read_annotations, 'kinetics', file, tmp_path)[0][1]
        file = write('m.csv', MSVD + f'{name},1,2,3,clean,5,English,a bird\n')
        assert "expected a video's id" in complaints(read_gallery, 'msvd', file, tmp_path)[0][1]


def test_one_place_is_one_clip(write, tmp_path, caplog):
    file = write('k.csv', KINETICS + 'x,a,0,10,train\ny,a,10,20,train\n')
    (line, wrong), = complaints(read_annotations, 'kinetics', file, tmp_path, layout='{youtube_id}.mp4')
    assert line == 3 and 'two clips' in wrong and 'a.mp4' in wrong
    file = write('k.csv', KINETICS + 'x,a,0,10,train\ny,a,0,10,train\n')
    assert clips(read_annotations('kinetics', file, tmp_path)[0])[1] == ('a_000000_000010.mp4', 1)
    assert '1 clips are there again with another class' in caplog.text


def test_lists_with_the_names_of_classes(write, tmp_path):
    file, names = write('list.csv', 'a.mp4,yoga\nb.mp4,abseiling\n'), write('names.txt', 'abseiling\nyoga\n')
    assert clips(read_annotations('list', file, tmp_path, names)[0]) == [('a.mp4', 1), ('b.mp4', 0)]
    wrong = complaints(read_annotations, 'list', write('list.csv', 'a.mp4,yoha\n'), tmp_path, names)
    assert "'yoha'" in wrong[0][1]


# ---- Labels: Something-Something, Moments in Time

def test_ids_are_text(write, tmp_path):
    entries = [dict(id=i, label='x', template='Holding [something]') for i in (1, '2', '3.webm', 0)]
    manifest, _ = read_annotations('ssv2', write('ss.json', entries), tmp_path, ['Holding something'])
    assert clips(manifest) == [(f'{i}.webm', 0) for i in (1, 2, 3, 0)]
    for kind in ('ssv2_label', 'ssv2_template'):
        found = pairs(read_gallery(kind, write('ss.json', entries), tmp_path))
        assert [video for video, _ in found] == ['1.webm', '2.webm', '3.webm', '0.webm']
    for wrong in (1.0, True, None, ['1'], ' ', {}, '1;x'):
        bad = write('bad.json', [*entries, dict(id=wrong, label='x', template='Holding [something]')])
        assert len(complaints(read_annotations, 'ssv2', bad, tmp_path, ['Holding something'])) == 1
        assert len(complaints(read_gallery, 'ssv2_label', bad, tmp_path)) == 1


@pytest.mark.parametrize('content', ['1;Holding something\n2;Putting something onto something\n',
                                     '100218;Something falling like a feather, or paper\n'])
def test_something_something_v1_is_refused_by_name(write, tmp_path, content):
    file = write('something-something-v1-train.csv', content)
    assert 'Something-Something V1' in complaints(read_annotations, 'ssv2', file, tmp_path, ['x'])[0][1]
    assert 'Something-Something V1' in complaints(read_gallery, 'ssv2_label', file, tmp_path)[0][1]


def test_labels_without_templates_are_no_test_list(write, tmp_path):
    file = write('train.json', [dict(id='1', label='holding a cup')])
    assert "no 'template'" in complaints(read_annotations, 'ssv2', file, tmp_path, ['x'])[0][1]
    for template in (3, ['Holding'], ' '):
        file = write('train.json', [dict(id='1', label='x', template=template)])
        assert complaints(read_annotations, 'ssv2', file, tmp_path, ['x'])


def test_moments_with_fewer_or_other_fields(write, tmp_path):
    for content in ('clapping/a.mp4,clapping\n', 'clapping/a.mp4,clapping,many,0\n', 'clapping/a.mp4,clapping,3,0,1\n'):
        assert complaints(read_annotations, 'mit', write('m.csv', content), tmp_path, ['clapping'])


# ---- Captions: WebVid, Conceptual Captions

@pytest.mark.parametrize('content', [
    '1,http://x,PT1S,000_001,"a dog\n2,http://y,PT2S,000_001,a cat\n3,http://y,PT2S,000_001,a cow\n',
    '1,http://x,PT1S,000_001,"the\n2,http://y,PT2S,000_001,a cat\n3,http://y,PT2S,000_001,"a cow\n',
    '1,http://x,PT1S,000_001,a dog\n2,"http://y,PT2S,000_001,a cat\n3,http://y,PT2S,000_001,a cow\n'])
def test_webvid_with_a_quote_that_does_not_close(write, content):
    assert complaints(read_published, 'webvid', write('w.csv', WEBVID + content))


@pytest.mark.parametrize('content', [
    WEBVID + '1,u,d,p,"A dog, ""running""\nfast"\n2,u,d,p,Sea\n',
    ('\ufeff' + WEBVID + '1,u,d,p,"A dog, ""running""\nfast"\n2,u,d,p,Sea\n').replace('\n', '\r\n'),
    'name,page_dir,videoid\n"A dog, ""running""\nfast",p,1\nSea,p,2\n',
    (WEBVID + '1,u,d,p,"A dog, ""running""\nfast"\n2,u,d,p,Sea\n').encode('utf-16')])
def test_webvid_as_it_may_be_written(write, content):
    found = rows(read_published('webvid', write('w.csv', content)))
    assert found == [('p/1.mp4', 'A dog, "running"\nfast', 0), ('p/2.mp4', 'Sea', 1)]


@pytest.mark.parametrize('content, line, part', [
    (WEBVID + '1,u,d,p,x\n,u,d,p,y\n', 3, 'videoid'), (WEBVID + '1.0,u,d,p,x\n', 2, "videoid '1.0'"),
    (WEBVID + '1,u,d,,x\n', 2, "no 'page_dir'"), (WEBVID + '1,u,d,p\n', 2, 'expected 5 fields'),
    (WEBVID + '1,u,d,p,caf\xe9\n', 2, 'UTF-8'), (WEBVID + '../../1,u,d,p,x\n', 2, 'videoid'),
    ('1,u,d,p,x\n2,u,d,p,y\n', 1, 'videoid'), ('videoid,page_dir,caption\n1,p,x\n', 1, 'name'),
    (WEBVID, 1, 'no rows')])
def test_webvid_that_is_damaged(write, content, line, part):
    data = content.encode('latin-1')
    assert any(n == line and part in wrong for n, wrong in complaints(read_published, 'webvid', write('w.csv', data)))


def test_two_media_are_never_one(write, tmp_path):
    "Whatever the layout leaves out"
    same = ['http://a/1/x.jpg', 'http://b/2/x.jpg', 'http://a/1/x.jpg']
    sbu = write('sbu.json', dict(image_urls=same, captions=['dog', 'cat', 'the dog']))
    (line, wrong), = complaints(read_published, 'sbu', sbu)
    assert line == 2 and all(part in wrong for part in (*same[:2], "'x.jpg'", 'layout'))
    found = rows(read_published('sbu', sbu, layout='{index}_{name}'))
    assert [name for name, _, _ in found] == ['0_x.jpg', '1_x.jpg', '2_x.jpg']
    assert [i for _, _, i in rows(read_published('sbu', sbu, layout='{crc32}.jpg'))] == [0, 1, 0]
    cc = write('cc.tsv', ''.join(f'a thing\t{url}\n' for url in same))
    assert complaints(read_published, 'cc', cc, layout='{name}')[0][0] == 2
    images = [dict(id=i, file_name='x.jpg') for i in (1, 2)]
    coco = write('coco.json', dict(images=images, annotations=[dict(image_id=i, caption='x') for i in (1, 2)]))
    assert 'both lie at' in complaints(read_published, 'coco', coco)[0][1]
    webvid = write('w.csv', WEBVID + '1,u,d,p,x\n2,u,d,p,y\n')
    assert 'both lie at' in complaints(read_published, 'webvid', webvid, layout='{page_dir}.mp4')[0][1]
    vg = write('vg.json', [dict(id=i, regions=[dict(phrase='x')]) for i in (1, 2)])
    assert 'both lie at' in complaints(read_published, 'vg', vg, layout='{folder}.jpg')[0][1]


@pytest.mark.parametrize('content', [b'\xef\xbb\xbfhttp://h/d.jpg\ta dog\r\n', b'\xef\xbb\xbfa dog\thttp://h/d.jpg\n',
                                     'url\tcaption\nhttp://h/d.jpg\ta dog\n',
                                     'a dog\thttp://h/d.jpg\n'.encode('utf-16')])
def test_conceptual_captions_with_marks(write, content):
    assert rows(read_published('cc', write('cc.tsv', content), layout='{name}')) == [('d.jpg', 'a dog', 0)]


@pytest.mark.parametrize('content, line', [
    ('title\taddress\na dog\thttp://h/d.jpg\n', 1), ('a dog\thttp://h/d.jpg\nhttp://h/e.jpg\ta cat\n', 2),
    ('a dog\thttp://h/d.jpg\na cat\t\n', 2), ('a dog\n', 1), ('a\tb\tc\n', 1)])
def test_conceptual_captions_with_other_columns(write, content, line):
    assert line in [n for n, _ in complaints(read_published, 'cc', write('cc.tsv', content), layout='{index}.jpg')]


# ---- Captions: JSON

IMAGES = [dict(id=9, file_name='9.jpg'), dict(id=4, file_name='4.jpg')]


@pytest.mark.parametrize('images, notes, part', [
    (['9.jpg'], [], 'image 1: expected an object'), ([dict(file_name='9.jpg')], [], "no 'id'"),
    ([dict(id=9.5, file_name='9.jpg')], [], 'id 9.5'),
    ([*IMAGES, dict(id='9', file_name='x.jpg')], [], 'there already'),
    ([*IMAGES, dict(id=9, file_name='x.jpg')], [], 'image 3: id 9 is there already'),
    (IMAGES, ['a cup'], 'annotation 1: expected an object'), (IMAGES, [dict(image_id=9)], "no 'caption'"),
    (IMAGES, [dict(image_id=9, caption=3)], 'caption 3: expected text'),
    (IMAGES, [dict(image_id=9, caption=None)], 'caption None: expected text'),
    (IMAGES, [dict(image_id=9, caption=['a', 'b'])], 'expected text'),
    (IMAGES, [dict(image_id=5, caption='x')], 'image_id 5 is none'),
    (IMAGES, [dict(image_id=[9], caption='x')], 'image_id [9]'),
    (IMAGES, [dict(image_id=True, caption='x')], 'image_id True'),
    ([dict(id=9)], [dict(image_id=9, caption='x')], 'path None'),
    (IMAGES, [dict(image_id=9, caption='\ud800')], 'surrogate')])
def test_coco_with_entries_of_other_types(write, images, notes, part):
    found = complaints(read_published, 'coco', write('coco.json', dict(images=images, annotations=notes)))
    assert any(part in wrong for _, wrong in found)


def test_ids_of_pictures_may_be_text(write):
    "As in TextCaps; and partly text"
    images = [dict(id='f1', file_name='a.jpg'), dict(id=7, file_name='b.jpg')]
    notes = [dict(image_id='7', caption='x'), dict(image_id='f1', caption='y'), dict(image_id=7, caption='z')]
    found = rows(read_published('coco', write('coco.json', dict(images=images, annotations=notes))))
    assert found == [('b.jpg', 'x', 0), ('a.jpg', 'y', 1), ('b.jpg', 'z', 0)]


@pytest.mark.parametrize('layout', ['{id:d}.jpg', '{nothing}.jpg', '{}.jpg', '{id.x}.jpg', '{id'])
def test_layouts_that_do_not_fit(write, layout):
    images, notes = [dict(id='f1', file_name='a.jpg')], [dict(image_id='f1', caption='x')]
    file = write('coco.json', dict(images=images, annotations=notes))
    with pytest.raises(ValueError): read_published('coco', file, layout=layout)
    if layout != '{id:d}.jpg':
        with pytest.raises(ValueError): read_published('webvid', write('w.csv', WEBVID + '1,u,d,p,x\n'), layout=layout)


@pytest.mark.parametrize('image, part', [
    ('x', 'expected an object'), (dict(split='dev', sentences=[]), "split 'dev'"), (dict(sentences=[]), 'split None'),
    (dict(filename='x.jpg', split='train'), 'list of sentences'),
    (dict(filename='x.jpg', split='train', sentences=['x']), None),
    (dict(filename=3, split='train', sentences=[dict(raw=4)]), 'caption 4'),
    (dict(split='train', sentences=[dict(raw='x')]), None)])
def test_karpathys_split_with_entries_of_other_types(write, image, part):
    good = dict(filename='a.jpg', split='train', sentences=[dict(raw='a')])
    found = complaints(read_published, 'coco', write('coco.json', dict(images=[good, image])))
    assert found and (part is None or part in found[0][1])


@pytest.mark.parametrize('entry, part', [
    (3, 'expected an object'), (dict(id=1), "no list 'regions'"), (dict(id=1, regions={}), "no list 'regions'"),
    (dict(id=1, regions=['x']), 'expected text'), (dict(id=1, regions=[dict(phrase=3)]), 'expected text'),
    (dict(id=1, regions=[{}]), 'expected text'), (dict(id=1.5, regions=[dict(phrase='x')]), 'image_id 1.5'),
    (dict(regions=[dict(phrase='x')]), 'image_id None')])
def test_visual_genome_with_entries_of_other_types(write, entry, part):
    good = dict(id=7, regions=[dict(phrase='x')])
    file = write('vg.json', f'[{json.dumps(good)},\n{json.dumps(entry)}]')
    (line, wrong), = complaints(read_published, 'vg', file)
    assert line == 2 and part in wrong


@pytest.mark.parametrize('content, part', [
    (dict(image_urls=['http://a/b.jpg', 3], captions=['x', 'y']), "url '3'"),
    (dict(image_urls=['http://a/b.jpg', None], captions=['x', 'y']), 'url None'),
    (dict(image_urls=['http://a/b.jpg'], captions=[['x']]), 'expected text'),
    (dict(image_urls='http://a/b.jpg', captions=['x']), 'expected an object with lists'),
    (dict(urls=['http://a/b.jpg'], captions=['x']), "found an object of ['urls', 'captions']"),
    (dict(image_urls=['a.jpg'], captions=['x']), 'expected an address'), ([], 'found a list'), ('', 'not JSON')])
def test_sbu_of_other_types(write, content, part):
    found = complaints(read_published, 'sbu', write('sbu.json', content if content != '' else b''))
    assert part is None or part in found[0][1]


@pytest.mark.parametrize('kind', ['coco', 'vg', 'sbu'])
@pytest.mark.parametrize('content', ['[' * 100_000, '{"images": ' + '[' * 100_000, '[1, 2', '{"a": NaN}', '9' * 5000,
                                     b'{"images": "caf\xe9"}', b'PK\3\4', '', 'null', '"text"'])
def test_what_is_not_json(write, kind, content): assert complaints(read_published, kind, write('x.json', content))


# ---- Captions: folders of img2dataset

@pytest.fixture
def web(tmp_path):
    def shard(name, keys, files=None, **columns):
        (tmp_path/'web'/name).mkdir(parents=True)
        for file in files if files is not None else [f'{key}.jpg' for key in keys]: (tmp_path/'web'/name/file).touch()
        table = dict(key=keys, caption=[f'picture {key}' for key in keys], status=['success'] * len(keys)) | columns
        table = pa.table({column: values for column, values in table.items() if values})
        parquet.write_table(table, tmp_path/f'web/{name}.parquet')
        return tmp_path/'web'
    return shard


def test_what_downloads_lack_is_counted(web, caplog):
    web('00000', ['a', 'b', 'c'], ['a.JPG', 'b.txt', 'a.json'])
    web('00001', ['d.e', 'f', 'g'], ['d.e.webp', 'g.mp4'], status=['success', 'failed_to_download', 'success'],
        caption=['x', 'y', None])
    (folder := web('00002', ['h']))
    (folder/'00002.parquet').unlink()
    found = rows(read_published('img2dataset', folder))
    assert found == [('00000/a.JPG', 'picture a', 0), ('00001/d.e.webp', 'x', 1)]
    for part in ('1 downloads had failed', '2 files are not there and are left out, such as 00000/b',
                 '1 folders have no table', '1 of 3 rows have no caption'):
        assert part in caplog.text, part


@pytest.mark.parametrize('options, part', [
    (dict(key=[0, 1]), 'key: int64, not text'), (dict(caption=[]), "no column 'caption'"),
    (dict(status=[]), "no column 'status'"),
    (dict(caption=[['x'], ['y']]), 'caption: '), (dict(key=['a', 'a']), "key 'a' twice"),
    (dict(files=['a.jpg', 'a.png', 'b.jpg']), "key 'a' twice"), (dict(files=[]), 'no rows')])
def test_tables_of_another_form(web, options, part):
    found = complaints(read_published, 'img2dataset', web('00000', ['a', 'b'], **options))
    assert part in found[0][1] and (part == 'no rows' or '00000.parquet' in found[0][1])


def test_a_table_without_rows(web):
    folder = web('00000', ['a'])
    empty = pa.table({name: pa.array([], pa.string()) for name in ('key', 'caption', 'status')})
    parquet.write_table(empty, folder/'00001.parquet')
    assert rows(read_published('img2dataset', folder)) == [('00000/a.jpg', 'picture a', 0)]


def test_every_damaged_table_is_named(web, tmp_path):
    for name in ('00000', '00001', '00002'): folder = web(name, ['a'])
    whole = (folder/'00001.parquet').read_bytes()
    for data in (b'', b'PAR1', whole[:-9], whole[:4] + b'\xff' * (len(whole) - 12) + whole[-8:]):
        for name in ('00000', '00001'): (folder/f'{name}.parquet').write_bytes(data)
        found = complaints(read_published, 'img2dataset', folder)
        assert [wrong.split(':')[0] for _, wrong in found] == ['00000.parquet', '00001.parquet']
    (tmp_path/'tars').mkdir()
    (tmp_path/'tars/00000.tar').touch()
    assert 'tar files' in complaints(read_published, 'img2dataset', tmp_path/'tars')[0][1]
    assert 'expected a folder' in complaints(read_published, 'img2dataset', folder/'00002.parquet')[0][1]


# ---- Names of corpora

def test_a_file_with_a_colon(write, tmp_path):
    entries = [dict(video='a.mp4', caption='x')]
    write('video:p:1.json', entries), write('p:1.json', entries), write('q:r', b'')
    (tmp_path/'clips').mkdir()
    for name in ('video:p:1.json', 'video: p:1.json', ' video:p:1.json'):
        assert len(build_corpora(name, tmp_path, 'keep')['video'][0]) == 1
    for name, root in (('video:p:1.json:clips', 'clips'), ('video:video:p:1.json:clips', 'clips')):
        corpus, = find_corpora(name)
        assert corpus.read(tmp_path).root == str(tmp_path/root)
    corpus = Corpus('mine', 'video', 'p', '1.json') # as somebody may write it who divides at every colon
    assert corpus.read(tmp_path).paths.to_pylist() == ['a.mp4']
    corpus, = find_corpora('video:z:1.json')
    with pytest.raises(FileNotFoundError, match='expected its captions'): corpus.read(tmp_path)


def test_spaces_between_corpora(write, tmp_path):
    for i in (1, 2): write(f'p{i}.json', [dict(video=f'{i}.mp4', caption='x')])
    for names in ('video:p1.json, video:p2.json', ' video:p1.json ,video:p2.json ',
                  ['video:p1.json', ' video:p2.json']):
        assert len(build_corpora(names, tmp_path, 'keep')['video']) == 2
    assert [c.name for c in find_corpora('coco, vg,\nsbu')] == ['coco', 'vg', 'sbu']
    for wrong in ('coco,', 'coco,,vg', ' ', [None], [3], 'video:', 'video: '):
        with pytest.raises(ValueError, match='expected one of'): find_corpora(wrong)


# ---- Test sets for retrieval

SCENE = '1_Film_00.00.01.000-00.00.01.900'


@pytest.mark.parametrize('kind, content, bad', [
    ('didemo', [dict(video='a.avi', description='x'), 'a string'], [1]),
    ('didemo', [dict(video=3, description='x')], [1]), ('didemo', [dict(video=['a'], description='x')], [1]),
    ('didemo', [dict(video='a.avi', description=None)], [1]), ('didemo', [dict(video='a.avi')], [1]),
    ('didemo', [dict(video='a.avi', description=['x', 'y'])], [1]), ('didemo', [None], [1]),
    ('msrvtt', dict(sentences=[dict(video_id='a', caption='x'), 'b', [], None]), [2, 3, 4]),
    ('msrvtt', dict(sentences=[dict(video_id=1, caption='x'), dict(video_id={}, caption='x')]), [1, 2]),
    ('msrvtt', dict(sentences=[dict(video_id='a', caption=3), dict(video_id='a')]), [1, 2]),
    ('msrvtt', dict(sentences={}), [1]), ('msrvtt', [1], [1]), ('msrvtt', dict(annotations=[]), [1]),
    ('msrvtt', 'video_id,sentence\na,\nb,x\n,y\n', [2, 4]), ('msrvtt', 'video,sentence\na,x\n', None),
    ('msrvtt', 'video_id,caption\na,x\n', [2]), ('msrvtt', 'video_id,sentence\n"a,x\nb,y\nc,z\n', None),
    ('activitynet', dict(v_a='x'), [1]), ('activitynet', dict(v_a=['x']), [1]), ('activitynet', dict(v_a=dict()), [1]),
    ('activitynet', dict(v_a=dict(sentences='x')), [1]), ('activitynet', dict(v_a=dict(sentences=[3])), [1]),
    ('activitynet', dict(v_a=dict(sentences=['x'], timestamps=[])), [1]),
    ('activitynet', dict(v_a=dict(sentences=['x'], timestamps=['0'])), [1]),
    ('activitynet', dict(v_a=dict(sentences=['x', 'y'], timestamps=[[0, 1], [None, 2]])), [1]),
    ('activitynet', '{"v_a": {"sentences": ["x"]}, "v_a": {"sentences": ["y"]}}', [1]),
    ('lsmdc', f'{SCENE}\t0\t0\t0\t0\n', [1]), ('lsmdc', f'{SCENE}\t0\t0\t0\t0\t \n', [1]),
    ('lsmdc', f'\t0\t0\t0\t0\tx\n{SCENE}\t0\t0\t0\t0\tx\n', [1]),
    ('lsmdc', f'{SCENE}\t0\t0\t0\t0\tcaf\xe9\n'.encode('latin-1'), [1]),
    ('msvd', 'a_1_2 x\nb_3_4\n', [2]), ('msvd', 'a_1_2 caf\xe9\n'.encode('latin-1'), [1]),
    ('json', ['x', dict(video='a.mp4', caption='y')], [1]), ('json', [dict(video=[], caption='y')], [1]),
    ('json', [dict(video=None, caption='y')], [1]), ('json', [dict(video=[['a']], caption='y')], [1]),
    ('json', [dict(video='a', caption={})], [1]), ('json', '{"video": "a"}{"video": "b"}', [1])])
def test_rows_of_another_type(write, tmp_path, kind, content, bad):
    is_json = not isinstance(content, (str, bytes)) or content[:1] == '{'
    ending = 'json' if is_json else 'csv' if kind == 'msrvtt' else 'txt'
    found = complaints(read_gallery, kind, write(f'x.{ending}', content), tmp_path)
    assert found if bad is None else [line for line, _ in found] == bad, found


@pytest.mark.parametrize('kind', GALLERIES)
@pytest.mark.parametrize('content', [
    '[' * 100_000, '{"a": ' * 100_000, '9' * 5000, '[3]', '{"a": 3}', '', 'null', 'NaN'])
def test_whatever_json_there_is(write, tmp_path, kind, content):
    assert complaints(read_gallery, kind, write('x.json', content), tmp_path)


def test_sentences_are_in_the_order_of_their_times(write, tmp_path):
    def read(times, sentences=('then y', 'first x')):
        about = dict(sentences=list(sentences), timestamps=times)
        return read_gallery('activitynet', write('a.json', {'v_1': about}), tmp_path, paragraph=True).texts
    assert read([[5, 9], [0, 4]]) == read([[10, 11.5], [9.5, 20]]) == ['first x then y']
    assert read([[0, 9], [0, 4]]) == read([[1, 2], [1, 2]]) == ['then y first x'], 'at one time: as they are'
    assert read(None) == ['then y first x']


@pytest.mark.parametrize('content', ['video1\nvideo2\n', '\ufeffvideo1\r\nvideo2\r\n', ' video1 \n\n\tvideo2 \t\r\n\n',
                                     'video1\rvideo2', 'video1\nvideo2'.encode('utf-16')])
def test_split_lists_as_editors_write_them(write, tmp_path, content):
    file = write('m.csv', 'video_id,sentence\nvideo1,a dog\nvideo3,a cow\nvideo2,a cat\n')
    gallery = read_gallery('msrvtt', file, tmp_path, write('split.txt', content))
    assert pairs(gallery) == [('video1.mp4', 'a dog'), ('video2.mp4', 'a cat')]


@pytest.mark.parametrize('content', [b'caf\xe9\n', '', '\n \n', 'video_id\nvideo1\n', b'\0\0'])
def test_split_lists_that_are_none(write, tmp_path, content):
    file = write('m.csv', 'video_id,sentence\nvideo1,a dog\n')
    found = complaints(read_gallery, 'msrvtt', file, tmp_path, write('split.txt', content))
    assert [n for n, _ in found] == [1]
    assert 'folder' in complaints(read_gallery, 'msrvtt', file, tmp_path, tmp_path)[0][1]


def test_names_of_videos(write, tmp_path):
    "With the ending that the layout has, too; two of them are never one"
    file = write('m.csv', 'video_id,sentence\nvideo1.mp4,a dog\nvideo2,a cat\n')
    assert [video for video, _ in pairs(read_gallery('msrvtt', file, tmp_path))] == ['video1.mp4', 'video2.mp4']
    file = write('d.json', '[{"video": "a.avi", "description": "x"},\n{"video": "a.mov", "description": "y"}]')
    (line, wrong), = complaints(read_gallery, 'didemo', file, tmp_path, layout='{stem}.mp4')
    assert line == 2 and "'a.avi' and 'a.mov'" in wrong


def test_msvds_corpus(write, tmp_path, caplog):
    def read(content): return pairs(read_gallery('msvd', write('c.csv', content), tmp_path))
    said = 'id,5,15,1,clean,9,English,a dog\nid,5,15,2,clean,9,German,ein Tier\nid,5,15,3,clean,9,English,\n'
    assert read(MSVD + said) == [('id_5_15.avi', 'a dog')] and '1 English descriptions are empty' in caplog.text
    assert read(('\ufeff' + MSVD + said).replace('\n', '\r\n')) == [('id_5_15.avi', 'a dog')]
    for wrong in (MSVD.replace('Language', 'Lang') + said, MSVD.replace('Start', 'Begin') + said, said,
                  MSVD + said.replace('5,15,1', ',15,1'),
                  MSVD + said + 'id,5,15,3,clean,9,English,"a cat\nid,1,2,3,c,9,English,b\n'):
        assert complaints(read, wrong)


def test_msvds_languages_and_times(write, tmp_path):
    said = MSVD + 'x,1,2,3,clean,5,english,a bird\nx,1,2,3,clean,5,ENGLISH ,a cow\nx,1,2,3,clean,5,French,une vache\n'
    assert [text for _, text in pairs(read_gallery('msvd', write('c.csv', said), tmp_path))] == ['a bird', 'a cow']
    for row in ('x,1,2,3,clean,5,,a bird\n', 'x,1.0,2.0,3,clean,5,English,a bird\n'):
        assert [n for n, _ in complaints(read_gallery, 'msvd', write('c.csv', said + row), tmp_path)] == [5]


def test_lsmdcs_headers_and_names(write, tmp_path):
    for header in ('<CLIP_ID>\ta\tb\tc\td\te\n', 'CLIP_ID\ta\tb\tc\td\te\n', 'clip_id\ta\tb\tc\td\te\n'):
        assert len(read_gallery('lsmdc', write('l.txt', header + f'{SCENE}\t0\t0\t0\t0\tx\n'), tmp_path).texts) == 1
    for name in ('foo', SCENE.replace('-', '_')):
        assert complaints(read_gallery, 'lsmdc', write('l.txt', f'{name}\t0\t0\t0\t0\tx\n'), tmp_path)[0][0] == 1


@pytest.mark.parametrize('second', ['./a.mp4', 'a', 'x/../a.mp4'])
def test_one_file_is_one_video(write, tmp_path, second):
    file = write('g.json', [dict(video='a.mp4', caption='x'), dict(video=second, caption='y')])
    assert 'is the place of two videos' in complaints(read_gallery, 'json', file, tmp_path)[0][1]


@pytest.mark.parametrize('text', ['x\ud83d', 'x\0'])
def test_texts_that_nothing_can_hold(write, tmp_path, text):
    for kind, entry in (('json', dict(video='a.mp4', caption=text)), ('didemo', dict(video='a.mp4', description=text))):
        assert complaints(read_gallery, kind, write('g.json', [entry]), tmp_path)


@pytest.mark.parametrize('separator', [';', '\t', '|'])
def test_separators_of_other_countries(write, tmp_path, separator):
    text = f'\nkey{separator}video_id{separator}sentence\nret0{separator}v1 {separator}a, b\n'
    assert pairs(read_gallery('msrvtt', write('m.csv', text), tmp_path)) == [('v1.mp4', 'a, b')]


def test_headers_in_the_middle(write, tmp_path):
    header = 'video_id,sentence\n'
    found = complaints(read_gallery, 'msrvtt', write('m.csv', header + 'a,x\n' + header), tmp_path)
    assert [n for n, _ in found] == [3]
    found = complaints(read_published, 'webvid', write('w.csv', WEBVID + '1,u,d,p,x\n' + WEBVID))
    assert found == [(3, f'the header again, expected a row: {WEBVID[:-1]!r}')]


def test_lines_end_at_line_ends_only(write, tmp_path):
    "A caption may hold a form feed or a Unicode line separator"
    file = write('msvd.txt', 'a_1_2 one\u2028two\x0cthree\x85four\n')
    assert pairs(read_gallery('msvd', file, tmp_path)) == [('a_1_2.avi', 'one\u2028two\x0cthree\x85four')]


# ---- Anything else

NOTES = [dict(image_id=9, caption='a cup'), dict(image_id=4, caption='é')]
COCO = json.dumps(dict(images=IMAGES, annotations=NOTES))
SSV2 = json.dumps([dict(id='1', label='holding a cup', template='Holding [something]', placeholders=['a cup'])] * 2)
SAMPLES = { # use, name, ending of a file
    ('classes', '', 'csv'): 'id,name\n0,a\n1,"b, c"\n',
    ('classes', '', 'json'): '{"a": "0", "b": 1}',
    ('labels', 'list', 'csv'): 'a/b c.mp4,1\nc.mp4,0\n',
    ('labels', 'list', 'json'): '[{"path": "a.mp4", "label": 1}]',
    ('labels', 'kinetics', 'csv'): KINETICS + '"a, b",x,1,11,train\nc,y,2,12,train\n',
    ('labels', 'ssv2', 'json'): SSV2,
    ('labels', 'mit', 'csv'): 'clap/a.mp4,clap,3,0\nclap/b.mp4,clap,3,1\n',
    ('captions', 'webvid', 'csv'): WEBVID + '1,u,d,p,"a ""dog"""\n2,u,d,q,cat\n',
    ('captions', 'cc', 'tsv'): 'a dog\thttp://h/d.jpg\na cat\thttp://h/c.jpg\n',
    ('captions', 'coco', 'json'): COCO,
    ('captions', 'vg', 'json'): '[{"id": 1, "regions": [{"phrase": "a clock", "x": 1}]}]',
    ('captions', 'sbu', 'json'): '{"image_urls": ["http://h/d.jpg"], "captions": ["a dog"]}',
    ('retrieval', 'json', 'json'): '[{"video": ["a.mp4", "b.mp4"], "caption": ["x", "y"]}]',
    ('retrieval', 'msrvtt', 'csv'): 'key,video_id,sentence\n1,a,"x, y"\n2,b,z\n',
    ('retrieval', 'msrvtt', 'json'): '{"sentences": [{"video_id": "a", "caption": "x"}]}',
    ('retrieval', 'didemo', 'json'): '[{"video": "a.avi", "description": "x", "times": [[0, 1]]}]',
    ('retrieval', 'activitynet', 'json'): '{"v_a": {"timestamps": [[0, 1.5], [0.5, 2]], "sentences": ["x", "y"]}}',
    ('retrieval', 'lsmdc', 'txt'): f'{SCENE}\t0\t0\t0\t0\tx\n',
    ('retrieval', 'msvd', 'txt'): 'a_1_2 x y\n',
    ('retrieval', 'msvd', 'csv'): MSVD + 'id,5,15,1,clean,9,English,"a dog"\n',
    ('retrieval', 'ssv2_label', 'json'): SSV2}
BITS = [b'"', b',', b'\n', b'\t', b'\r', b'\\', b'[', b']', b'{', b'}', b'null', b'-1', b'1e999', b'NaN', b'true', b';',
        b' ', b'\xef\xbb\xbf', b'\xff', b'\0', b'../', b'""', b'9' * 5000, b'\\ud800', b'']


@pytest.mark.parametrize('use, name, ending', SAMPLES)
def test_mutated_files_give_rows_or_the_typed_error(write, tmp_path, use, name, ending):
    "And nothing else; the seed is fixed"
    rng, data = random.Random(f'{use} {name} {ending}'), SAMPLES[use, name, ending].encode()
    def read(file):
        if use == 'classes': return read_classes(file)
        classes = {'ssv2': ['Holding something'], 'mit': ['clap']}.get(name)
        if use == 'labels': return read_annotations(name, file, tmp_path, classes)
        if use == 'captions': return read_published(name, file, layout='{name}' if name == 'cc' else None)
        return read_gallery(name, file, tmp_path)
    read(write(f'file.{ending}', data))
    for _ in range(60):
        mutated = data
        for _ in range(rng.randint(1, 3)):
            begin = rng.randrange(len(mutated) + 1)
            end = min(begin + rng.choice((0, 0, 1, 1, 3, 10)), len(mutated))
            mutated = mutated[:begin] + rng.choice(BITS) + mutated[end:]
        try: read(write(f'file.{ending}', mutated))
        except ManifestError: pass
