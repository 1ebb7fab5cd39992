"`umt list` and `umt shards`: odd folders, broken files, interrupts at any moment, other layouts."
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from PIL import Image
from test_watching import ends

from umt.core.config import UsageError
from umt.data import emoji_motion
from umt.data.packing import ShardsConfig, encode, jpeg_frames, shown_frames
from umt.data.packing import main as shards
from umt.data.preparing import MEASURES, class_of, each_in_a_process, find_clips, group_of, split_of
from umt.data.preparing import main as make_list
from umt.data.captions import read_captions, write_captions
from umt.data.containers import Source
from umt.data.measuring import main as measure_reading
from umt.data.shards import read_shards
from umt.data.tables import read_manifest


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "A list of twelve good clips."
    root = tmp_path_factory.mktemp('prepare')/'emoji'
    emoji_motion.generate(root, {'train': 12}, num_objects=8, image_size=64, num_frames=12, num_workers=0)
    return read_manifest(root/'action_train.csv')


@pytest.fixture
def folder(clips, tmp_path):
    "The clips in folders of classes."
    for i in range(len(clips)):
        place = tmp_path/'data'/f'class {i % 3}'/f'v_{i // 2}_{i}.mp4'
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips.source(i).path, place)
    return tmp_path/'data'


def report(folder, name='list'):
    return {e['path']: (e['error'], e['reason']) for e in map(json.loads, open(folder/f'{name}.report.jsonl'))}


