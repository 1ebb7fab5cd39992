"Lists and caption files that went wrong elsewhere, by kind: nothing is dropped, replaced or guessed without a word."
import json
import multiprocessing
import os
import pickle
import sqlite3
import time
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from umt.core import columns
from umt.core.columns import cache_folder, mapped_place, number_names
from umt.data import rows as rows_module
from umt.data.annotations import existing_clips
from umt.data.captions import read_captions, read_text_table, share_ids
from umt.data.containers import LinkError, UnreadableVideo, VideoError
from umt.data.corpora import build_corpora
from umt.data.rows import ManifestError, file_rows, json_rows, jsonl_rows
from umt.data.tables import check_labels, listed_name, read_manifest, resolve, shared_manifest


@pytest.fixture
def cached(tmp_path, monkeypatch):
    "Every list is large enough to be kept on disk."
    monkeypatch.setattr(columns, 'CACHE_FROM', 1)
    monkeypatch.setenv('UMT_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache/tables'


def clips(m): return [(m.name(i), int(m.labels[i])) for i in range(len(m))]


def pairs(m): return [(m.name(i), m.columns['caption'][i].as_py()) for i in range(len(m))]


def complaints(call, *args, **kwargs):
    with pytest.raises(ManifestError) as e: call(*args, **kwargs)
    assert str(args[0]) in str(e.value)
    return e.value.rows


# ---- quotes

HEAD = 'video,caption\n'


@pytest.mark.parametrize('text, lines, said', [
    (HEAD + 'a.mp4,"a dog\nb.mp4,a cat\nc.mp4,a cow\n', [2], 'opened on line 2 is never closed'),
    (HEAD + 'a.mp4,"the\nb.mp4,a cat\nc.mp4,"a cow\nd.mp4,a hen\n', [2, 4], 'opened on line 2'),
    (HEAD + 'a.mp4,"the\nb.mp4,a cat\nc.mp4,a cow"\nd.mp4,a hen\n', [2], 'looks like a row'),
    (HEAD + 'a.mp4,"the\nc,a cow"\n', [2], 'looks like a row'),
    (HEAD + 'a.mp4,"the\nb.mp4,a cat, a cow, a hen"\n', [2, 3], 'looks like a row'),
    (HEAD + '"a.mp4,a dog\nb.mp4,a cat\n', [2], 'never closed'),
    (HEAD + 'a.mp4,"a ""dog\nb.mp4,a cat\n', [2], 'never closed'),
    (HEAD + 'a.mp4,"one"\nb.mp4,"two" and, three\n', [3], 'expected 2 fields, found 3'),
    ('caption,video\n"the,a.mp4\na cat,b.mp4\na "cow,c.mp4\n', [2], 'opened on line 2'),
    ('id,video,caption,url\n1,a.mp4,"x,http://a\n2,b.mp4,y,http://b\n3,c.mp4,z",http://c\n', [2], 'looks like a row'),
])
def test_a_stray_quote_takes_in_no_rows(write, text, lines, said):
    found = complaints(read_captions, write('c.csv', text))
    assert [line for line, _ in found] == lines and said in found[0][1]
    tabs = complaints(read_captions, write('c.tsv', text.replace(',', '\t')))
    assert {line for line, _ in tabs} >= {lines[0]}
    for size in (1, 10, 30): # blocks that cut through it
        part = [bad for rows in row_blocks_of(write('c.csv', text), size) for bad in rows.bad]
        assert part == found


def row_blocks_of(file, size):
    layout = rows_module.find_layout
    first = file.read_text().split('\n')[0].split(',')[0]
    return list(rows_module.text_rows(file, lambda block: layout(file, block, [first], ','), size=size))


def test_labelled_lists_and_webvid_with_stray_quotes(write):
    found = complaints(read_manifest, write('l.csv', 'path,label,note\na.mp4,0,"x\nb.mp4,1,y\nc.mp4,2,z\n'))
    assert found == [(2, 'a quote opened on line 2 is never closed: \'a.mp4,0,"x\'')]
    text = ('videoid,contentUrl,duration,page_dir,name\n1,http://x,PT1S,000_001,"a dog\n2,http://y,PT2S,000_001,a cat\n'
            '3,http://y,PT2S,000_001,a cow\n')
    _, bad = read_text_table(write('webvid.csv', text), wanted=('name', 'page_dir'))
    assert [line for line, _ in bad] == [2]
    long = 'video,caption\na.mp4,"x\n' + 'y' * 2**21 + '\nb.mp4,"z"\n'
    assert 'not closed within' in complaints(read_captions, write('long.csv', long))[0][1]


@pytest.mark.parametrize('text, expected', [
    ('a.mp4,"hello" she said\nb.mp4,a cat\n', [('a.mp4', '"hello" she said'), ('b.mp4', 'a cat')]),
    ('a.mp4,a "dog" no\n', [('a.mp4', 'a "dog" no')]),
    ('a.mp4,"a ""dog"", a cat"\n', [('a.mp4', 'a "dog", a cat')]),
    ('a.mp4,"first,\nthen, a cat\nend"\nb.mp4,x\n', [('a.mp4', 'first,\nthen, a cat\nend'), ('b.mp4', 'x')]),
    ('a.mp4,"a\r\nb"\r\n\r\n\r\n', [('a.mp4', 'a\nb')]),
    ('"a,b.mp4","x"', [('a,b.mp4', 'x')]),
    ('a.mp4,5" tall\nb.mp4,6" tall\n', [('a.mp4', '5" tall'), ('b.mp4', '6" tall')]),
    ('a.mp4,""""\n', [('a.mp4', '"')]),
    ('a.mp4,x\r\nb.mp4,y\r', [('a.mp4', 'x'), ('b.mp4', 'y')]),
    ('a.mp4,x\rb.mp4,y\r', [('a.mp4', 'x'), ('b.mp4', 'y')]),
])
def test_quotes_that_are_right_or_text(write, text, expected):
    assert pairs(read_captions(write('c.csv', HEAD + text))) == expected
    blocks = row_blocks_of(write('c.csv', (HEAD + text).replace('\r\n', '\n').replace('\r', '\n')), 7)
    assert [row for rows in blocks for row in zip(*rows.table.to_pydict().values())] == expected


def test_exact_and_fast_reading_agree(write, monkeypatch):
    "Any text of a few letters, separators, quotes and line ends: Arrow is asked only where it is right."
    rng = np.random.default_rng(0)
    for n in range(400):
        text = 'a,b\n' + ''.join(rng.choice(list('xy",\n'), 24, p=[.3, .2, .1, .2, .2])) + '\n'
        file = write('t.csv', text)
        fast = list(file_rows(file, ['a'], ','))
        with monkeypatch.context() as patch:
            patch.setattr(rows_module, '_arrow_table', lambda *_: None)
            assert list(file_rows(file, ['a'], ',')) == fast, text


@pytest.mark.parametrize('columns', [['path', 'label'], ['path', 'start', 'end', 'label']])
def test_exact_and_fast_reading_of_lists_agree(write, monkeypatch, columns):
    rng = np.random.default_rng(1)
    for n in range(300):
        lines = [''.join(rng.choice(list('xéy, \t'), 14, p=[.3, .1, .2, .1, .2, .1])) for _ in range(3)]
        file = write('t.txt', '\n'.join(lines) + '\n')
        for separator in (',', ' '):
            fast = list(file_rows(file, columns, separator))
            with monkeypatch.context() as patch:
                patch.setattr(rows_module, '_arrow_table', lambda *_: None)
                assert list(file_rows(file, columns, separator)) == fast, lines


def test_exact_and_fast_reading_of_json_agree(write, monkeypatch):
    entries = [json.dumps({'path': f'v_{i}.mp4', 'label': i}) for i in range(50)]
    for odd in (entries[3], '3', '{"a": 1}, {"a": 2}', '{"a": [{}', '{"b": 1}]}', '{"a": 1, "a": 2}', '', '"}, {"',
                '{}'):
        mixed = entries[:20] + [odd] + entries[20:]
        lines, line = write('m.jsonl', '\n'.join(mixed)), write('m.json', f'[{", ".join(mixed)}]')
        fast = list(jsonl_rows(lines)), list(json_rows(line))
        with monkeypatch.context() as patch:
            patch.setattr(rows_module, '_many_lines', lambda lines: [])
            patch.setattr(rows_module, '_many', lambda text, begin: ([], begin))
            assert (list(jsonl_rows(lines)), list(json_rows(line))) == fast, odd
        for block in (9, 200): assert list(json_rows(line, block)) == fast[1], odd


# ---- encodings

LIST = 'é.mp4,1\nb.mp4,2\n'


@pytest.mark.parametrize('name', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_encodings_by_their_mark(write, name):
    assert clips(read_manifest(write('l.csv', LIST.replace('\n', '\r\n').encode(name)))) == [('é.mp4', 1), ('b.mp4', 2)]
    entries = [dict(video='é.mp4', caption='naïve')]
    for kind, text in (('json', json.dumps(entries, ensure_ascii=False)), ('csv', HEAD + 'é.mp4,naïve\n'),
                       ('jsonl', json.dumps(entries[0], ensure_ascii=False)), ('tsv', 'video\tcaption\né.mp4\tnaïve')):
        assert pairs(read_captions(write(f'c.{kind}', text.encode(name)))) == [('é.mp4', 'naïve')]
    marks = {'utf-16-le': b'\xff\xfe', 'utf-16-be': b'\xfe\xff'}
    for order, mark in marks.items():
        assert clips(read_manifest(write('l.csv', mark + LIST.encode(order))))[0] == ('é.mp4', 1)


@pytest.mark.parametrize('kind, lines', [('csv', [3]), ('tsv', [3]), ('jsonl', [2]), ('json', [3])])
def test_latin_1_is_refused_with_its_line(write, kind, lines):
    rows = [dict(video='a.mp4', caption='x'), dict(video='b.mp4', caption='café')]
    text = {'csv': HEAD + 'a.mp4,x\nb.mp4,café\n', 'tsv': 'video\tcaption\na.mp4\tx\nb.mp4\tcafé\n',
            'jsonl': '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows),
            'json': '[\n' + ',\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + ']'}[kind]
    found = complaints(read_captions, write(f'c.{kind}', text.encode('latin-1')))
    assert [line for line, _ in found] == lines
    assert 'byte 0xe9' in found[0][1] and 'UTF-8' in found[0][1] and 'latin-1' in found[0][1]


@pytest.mark.parametrize('content, said', [
    (b'a.mp4,1\nb\0.mp4,2\n', 'a zero byte'), (LIST.encode('utf-16-le'), 'zero byte'),
    (b'\xff\xfea\0\n\0b', 'not UTF-16'), (bytes(range(128, 256)) * 9, 'not UTF-8'),
    (b'PK\3\4rest', 'a ZIP archive'), (b'\x1f\x8b\x08rest', 'a gzip file'), (b'PAR1rest', 'a Parquet file'),
    (b'SQLite format 3\0rest', 'an SQLite database')])
@pytest.mark.parametrize('kind', ['csv', 'txt', 'json', 'jsonl'])
def test_what_is_no_text_is_named(write, content, said, kind):
    if kind in ('json', 'jsonl') and said == 'a zero byte': content = b'[{"path": "a\0"}]'
    found = complaints(read_manifest, write(f'l.{kind}', content))
    assert said in found[0][1] or kind == 'json' and 'not JSON' in found[0][1] or 'a list' in found[0][1]


def test_folders_pipes_and_missing_files(tmp_path):
    (tmp_path/'folder.csv').mkdir()
    os.mkfifo(tmp_path/'pipe.csv')
    for kind in ('json', 'jsonl', 'parquet', 'db'): (tmp_path/f'folder.{kind}').mkdir()
    assert 'a folder' in complaints(read_manifest, tmp_path/'folder.csv')[0][1]
    for kind in ('json', 'jsonl', 'parquet', 'db'):
        def read(file): return list(file_rows(file, ['path'], None))
        assert 'a folder' in complaints(read, tmp_path/f'folder.{kind}')[0][1]
    for read in (read_manifest, read_captions):
        assert 'a pipe' in complaints(read, tmp_path/'pipe.csv')[0][1]
        with pytest.raises(FileNotFoundError, match='none.csv'): read(tmp_path/'none.csv')


# ---- headers and layouts

@pytest.mark.parametrize('text, expected', [
    ('path, label\na.mp4, 0\nb.mp4, 1\n', [('a.mp4', 0), ('b.mp4', 1)]),
    ('"path","label"\n"a.mp4","0"\n', [('a.mp4', 0)]),
    ('label;path\n3;a,b.mp4\n', [('a,b.mp4', 3)]),
    ('path\tlabel\na b.mp4\t3\n', [('a b.mp4', 3)]),
    ('path label\na.mp4 3\n', [('a.mp4', 3)]),
    ('"x,y.mp4",0\n"a.mp4",1\n', [('x,y.mp4', 0), ('a.mp4', 1)]),
    ('"x y.mp4" 0\n', [('x y.mp4', 0)]),
    ('k400/v 1.mp4 7\nk400/v2 8\n', [('k400/v 1.mp4', 7), ('k400/v2', 8)]),
    ('a.mp4,1\n\n\n   \n', [('a.mp4', 1)]),
    ('clip 12 3\nx.mp4 4\n', [('clip 12', 3), ('x.mp4', 4)])])
def test_lists_of_every_layout(write, text, expected):
    assert clips(read_manifest(write('list.txt', text))) == expected
    assert clips(read_manifest(write('list.csv', text.replace('\n', '\r\n')))) == expected


@pytest.mark.parametrize('text, said', [
    ('clips/v1 120 5\nclips/v2 90 3\n', "'path num_frames label'"),
    ('clips/v1,120,5\nclips/v2,90,3\n', "'path num_frames label'"),
    ('clips/v1 120 5\nclips/my v2 90 3\nclips/v3 90\n', "'path num_frames label'"),
    ('a.mp4 0 10 5\na.mp4 10 20.5 3\n', "'path start end label'"),
    ('1;Holding something\n2;Putting something onto something\n', "'id;text'"),
    ('video,label\na.mp4,1\n', "a header ['video', 'label']"),
    ('Path,Label\na.mp4,1\n', "a header ['path', 'label']"),
    ('file class\na.mp4 1\n', "a header ['file', 'class']"),
    ('path,label,label\na.mp4,1,2\n', "several columns 'label'"),
    ('path,class\na.mp4,1\n', "no 'label' among the columns ['path', 'class']"),
    ('clip 12\nclip 13\n', 'names with spaces')])
def test_lists_of_other_tools_are_refused_by_name(write, text, said):
    assert said in complaints(read_manifest, write('list.txt', text))[0][1]


def test_other_layouts_are_read_by_their_columns(write):
    named = read_manifest(write('l.txt', 'a/v1 120 5\na/v2 90 3\n'), columns=['path', 'frames', 'label'])
    assert clips(named) == [('a/v1', 5), ('a/v2', 3)] and named.columns['frames'].to_pylist() == ['120', '90']
    spans = read_manifest(write('l.csv', 'a.mp4,0,10,5\n'), columns=['path', 'start', 'end', 'label'])
    assert clips(spans) == [('a.mp4', 5)] and spans.columns['end'].to_pylist() == ['10']
    semicolons = read_manifest(write('l.csv', '1.mp4;3\n'), columns=['path', 'label'], separator=';')
    assert clips(semicolons) == [('1.mp4', 3)]
    bare = read_manifest(write('l.txt', 'clip 12\nclip 13\n'), label=None)
    assert bare.paths.to_pylist() == ['clip 12', 'clip 13'] and set(bare.labels.tolist()) == {-1}
    assert "'path label'" in complaints(read_manifest, write('l.txt', 'a.mp4 1\nb.mp4 2\n'), label=None)[0][1]
    assert 'a header' in complaints(read_manifest, write('l.txt', 'video\na.mp4\n'), label=None)[0][1]


@pytest.mark.parametrize('text, said', [
    ('a.mp4,a dog\nb.mp4,a cat\n', "expected one of ('image', 'video')"),
    ('video,text\na.mp4,a dog\n', "expected 'caption'"),
    ('video,caption,caption\na.mp4,a dog,x\n', "several columns 'caption'"),
    ('video,image,caption\na,b,c\n', "expected one of ('image', 'video')"),
    ('video,caption\n', 'no rows'), ('', 'no rows')])
def test_headers_of_caption_files(write, text, said):
    assert said in complaints(read_captions, write('c.csv', text))[0][1]
    assert said in complaints(read_captions, write('c.tsv', text.replace(',', '\t')))[0][1]


def test_caption_header_with_spaces(write):
    file = write('c.csv', 'video, caption\na.mp4, a dog\nb.mp4, "a cat, a cow"\n')
    assert pairs(read_captions(file)) == [('a.mp4', 'a dog'), ('b.mp4', 'a cat, a cow')]


def test_lines_before_the_header_and_headers_in_the_middle(write):
    for blank in ('\n', ' \n\n', '\r\n\r\n'):
        assert clips(read_manifest(write('l.csv', blank + 'path,label\na.mp4,1\n'))) == [('a.mp4', 1)]
        assert pairs(read_captions(write('c.csv', blank + HEAD + 'a.mp4,x\n'))) == [('a.mp4', 'x')]
    assert complaints(read_manifest, write('l.csv', '\n\npath,label\na.mp4,x\n'))[0][0] == 4
    for again in (HEAD, '\ufeff' + HEAD): # as when files are joined
        text = HEAD + 'a.mp4,x\n' + again + 'b.mp4,y\n'
        said = f'the header again, expected a row: {again[:-1]!r}'
        assert complaints(read_captions, write('c.csv', text)) == [(3, said)]
    found = complaints(read_manifest, write('l.csv', 'path,label\na.mp4,run\npath,label\n'), classes='sorted')
    assert [line for line, _ in found] == [3]


@pytest.mark.parametrize('text, said', [
    ('vid,lab\na.mp4,run\nb.mp4,jump\n', 'is it a header?'), ('#path,label\na.mp4,1\n', 'is it a header?'),
    ('# mine\na.mp4 1\nb.mp4 2\n', 'is it a header?'),
    ('{"path": "a.mp4", "label": 1}\n', 'JSON in a file of lines'),
    ('[\n{"path": "a.mp4", "label": 1}\n]', 'JSON in a file of lines'),
    ('version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 3\n', 'Git LFS'),
    ('<html> <body>\n', 'a web page'), ('<?xml version="1.0"?>\n', 'XML'),
    ('1,a.mp4\n2,b.mp4\n', 'is the label before the path?'),
    ('run a.mp4\nsit b.mp4\n', 'is the label before the path?')])
def test_what_a_list_with_names_of_classes_could_swallow(write, text, said):
    for name in ('l.csv', 'l.txt'): assert said in complaints(read_manifest, write(name, text), classes='sorted')[0][1]


def test_spreadsheets_in_other_countries(write):
    for separator in ';\t|':
        text = 'path:label\n"a.mp4":"jump, high"\nb.mp4:run\n'.replace(':', separator)
        file = write('l.csv', text.encode('utf-16'))
        assert read_manifest(file, classes='sorted').classes == ('jump, high', 'run')
    for separator in ';\t':
        text = f'video{separator}caption\na.mp4{separator}x, y\n'
        assert pairs(read_captions(write('c.csv', text))) == [('a.mp4', 'x, y')]


# ---- labels

@pytest.mark.parametrize('label, good', [
    ('3', 3), ('"3"', 3), ('" 3 "', 3), ('-1', -1), ('3.7', None), ('3.0', None), ('true', None), ('NaN', None),
    ('null', None), ('"abseiling"', None), ('""', None), ('[3]', None), ('9' * 5000, None),
    ('"' + '9' * 30 + '"', None), ('"٣"', None), ('"0x1f"', None), ('"+3"', None), ('9' * 25, None)])
@pytest.mark.parametrize('kind', ['json', 'jsonl', 'csv'])
def test_labels_are_whole_numbers(write, kind, label, good):
    row = f'{{"path": "a.mp4", "label": {label}}}'
    text = {'jsonl': row, 'json': f'[{row}]', 'csv': f'path,label\na.mp4,{label}\n'}[kind]
    file = write(f'l.{kind}', text)
    if good is not None: assert clips(read_manifest(file)) == [('a.mp4', good)]
    else: assert complaints(read_manifest, file)[0][0] == (2 if kind == 'csv' else 1)


@pytest.mark.parametrize('labels, good', [
    (pa.array([3, 0], pa.int8()), True), (pa.array(['3', '0']), True), (pa.array(['3', '0']).dictionary_encode(), True),
    (pa.array([3., 0.]), False), (pa.array([True, False]), False), (pa.array([3, None]), False),
    (pa.array([[3], [0]]), False), (pa.array([2**63, 0], pa.uint64()), False), (pa.array([None, None]), False)])
def test_labels_of_parquet(tmp_path, labels, good):
    parquet.write_table(pa.table({'path': ['a.mp4', 'b.mp4'], 'label': labels}), tmp_path/'l.parquet')
    if good: assert clips(read_manifest(tmp_path/'l.parquet')) == [('a.mp4', 3), ('b.mp4', 0)]
    else: assert complaints(read_manifest, tmp_path/'l.parquet')[-1][0] in (1, 2)
    assert bool(check_labels(labels)[1]) != good


def test_names_of_classes(write):
    text = 'path,label\na.mp4,run\nb.mp4,jump\nc.mp4,run\n'
    rows = [dict(path=name, label=label) for name, label in zip(('a.mp4', 'b.mp4', 'c.mp4'), ('run', 'jump', 'run'))]
    for file in (write('l.csv', text), write('l.json', json.dumps(rows))):
        assert "classes='sorted'" in complaints(read_manifest, file)[0][1]
        m = read_manifest(file, classes='sorted')
        assert m.classes == ('jump', 'run') and m.labels.tolist() == [1, 0, 1]
        assert pickle.loads(pickle.dumps(m)).classes == m.classes == m.subset([1]).classes
        assert read_manifest(file, classes=['run', 'jump']).labels.tolist() == [0, 1, 0]
        assert complaints(read_manifest, file, classes=['run'])[0][1] == "label 'jump': none of the 1 classes"
    mixed = write('m.csv', 'path,label\na.mp4,run\nb.mp4,3\n')
    assert complaints(read_manifest, mixed)[0][0] == 2
    assert complaints(read_manifest, mixed, classes='sorted') == [
        (3, "label '3': a number, where other rows have names of classes")]
    numbers = write('n.csv', 'path,label\na.mp4,1\nb.mp4,3\n')
    assert read_manifest(numbers, classes='sorted').classes is None
    assert complaints(read_manifest, numbers, classes=['x', 'y']) == [(3, 'label 3: expected 0 to 1')]
    with pytest.raises(ValueError, match='different names'): read_manifest(numbers, classes=['x', 'x'])
    with pytest.raises(ValueError, match="or 'sorted'"): read_manifest(numbers, classes='names')


@pytest.mark.parametrize('text, expected', [
    ('a.mp4,"jump, high"\nb.mp4,run\n', [('a.mp4', 'jump, high'), ('b.mp4', 'run')]),
    ('a.mp4\tjump high\nb c.mp4\trun\n', [('a.mp4', 'jump high'), ('b c.mp4', 'run')]),
    ('a.mp4 run\nb c.mp4 sit\n', [('a.mp4', 'run'), ('b c.mp4', 'sit')]),
    ('path,label\na.mp4,run \nb.mp4,run\xa0\n', [('a.mp4', 'run'), ('b.mp4', 'run')]),
    ('path,label\na.mp4,caf\u00e9\nb.mp4,cafe\u0301\n', [('a.mp4', 'caf\u00e9'), ('b.mp4', 'caf\u00e9')]),
    ('path,label\na.mp4,3rd\nb.mp4,😀\n', [('a.mp4', '3rd'), ('b.mp4', '😀')])])
def test_names_of_several_words(write, text, expected):
    m = read_manifest(write('l.txt', text), classes='sorted')
    assert [(name, m.classes[label]) for name, label in clips(m)] == expected


@pytest.mark.parametrize('text', [
    'a.mp4,jump, high\nb.mp4,run\n', 'a.mp4 run\nb.mp4 jump high\n', 'a.mp4,0,run\nb.mp4,1,sit\n',
    'a.mp4 9 run\nb.mp4 8 sit\n', 'a.mp4,run,train\nb.mp4,sit,val\n',
    'a.mp4;run, fast\nb.mp4;sit, low\n', 'a.mp4,run,\nb.mp4,sit,\n',
    'a.mp4,1\nb.mp4,2,x\n', 'a.mp4,1;b.mp4,2\n', 'a.mp4 1 # x\nb.mp4 2\n'])
def test_a_name_is_never_cut_and_no_field_goes_to_the_path(write, text):
    assert 'more fields than expected' in complaints(read_manifest, write('l.txt', text), classes='sorted')[0][1]


@pytest.mark.parametrize('label', [
    'nan', 'NaN', 'None', 'null', '<NA>', '1.0', '+1', '1e2', '０', '0x1', '[0]', '"1,2"', '#1', 'Run', 'r\u200bun',
    "'run'", 'a/b.mp4', '-1', '3'])
def test_what_is_no_name_of_a_class(write, label):
    text = f'path,label\na.mp4,run\nb.mp4,{label}\nc.mp4,run\nd.mp4,sit\n'
    assert complaints(read_manifest, write('l.csv', text), classes='sorted')[0][0] in (2, 3)
    if label != '3': assert read_manifest(write('l.csv', text), classes=['run', 'sit', label.strip('"')]).labels[1] == 2


def test_types_that_are_no_names_of_classes(tmp_path):
    for values in ([1.], [True], [[1]], [{'a': 1}], [b'x'], [None]):
        parquet.write_table(pa.table({'path': ['a.mp4'], 'label': values}), tmp_path/'l.parquet')
        for classes in ('sorted', ['x', 'y']): assert complaints(read_manifest, tmp_path/'l.parquet', classes=classes)
    parquet.write_table(pa.table({'path': ['a.mp4'], 'label': pa.array([3], pa.uint64())}), tmp_path/'l.parquet')
    assert clips(read_manifest(tmp_path/'l.parquet')) == [('a.mp4', 3)]


# ---- captions

def test_captions_that_are_none(write, tmp_path, caplog):
    for text in ('nan', 'NaN', 'None', 'null', '<NA>', ' ', '""'):
        assert complaints(read_captions, write('c.csv', HEAD + f'a.mp4,x\nb.mp4,{text}\n')) == [(3, 'no caption')]
        assert 'None of' in pairs(read_captions(write('c.csv', HEAD + 'a.mp4,None of it\n')))[0][1]
    for text in ('"[""a"", ""b""]"', '"[\'a\', \'b\']"'):
        assert 'a list as text' in complaints(read_captions, write('c.csv', HEAD + f'a.mp4,{text}\n'))[0][1]
    assert 'backslashes' in complaints(read_captions, write('c.csv', HEAD + 'a.mp4,"a \\"dog\\" ran"\n'))[0][1]
    for entry in ('{"video": "a.mp4", "caption": "x\\u0000"}', '{"video": "a.mp4", "caption": ["x", "y\\u0000"]}'):
        assert 'a zero byte' in complaints(read_captions, write('c.jsonl', entry))[0][1]
    assert pairs(read_captions(write('c.csv', HEAD + '"a.mp4","x" \n'))) == [('a.mp4', 'x')]
    assert pairs(read_captions(write('c.csv', HEAD + 'a.mp4,caf\ufffd\n'))) == [('a.mp4', 'caf\ufffd')]
    assert 'c.csv: 1 captions have lost letters' in caplog.text


# ---- JSON

DEEP = '[' * 100_000
JSON = [
    (DEEP, 'nested too deeply'), ('[' + '{"a":' * 100_000, 'nested too deeply'),
    ('[{"path": "a.mp4", "label": ' + DEEP, 'nested too deeply'),
    ('[{"path": "a.mp4", "label": ' + '9' * 5000 + '}]', 'too many digits'),
    ('[{"path": "a.mp4", "path": "b.mp4", "label": 1}]', "several values of 'path'"),
    ('[{"path": "a.mp4", "label": NaN}]', 'NaN is no number'), ('[{"path": "a.mp4", "label": -Infinity}]', 'no number'),
    ('[3]', 'expected an object'), ('["a.mp4"]', 'expected an object'), ('[null]', 'expected an object'),
    ('{"path": "a.mp4", "label": 1}', 'expected a list'), ('"a.mp4"', 'expected a list'), ('', 'expected a list'),
    ('[{"path": "a.mp4", "label": 1} {"path": "b.mp4", "label": 1}]', 'one comma'),
    ("[{'path': 'a.mp4'}]", 'not JSON'), ('[{"path": "a.mp4", "label": 1},]', 'a comma before its end'),
    ('[{"path": "\\ud800.mp4", "label": 1}]', 'expected a path in UTF-8')]


@pytest.mark.parametrize('text, said', JSON, ids=range(len(JSON)))
def test_json_that_is_none_or_says_too_much(write, text, said):
    found = complaints(read_manifest, write('l.json', text))
    assert found[0][0] == 1 and said in found[0][1]
    caption = text.replace('"path"', '"video"').replace('"label"', '"caption"')
    assert complaints(read_captions, write('c.json', caption))[0][0] == 1


def test_jsonl_goes_on_after_a_bad_line(write):
    lines = ['{"path": "a.mp4", "label": 1}', DEEP, '{"path": "b.mp4", "label": %s}' % ('9' * 5000), '', 'x', '3',
             '{"path": "b.mp4", "path": "c.mp4"}', '{"path": "d.mp4", "label": Infinity}', '{"path": "e.mp4"}']
    found = complaints(read_manifest, write('l.jsonl', '\n'.join(lines)))
    assert [line for line, _ in found] == [2, 3, 5, 6, 7, 8, 9]
    assert [type(row) for _, row in jsonl_rows(write('l.jsonl', '\n'.join(lines)))][:2] == [dict, str]
    assert [row for _, row in json_rows(write('x.json', '[{"a": 1},\n {"a": 2}]'))] == [{'a': 1}, {'a': 2}]


def test_columns_of_mixed_types_are_named(write):
    rows = [dict(path='a.mp4', label=1, duration=3), dict(path='b.mp4', label=1, duration='n/a')]
    assert "'duration' mixes types" in complaints(read_manifest, write('l.json', json.dumps(rows)))[0][1]
    huge = [dict(path='a.mp4', label=1, size=10**30)]
    assert "column 'size'" in complaints(read_manifest, write('l.json', json.dumps(huge)))[0][1]
    half = '[{"path": "a.mp4", "label": 1, "title": "\\ud800"}]'
    assert "column 'title'" in complaints(read_manifest, write('l.json', half))[0][1]


# ---- Parquet and SQLite

def test_parquet_files_that_are_wrong(write, tmp_path):
    good = pa.table({'video': ['a.mp4'] * 100, 'caption': ['x'] * 100, 'path': ['a.mp4'] * 100, 'label': [1] * 100})
    parquet.write_table(good, tmp_path/'good.parquet')
    data = (tmp_path/'good.parquet').read_bytes()
    damaged = [b'', b'PAR1', data[:-9], data[:len(data) // 2], b'x' * len(data), data[:8] + b'\xff' * 90 + data[98:]]
    for content in damaged:
        for read in (read_captions, read_manifest):
            try: read(write('bad.parquet', content))
            except ManifestError as e: assert 'bad.parquet' in str(e)
    for table, said in (({'video': ['a.mp4'], 'caption': [3]}, 'holds int64, expected text'),
                        ({'video': [3], 'caption': ['x']}, 'holds int64, expected text'),
                        ({'video': ['a.mp4'], 'caption': [{'en': 'x'}]}, 'expected text'),
                        ({'video': ['a.mp4'], 'caption': [[3]]}, 'expected text'),
                        ({'video': ['a.mp4'], 'text': ['x']}, "expected 'caption'"),
                        ({'video': [None, 'a.mp4'], 'caption': ['x', None]}, 'expected a path')):
        parquet.write_table(pa.table(table), tmp_path/'bad.parquet')
        assert said in complaints(read_captions, tmp_path/'bad.parquet')[0][1]
    buffers = [None, pa.py_buffer(np.array([0, 4], np.int32)), pa.py_buffer(b'caf\xe9')]
    raw = pa.Array.from_buffers(pa.string(), 1, buffers)
    parquet.write_table(pa.table({'video': raw, 'caption': ['x']}), tmp_path/'bad.parquet')
    assert 'UTF' in complaints(read_captions, tmp_path/'bad.parquet')[0][1].upper()
    parquet.write_table(pa.table([pa.array(['a'])] * 2, ['path', 'path']), tmp_path/'bad.parquet')
    assert "several columns 'path'" in complaints(read_manifest, tmp_path/'bad.parquet')[0][1]
    parquet.write_table(pa.table({'path': [3], 'label': [3]}), tmp_path/'bad.parquet')
    assert 'expected paths as text' in complaints(read_manifest, tmp_path/'bad.parquet')[0][1]
    categories = pa.table({'video': pa.array(['a.mp4', 'b.mp4']).dictionary_encode(), 'caption': ['x', 'y']})
    parquet.write_table(categories, tmp_path/'c.parquet')
    assert pairs(read_captions(tmp_path/'c.parquet')) == [('a.mp4', 'x'), ('b.mp4', 'y')]


def test_databases_that_are_wrong(tmp_path):
    for n, (schema, values, said) in enumerate([
            ('annos (id, filename, caption)', (1, 'a.mp4', 3), 'expected text, found 3'),
            ('annos (id, filename, caption)', (1, 'a.mp4', b'x'), 'expected text'),
            ('annos (id, filename, caption)', ('x', None, 'y'), 'expected text, found None'),
            ('other (id, filename, caption)', (1, 'a.mp4', 'x'), 'not a database with a table annos')]):
        file = tmp_path/f'{n}.db'
        with sqlite3.connect(file) as base:
            base.execute(f'CREATE TABLE {schema}')
            base.execute(f'INSERT INTO {schema.split()[0]} VALUES (?, ?, ?)', values)
        assert said in complaints(read_captions, file)[0][1]


# ---- paths

def test_windows_separators(write, tmp_path):
    for read, file in ((read_manifest, write('l.csv', 'sub\\a.mp4,1\n')),
                       (read_captions, write('c.csv', HEAD + 'sub\\a.mp4,x\n')),
                       (read_manifest, write('l.json', json.dumps([dict(path='sub\\a.mp4', label=1)])))):
        assert "write 'sub/a.mp4'" in complaints(read, file)[0][1]
    (tmp_path/'sub\\a.mp4').write_bytes(b'')
    assert clips(read_manifest(write('l.csv', 'sub\\a.mp4,1\n'))) == [('sub\\a.mp4', 1)]


@pytest.mark.parametrize('path', ['../x.mp4', 'a/../../x.mp4', '/etc/x.mp4', '.', './', '..', 'x/..', './../x.mp4', ''])
@pytest.mark.parametrize('kind', ['csv', 'json', 'parquet'])
def test_paths_stay_below_the_root(write, tmp_path, path, kind):
    rows = [dict(video='fine.mp4', caption='x'), dict(video=path, caption='y')]
    if kind == 'csv': file = write('c.csv', HEAD + f'fine.mp4,x\n{path},y\n')
    elif kind == 'json': file = write('c.json', '[' + ',\n'.join(map(json.dumps, rows)) + ']')
    else: parquet.write_table(pa.Table.from_pylist(rows), file := tmp_path/'c.parquet')
    (line, said), = complaints(read_captions, file)
    assert line == (3 if kind == 'csv' else 2) and ('outside the root' in said or 'expected a' in said)


@pytest.mark.parametrize('path, said', [
    ('# a.mp4', 'a comment'), ('"a.mp4', 'a quote'), ("'a.mp4'", 'a quote'), ('C:/a.mp4', 'a drive'),
    ('http://h/a.mp4', 'an address'), ('s3://b/a.mp4', 'an address'), (' a.mp4', 'white space'),
    ('a.mp4 ', 'white space'),
    ('\ufeffa.mp4', 'cannot be seen'), ('a\u200b.mp4', 'cannot be seen'), ('a,1\u2028b.mp4', 'cannot be seen'),
    ('a\x0bb.mp4', 'cannot be seen'), ('a.mp4\x85', 'white space'),
    ('a.mp4,3', 'more fields'), ('a.mp4 3', 'more fields'), ('sub/a.MP4;x', 'more fields')])
def test_odd_names_are_those_of_files_that_are_there(write, tmp_path, path, said):
    for name in ('plain.mp4', 'Mr. X, St. 3 a.mp4'):
        file = write('l.json', json.dumps([dict(path=name, label=0), dict(path=path, label=1)]))
        (_, wrong), = complaints(read_manifest, file)
        assert said in wrong and 'there is no file of this name' in wrong
    (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path/path).touch()
    assert clips(read_manifest(file))[1] == (path, 1)


@pytest.mark.parametrize('folder', ['é', 'plain'])
def test_accents_in_either_form(write, tmp_path, folder):
    nfc, nfd = (unicodedata.normalize(form, f'{folder}/café.mp4') for form in ('NFC', 'NFD'))
    for listed, on_disk in ((nfc, nfd), (nfd, nfc)):
        root = tmp_path/unicodedata.name(listed[-5])[:3]/str(listed == nfc)
        (root/on_disk).parent.mkdir(parents=True)
        (root/on_disk).write_bytes(b'x')
        m = read_manifest(write('l.csv', f'{listed} 1\n'), root)
        assert m.source(0).path == str(root/on_disk) and m.source(0).name == listed
        assert resolve(str(root), f'{folder}/other é.mp4').endswith('other é.mp4')
        assert existing_clips(m)[1] == []
        write('c.csv', HEAD + f'{listed},x\n')
        assert len(build_corpora(f'video:c.csv:{root.relative_to(tmp_path)}', tmp_path)['video'][0]) == 1
    assert listed_name('é', {'e\u0301', 'b'}) == 'e\u0301' and listed_name('é', ['x']) is None


def test_whatever_the_system_says_of_a_path_is_that_clips_error(tmp_path, monkeypatch):
    (tmp_path/'loop.mp4').symlink_to('loop.mp4')
    (tmp_path/'a').symlink_to('b')
    (tmp_path/'b').symlink_to('a')
    (tmp_path/'out.mp4').symlink_to('/etc/hostname')
    for path in ('loop.mp4/x.mp4', 'loop', 'a/x.mp4', 'x' * 300 + '.mp4', 'd/' * 3000 + 'x.mp4', 'out.mp4'):
        with pytest.raises(VideoError) as e: resolve(str(tmp_path), path)
        assert isinstance(e.value, (LinkError, UnreadableVideo))
    assert resolve(str(tmp_path), 'nothing.mp4') == os.path.join(os.path.realpath(tmp_path), 'nothing.mp4')
    def refuse(path, **_): raise PermissionError(13, 'Permission denied', path)
    monkeypatch.setattr(os, 'stat', refuse)
    with pytest.raises(UnreadableVideo, match='Permission denied'): resolve(str(tmp_path), 'x.mp4')


# ---- large lists

def many(write, n=3000, kind='csv'):
    text = 'path,label,note\n' + ''.join(f'k/{i % 50}/v_{i}.mp4,{i % 7},"note, {i}"\n' for i in range(n))
    return write(f'many.{kind}', text)


def test_a_mapped_list_is_the_same_list(write, cached, monkeypatch):
    mapped = read_manifest(many(write), first_id=5)
    monkeypatch.setattr(columns, 'CACHE_FROM', 1 << 40)
    plain = read_manifest(many(write), first_id=5)
    again, rows = pickle.loads(pickle.dumps(mapped)), np.array([7, 3, 2999, 3])
    for m in (mapped, again):
        assert m.paths.equals(plain.paths) and m.columns == plain.columns and m.root == plain.root
        assert (m.labels == plain.labels).all() and (m.ids == plain.ids).all() and m.ids.dtype == np.int64
        assert clips(m.subset(rows)) == clips(plain.subset(rows)) and m.subset([4]).ids.tolist() == [9]
    assert len(pickle.dumps(mapped)) < 2000 < len(pickle.dumps(plain))
    assert not list(cached.glob('.*')) and len(list(cached.glob('*.arrow'))) == 1


def test_a_list_that_changed_is_read_anew(write, cached):
    file = many(write, 10)
    assert len(read_manifest(file)) == 10
    time.sleep(.05)
    many(write, 20)
    assert len(read_manifest(file)) == 20
    assert len(read_manifest(file, label=None)) == 20 and set(read_manifest(file, label=None).labels.tolist()) == {-1}
    assert len(list(cached.glob('*.arrow'))) == 2, 'of the list as it was, nothing is left'


def test_a_damaged_table_is_made_anew(write, cached, caplog):
    file = many(write)
    before = clips(read_manifest(file))
    table, = cached.glob('*.arrow')
    for content in (b'', b'ARROW1', table.read_bytes()[:500], table.read_bytes()[:-20]):
        columns._tables.clear()
        table.unlink() # a file that is mapped is replaced, never written to
        table.write_bytes(content)
        assert clips(read_manifest(file)) == before and table.stat().st_size > 10_000
    assert 'damaged, made anew' in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(write, cached, caplog, monkeypatch):
    cached.parent.write_bytes(b'a file where the folder should be')
    assert len(read_manifest(many(write))) == 3000 and 'held in memory' in caplog.text
    monkeypatch.setenv('UMT_CACHE', '/proc/none')
    assert len(read_manifest(many(write))) == 3000


def test_errors_of_large_lists_have_their_lines(write, cached):
    file = many(write)
    file.write_text(file.read_text() + '../x.mp4,1,y\nz.mp4,u,v\n')
    assert [line for line, _ in complaints(read_manifest, file)] == [3002, 3003]
    assert not list(cached.glob('*.arrow'))


def read_in_process(queue, file, delay):
    time.sleep(delay)
    calls = []
    build = rows_module.text_rows
    rows_module.text_rows = lambda *args, **kwargs: calls.append(1) or build(*args, **kwargs)
    m = read_captions(file)
    queue.put((len(calls), len(m), int(m.ids[-1]), mapped_place(m.paths) is not None))


def test_one_process_reads_and_the_others_wait(write, cached, monkeypatch):
    from umt.data import captions
    context = multiprocessing.get_context('fork')
    file, queue = write('c.csv', HEAD + ''.join(f'v_{i}.mp4,text {i}\n' for i in range(5000))), context.Queue()
    def slow(*args, **kwargs):
        time.sleep(.5)
        return rows_module.text_rows(*args, **kwargs)
    monkeypatch.setattr(captions, 'text_rows', slow)
    readers = [context.Process(target=read_in_process, args=(queue, file, .05 * i)) for i in range(3)]
    for reader in readers: reader.start()
    found = [queue.get(timeout=60) for _ in readers]
    for reader in readers: reader.join()
    assert sorted(calls for calls, *_ in found) == [0, 0, 1]
    assert {tuple(rest) for _, *rest in found} == {(5000, 4999, True)}


def test_ids_of_mapped_captions_are_shared_and_mapped(write, cached, monkeypatch):
    text = HEAD + ''.join(f'{"./" if i % 3 else ""}v_{i // 2}.mp4,text {i}\n' for i in range(2000))
    first, second = write('a.csv', text), write('b.csv', HEAD + 'v_7.mp4,x\nnew.mp4,y\n')
    shared = share_ids([read_captions(first), read_captions(second)])
    with monkeypatch.context() as patch:
        patch.setattr(columns, 'CACHE_FROM', 1 << 40)
        plain = share_ids([read_captions(first), read_captions(second)])
    for a, b in zip(shared, plain): assert a.ids.tolist() == b.ids.tolist()
    assert shared[1].ids.tolist() == [7, 1000]
    assert len(pickle.dumps(shared)) < 3000 and pickle.loads(pickle.dumps(shared))[1].ids.tolist() == [7, 1000]
    assert share_ids([]) == []


def test_names_are_numbered_exactly(monkeypatch):
    rng = np.random.default_rng(1)
    names = pa.array([''.join(rng.choice(list('abé/'), rng.integers(0, 6))) for _ in range(3000)], pa.large_string())
    def of(start, stop): return names[start:stop]
    expected = names.dictionary_encode().indices.to_numpy()
    for block in (1, 7, 10_000): assert (number_names(of, len(names), block) == expected).all()
    part = names[500:600]
    assert (number_names(lambda a, b: part[a:b], 100) == part.dictionary_encode().indices.to_numpy()).all()
    assert number_names(of, 0).tolist() == []
    weak = columns._hashes # two names with the same 64 bits
    def equal(text, base, powers):
        return weak(text, base, powers) % np.uint64(7 if base == 0x9E3779B97F4A7C15 else 2**40)
    monkeypatch.setattr(columns, '_hashes', equal)
    assert (number_names(of, len(names)) == expected).all()


def test_manifests_of_other_readers_are_shared(write, cached):
    file, made = many(write), []
    def make(): return made.append(1) or read_manifest(file, first_id=3)
    for _ in range(2): assert clips(shared_manifest(file, ['kind'], make)) == clips(read_manifest(file))
    assert made == [1] and cache_folder() == cached


# ---- anything at all

TABLE = [dict(path=f'a/{i}.mp4', video=f'a/{i}.mp4', label=i % 3, caption='a "dog", é') for i in range(9)]


def damage(content, rng):
    "A few bytes changed, cut out, put in or repeated"
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at, kind = rng.integers(len(content)), rng.integers(4)
        if kind == 0: content[at] = rng.integers(256)
        if kind == 1: del content[at:at + rng.integers(1, 20)]
        if kind == 2: content[at:at] = bytes(rng.choice(list(b'",\n\r\t \\{}[]:\xff\0;'), 3).tolist())
        if kind == 3: content[at:at] = content[rng.integers(len(content)):][:30]
        content = content or bytearray(b'x')
    return bytes(content)


@pytest.mark.parametrize('kind', ['csv', 'txt', 'json', 'jsonl', 'parquet'])
def test_damaged_files_are_rows_or_a_manifest_error(write, tmp_path, kind):
    parquet.write_table(pa.Table.from_pylist(TABLE), tmp_path/'good.parquet')
    lines = ''.join(f'a/{i}.mp4,a/{i}.mp4,{i},"a ""dog"", é"\n' for i in range(9))
    content = {'csv': ('path,video,label,caption\n' + lines).encode(), 'txt': b'a/1.mp4 3\na b/2.mp4 4\n"x y" 3\n' * 3,
               'json': json.dumps(TABLE).encode(), 'jsonl': '\n'.join(map(json.dumps, TABLE)).encode(),
               'parquet': (tmp_path/'good.parquet').read_bytes()}[kind]
    rng, errors = np.random.default_rng(5), 0
    for n in range(150):
        file = write(f'f.{kind}', damage(content, rng))
        for read in (read_manifest, read_captions)[:1 if kind == 'txt' else 2]:
            try: m = read(file)
            except ManifestError: errors += 1
            else: assert [(m.name(i), int(m.ids[i])) for i in range(len(m))] and m.subset([0]).columns is not None
    assert errors > 20


# ---- speed

def test_plain_lists_are_read_as_columns(write, monkeypatch):
    "Record by record only where it has to be: 650,000 lines take less than a second so."
    monkeypatch.setattr(rows_module, '_exact_rows', lambda *_: pytest.fail('read record by record'))
    for name, text in (('l.csv', 'path,label\n' + ''.join(f'a/v_{i}.mp4,{i % 7}\n' for i in range(99))),
                       ('l.txt', ''.join(f'a/v_{i}.mp4 {i % 7}\n' for i in range(99))),
                       ('t.txt', ''.join(f'a/v_{i}.mp4\t{i % 7}\n' for i in range(99))),
                       ('q.csv', 'path,label,note\n' + ''.join(f'a/v_{i}.mp4,{i % 7},"a, ""b"""\n' for i in range(99))),
                       ('w.csv', 'path,label,note\n' + ''.join(f'a/v_{i}.mp4,{i % 7},a "b"\n' for i in range(99)))):
        assert clips(read_manifest(write(name, text))) == [(f'a/v_{i}.mp4', i % 7) for i in range(99)]