def umt(*args, **options):
    command = [sys.executable, '-m', 'umt.experiments.command', *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


# ---- umt list ----

def test_odd_names_and_files(folder, capsys):
    good = next(folder.rglob('*.mp4'))
    odd = folder/'odd, "quoted"'
    odd.mkdir()
    listed = ['a b.mp4', 'x,y.mp4', 'ü.mp4', 'u\u0308.mp4', 'UP.MP4', "it's.mp4", 'v.1.mp4', ' lead.mp4', '"q.mp4',
              '$HOME.mp4', '#1.mp4', '=1+1.mp4', 'a;b.mp4', 'back\\slash.mp4', 'http:x.mp4', '日本\u3000語.mp4',
              '👨\u200d👩.mp4', 'n\xa0b.mp4', '\ufeffbom.mp4', '*?[a].mp4']
    for name in listed: shutil.copy(good, odd/name)
    for name in (b'caf\xe9.mp4', b'two\nlines.mp4', b'cr\r.mp4'): shutil.copy(good, os.fsencode(odd) + b'/' + name)
    (odd/'empty.mp4').touch()
    (odd/'text.mp4').write_text('not a video')
    (odd/'cut.mp4').write_bytes(good.read_bytes()[:900])
    (odd/'notes.txt').touch()
    (odd/'.hidden.mp4').touch()
    (odd/'loop.mp4').symlink_to('loop.mp4')
    os.mkfifo(odd/'pipe.mp4')
    (folder/'linked').symlink_to(odd)
    shutil.copy(good, folder/'homeless.mp4')
    make_list([str(folder), '--processes', '1'])
    made = read_manifest(folder/'list.csv')
    assert len(made) == 12 + 20 and list(made.columns) == list(MEASURES)
    read = {Path(path).name for path in made.paths.to_pylist() if path.startswith('odd, "quoted"/')}
    assert read == set(listed) and all(os.path.isfile(made.source(i).path) for i in range(len(made)))
    assert set(made.columns['num_frames'].to_pylist()) in ({'12'}, {12})
    names = (folder/'list.classes.txt').read_text().splitlines()
    assert [names[label] for label in made.labels] == [class_of(path, 'folder') for path in made.paths.to_pylist()]
    broken = report(folder)
    inside = {Path(path).name for path in broken}
    assert inside == {'caf\\xe9.mp4', 'two\nlines.mp4', 'cr\r.mp4', 'empty.mp4', 'text.mp4', 'cut.mp4', 'loop.mp4',
                      'pipe.mp4', 'linked', 'homeless.mp4'}
    assert broken['homeless.mp4'][0] == 'NoClass' and 'UTF-8' in broken['odd, "quoted"/caf\\xe9.mp4'][1]
    printed = capsys.readouterr().out
    assert '32 clips' in printed and '10 broken' in printed and '1 .txt' in printed


def test_labels_and_classes(folder, tmp_path):
    out = tmp_path/'elsewhere'/'own.csv'
    make_list([str(folder), '--labels', 'none', '--out', str(out), '--processes', '1'])
    assert set(read_manifest(out, root=folder).labels.tolist()) == {-1}
    (tmp_path/'names').write_text('class 2\nclass 0\n')
    make_list([str(folder), '--classes', str(tmp_path/'names'), '--out', str(out)])
    made = read_manifest(out, root=folder)
    assert sorted(set(made.labels.tolist())) == [0, 1] and len(made) == 8
    assert [e for e, _ in report(out.parent, 'own').values()] == ['NoClass'] * 4
    assert class_of('train/run/v.mp4', 'parent') == 'run' and class_of('v.mp4', 'parent') is None
    flat = tmp_path/'flat'
    flat.mkdir()
    shutil.copy(next(folder.rglob('*.mp4')), flat)
    for args, found in (([str(flat)], '--labels none'), ([str(tmp_path/'elsewhere')], 'no videos'),
                        ([str(folder), '--split', 'val=.5,test=.5'], 'add up'),
                        ([str(folder), '--split', 'val'], 'NAME=SHARE'),
                        ([str(folder), '--group', '('], 'no regular expression'),
                        ([str(folder), '--group', 'x_'], 'finds nothing')):
        with pytest.raises(UsageError, match=found): make_list(args)


def test_splits_keep_groups_together_and_do_not_move(folder):
    names = [f'v_{film}_{part}.mp4' for film in range(500) for part in range(3)]
    shares, rule = {'val': .1, 'test': .2}, r'v_(\d+)'
    first = {name: split_of(group_of(name, rule), shares) for name in names}
    for film in range(500): assert len({first[f'v_{film}_{part}.mp4'] for part in range(3)}) == 1
    counts = {s: sum(v == s for v in first.values()) / len(names) for s in ('train', 'val', 'test')}
    assert abs(counts['val'] - .1) < .04 and abs(counts['test'] - .2) < .05
    make_list([str(folder), '--split', 'val=.4', '--group', rule, '--processes', '1'])
    parts = [read_manifest(folder/f'list_{s}.csv') for s in ('train', 'val')]
    groups = [{group_of(path, rule) for path in p.paths.to_pylist()} for p in parts]
    assert sum(map(len, parts)) == 12 and not groups[0] & groups[1] and all(groups)
    assert group_of('a/b/c.mp4', 'parent') == 'a/b'


def test_list_goes_on_after_a_kill(folder):
    first = umt('list', folder, '--processes', '1')
    notes = folder/'list.probes.jsonl'
    for _ in range(600):
        if notes.exists() and notes.read_text().count('\n') >= 3: break
        time.sleep(.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = notes.read_text().count('\n')
    with open(notes, 'a') as file: file.write('{"path": "cut o')
    make_list([str(folder), '--processes', '1'])
    text = notes.read_text()
    assert len(read_manifest(folder/'list.csv')) == 12 and text.count('"state"') == 12 and done >= 3
    make_list([str(folder)])
    assert notes.read_text().count('"state"') == 12, 'nothing is looked at twice'


def test_a_task_that_hangs_or_kills_costs_itself_alone():
    sleeps = each_in_a_process(time.sleep, [0, 100, 0, -1, 0], 2, 1.)
    assert [o.error for o in sleeps] == ['', 'DecoderTimeout', '', 'ValueError', '']
    deaths = list(each_in_a_process(os._exit, [3, 4], 2, 60.))
    assert [(o.error, o.reason) for o in deaths] == [('DecoderCrash', 'the process ended with code 3'),
                                                     ('DecoderCrash', 'the process ended with code 4')]
    assert list(each_in_a_process(time.sleep, [], 2, 1.)) == []


BARE = '''
import time
from umt.data.preparing import each_in_a_process
for outcome in each_in_a_process(time.sleep, [0, 1000, 1000], 3, 500.): print(outcome.error, flush=True)
'''


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_that_hang_end_with_their_parent(tmp_path, number):
    "In a script that is not guarded against being imported, too"
    (tmp_path/'script.py').write_text(BARE)
    run = subprocess.Popen([sys.executable, tmp_path/'script.py'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert run.stdout.readline() == b'\n'
    time.sleep(.5)
    children = [int(pid) for pid in Path(f'/proc/{run.pid}/task/{run.pid}/children').read_text().split()]
    run.send_signal(number)
    assert run.wait(60) == -number and len(children) == 3 and all(map(ends, children))


def test_a_large_answer_comes_whole_and_noise_harms_nobody():
    "What libraries print fills no pipe; bytes come beside the value"
    for n, outcome in zip((1, 5 << 20, 2), each_in_a_process(noisy, [1, 5 << 20, 2], 1, 60.)):
        assert outcome == ({'n': n}, '', '', (b'', b'x' * n, b'y'))


def noisy(n):
    os.write(2, b'warning\n' * 50_000)
    print('z' * 100_000)
    return {'n': n}, [b'', b'x' * n, b'y']


def test_interrupt_says_so_and_goes_on(folder):
    first = umt('list', folder, '--processes', '1', start_new_session=True)
    for _ in range(600):
        if (folder/'list.probes.jsonl').exists(): break
        time.sleep(.05)
    os.killpg(first.pid, signal.SIGINT)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and 'interrupted; the same command goes on' in printed and 'Traceback' not in printed


def test_hidden_and_unreadable_folders(tmp_path):
    (tmp_path/'.cache').mkdir()
    (tmp_path/'.cache/a.mp4').touch()
    (tmp_path/'a.gif').touch()
    found = find_clips(tmp_path)
    assert found.clips == ['a.gif'] and not found.broken


# ---- umt shards ----

def listed(clips): return str(Path(clips.root)/'action_train.csv')


def contents(out): return {p.name: p.read_bytes() for p in sorted(Path(out).glob('*.tar'))}


def test_copies_are_the_files(clips, tmp_path, capsys):
    shards([listed(clips), str(tmp_path/'out'), '--copy', 'True', '--clips-per-shard', '5'])
    packed = read_shards(tmp_path/'out')
    for i in range(len(clips)): assert packed.read(i) == Path(clips.source(i).path).read_bytes()
    assert packed.labels.tolist() == clips.labels.tolist() and packed.ids.tolist() == clips.ids.tolist()
    sums = dict(reversed(line.split('  ')) for line in (tmp_path/'out/index/sha256sums').read_text().splitlines())
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in contents(tmp_path/'out').items()}
    assert '12 clips in 3 shards' in capsys.readouterr().out
    sample = next(iter(webdataset.WebDataset(str(tmp_path/'out/000000.tar'), shardshuffle=False)))
    assert sample['mp4'] == packed.read(0) and json.loads(sample['json'])['sample_id'] == 0


@pytest.mark.parametrize('options', [[], ['--frames', '4']])
def test_killed_at_any_moment_the_shards_are_the_same(clips, tmp_path, options):
    args = [listed(clips), *options, '--clips-per-shard', '3', '--short-side', '32', '--processes', '1']
    shards([args[0], str(tmp_path/'whole'), *args[1:]])
    out, rng = tmp_path/'out', random.Random(len(options))
    for n in range(3):
        run = umt('shards', args[0], out, *args[1:], start_new_session=True)
        for _ in range(600):
            if len(list(out.glob('*.tar'))) > n or run.poll() is not None: break
            time.sleep(.02)
        time.sleep(rng.random() * .3)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    shards([args[0], str(out), *args[1:]])
    assert contents(out) == contents(tmp_path/'whole')
    assert not list(out.glob('.*.tmp'))


def test_broken_clips_are_left_out_and_reported(clips, tmp_path, capsys):
    root, n = tmp_path/'data', len(clips)
    for i in range(n):
        (root/clips.name(i)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips.source(i).path, root/clips.name(i))
    (root/clips.name(2)).write_bytes(b'not a video')
    (root/clips.name(4)).unlink()
    args = [listed(clips), '--root', str(root), '--clips-per-shard', '4', '--short-side', '32', '--processes', '1']
    with pytest.raises(UsageError, match='(?s)1 of 12 clips are broken, more than 1.0%.*000002.mp4: ') as error:
        shards([args[0], str(tmp_path/'strict'), *args[1:]])
    assert error.value.code == 1
    with pytest.raises(UsageError, match='2 clips were left out') as error:
        shards([args[0], str(tmp_path/'out'), *args[1:], '--max-broken', '.2'])
    assert error.value.code == 3
    packed = read_shards(tmp_path/'out')
    assert packed.ids.tolist() == [i for i in range(n) if i not in (2, 4)]
    broken = [json.loads(line) for line in open(tmp_path/'out/index/report.jsonl')]
    assert [(b['row'], b['path']) for b in broken] == [(2, clips.name(2)), (4, clips.name(4))]
    before = contents(tmp_path/'out')
    shutil.copy(clips.source(4).path, root/clips.name(4))
    with pytest.raises(UsageError, match='1 clips were left out'):
        shards([args[0], str(tmp_path/'out'), *args[1:], '--max-broken', '.2'])
    after = contents(tmp_path/'out')
    assert [before[name] == after[name] for name in before] == [True, False, True], 'only the shard of the new file'


def test_mistakes_in_one_line(clips, tmp_path):
    (tmp_path/'full').mkdir()
    (tmp_path/'full/x').touch()
    for args, found in (([str(tmp_path/'none'), 'x'], 'no such list'),
                        ([listed(clips), str(tmp_path/'full')], 'is not empty'),
                        ([listed(clips), 'x', '--frames', '0'], "a number or 'all'"),
                        ([listed(clips), 'x', '--gop', '0'], 'gop'),
                        ([listed(clips), 'x', '--copy', 'True', '--frames', '3'], 'expected one of them')):
        with pytest.raises(UsageError, match=found) as error: shards(args)
        assert error.value.code == 2 and '\n' not in error.value.message


def test_captioned_images_and_shards_of_shards(clips, tmp_path):
    root = tmp_path/'pairs'
    emoji_motion.generate_stills(root, 4, num_objects=8, image_size=64, num_workers=0)
    plain = read_captions(root/'captions_stills_train.json')
    shards([str(root/'captions_stills_train.json'), str(tmp_path/'out'), '--captions', 'True'])
    packed = read_captions(tmp_path/'out')
    assert len(packed) == len(plain) and packed.read(1) == Path(plain.source(1).path).read_bytes()
    write_captions(plain, tmp_path/'c.parquet', 'image')
    shards([listed(clips), str(tmp_path/'a'), '--copy', 'True'])
    shards([str(tmp_path/'a'), str(tmp_path/'b'), '--frames', '2', '--processes', '1'])
    again = read_shards(tmp_path/'b')
    assert again.labels.tolist() == clips.labels.tolist() and again.columns['frame_numbers'][0].as_py() == [3, 9]


# ---- What a clip becomes ----

def film(path, times, size=(48, 32), rate=90000, codec='libx264', **options):
    "A video whose frames have these times; frame i is of brightness 8 i."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
        stream.options, stream.time_base = options, Fraction(1, rate)
        stream.codec_context.time_base = Fraction(1, rate)
        for i, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 8 * i, np.uint8))
            frame.pts, frame.time_base = round(at * rate), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Source(str(path))


def levels(source): return [int(f.to_ndarray(format='rgb24').mean()) // 8 * 8 for _, f in shown_frames(source)]


CONFIG = ShardsConfig(source='x')


def test_encoding_keeps_count_order_and_times(tmp_path):
    times = [0, .04, .08, .2, .24, .5, .54, .58, 1.2, 1.24]
    source = film(tmp_path/'a.mp4', times)
    data, about = encode(source, CONFIG)
    made = Source('a', content=data)
    assert np.allclose([at for at, _ in shown_frames(made)], times, atol=1e-3)
    assert np.allclose(levels(made), levels(source), atol=8) and about['num_frames'] == 10
    assert encode(source, CONFIG)[0] == data, 'the same bytes'


@pytest.mark.parametrize('size, short, expected', [
    ((48, 32), 16, (24, 16)), ((48, 32), 256, (48, 32)), ((64, 36), 18, (32, 18)), ((48, 32), None, (48, 32))])
def test_sizes(tmp_path, size, short, expected):
    source = film(tmp_path/'a.mp4', [0, .1], size)
    config = ShardsConfig(source='x', short_side=short, frames='all')
    _, about = encode(source, config)
    assert (about['width'], about['height']) == expected
    images, about = jpeg_frames(source, config)
    assert (about['width'], about['height']) == expected == Image.open(io.BytesIO(images[0])).size


@pytest.mark.parametrize('frames, numbers', [
    ('all', [*range(10)]), ('4', [1, 3, 6, 8]), ('1', [5]), ('99', [*range(10)])])
def test_which_frames(tmp_path, frames, numbers):
    source = film(tmp_path/'a.mp4', [.1 * i for i in range(10)])
    images, about = jpeg_frames(source, ShardsConfig(source='x', frames=frames))
    assert about['frame_numbers'] == numbers and len(images) == len(numbers) == about['num_frames']
    assert np.allclose(about['frame_times'], [.1 * i for i in numbers], atol=1e-3)


def test_key_frames_lie_as_close_as_asked(tmp_path):
    source = film(tmp_path/'a.mp4', [i / 30 for i in range(31)])
    data, _ = encode(source, ShardsConfig(source='x', gop=10))
    assert sum(frame.key_frame for _, frame in shown_frames(Source('a', content=data))) >= 4


def test_measuring_what_cannot_be_read(tmp_path, capsys):
    (tmp_path/'a.mp4').write_text('no video')
    (tmp_path/'list.csv').write_text('path,label\na.mp4,0\n')
    measure_reading(['--list', str(tmp_path/'list.csv'), '--device-rate', '4200'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[row.index('nan') - 2:row.index('nan')] for row in rows if 'nan' in row] == [['0', '1']] * 4
    for wrong, said in ((['--clips', '0'], "'0', expected a whole number"), (['--image-size', 'x'], "'x', expected")):
        with pytest.raises(SystemExit): measure_reading(['--list', str(tmp_path/'list.csv'), *wrong])
        assert said in capsys.readouterr().err
    (tmp_path/'empty').mkdir()
    with pytest.raises(SystemExit): measure_reading(['--list', str(tmp_path/'empty')])
    assert 'no clips' in capsys.readouterr().err
