"EmojiMotion: the same seed gives the same files, however the run was cut, shared out or repeated."
import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import decord
import numpy as np
import pytest

from umt.data.emoji_motion import generate
from umt.data.emoji_scenes import ACTIONS, CATEGORIES, SCENES, boxes, clip_spec, objects, pose, render, reverse, stills


def contents(root):
    files = [p for p in sorted(Path(root).rglob('*')) if p.is_file() and p.name != '.lock']
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def program(root):
    "A Python program that generates the small data set"
    return ('from umt.data.emoji_motion import generate\n'
            f'generate({str(root)!r}, dict(train=24, val=8), num_workers=0)')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A small data set, made in this process."
    return generate(tmp_path_factory.mktemp('emoji') / 'made', dict(train=24, val=8), num_workers=0)


def test_same_bytes_from_worker_processes(made, tmp_path):
    assert contents(generate(tmp_path / 'again', dict(train=24, val=8), num_workers=2)) == contents(made)


def test_killed_run_is_finished(made, tmp_path):
    root = tmp_path / 'cut'
    process = subprocess.Popen([sys.executable, '-c', program(root)])
    while len(list(root.glob('videos/*/*.mp4'))) < 4 and process.poll() is None: time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / 'complete').exists()
    (root / 'videos/train/.train_000009.mp4.tmp').write_bytes(b'half a clip')
    assert contents(generate(root, dict(train=24, val=8), num_workers=0)) == contents(made)


def test_two_processes_share_a_root(made, tmp_path):
    def start(_): return subprocess.run([sys.executable, '-c', program(tmp_path / 'both')], check=True)
    with ThreadPoolExecutor() as pool: list(pool.map(start, range(2)))
    assert contents(tmp_path / 'both') == contents(made)


def test_other_folders_are_left_alone(made, tmp_path):
    before = contents(made)
    with pytest.raises(ValueError, match=r"num_objects: 120 there, 80 wanted"):
        generate(made, dict(train=24, val=8), num_objects=80)
    with pytest.raises(ValueError, match=r"num_clips: .*24.* there, .*25.* wanted"):
        generate(made, dict(train=25, val=8))
    assert contents(made) == before
    (tmp_path / 'thesis.tex').write_text('')
    with pytest.raises(ValueError, match='not empty'): generate(tmp_path, 6)
    with pytest.raises(ValueError, match='unknown splits'): generate(tmp_path / 'new', dict(train=1, dev=1))
    with pytest.raises(ValueError, match='num_objects=9999'): objects(9999)
    assert [p.name for p in tmp_path.iterdir() if p.name != '.lock'] == ['thesis.tex']


def test_files_hold_what_was_drawn(made):
    spec = clip_spec('val', 3)
    video = decord.VideoReader(str(made / f'videos/val/{spec.id}.mp4'), num_threads=1)
    assert len(video) == 24 and video.get_avg_fps() == 12
    whole = video.get_batch(range(24)).asnumpy()
    assert np.abs(whole - render(spec).astype(float)).mean() < 6
    again = decord.VideoReader(str(made / f'videos/val/{spec.id}.mp4'), num_threads=1)
    assert (again.get_batch([22, 5]).asnumpy() == whole[[22, 5]]).all()


def test_annotations_agree(made):
    for split, n in dict(train=24, val=8).items():
        specs = {f'videos/{split}/{s.id}.mp4': s for s in (clip_spec(split, i) for i in range(n))}
        for kind, names, label in (('category', CATEGORIES, lambda s: s.lead.object.category),
                                   ('action', ACTIONS, lambda s: s.lead.action),
                                   ('scene', SCENES, lambda s: s.scene)):
            rows = [line.split(' ') for line in (made / f'{kind}_{split}.csv').read_text().splitlines()]
            written = [(path, names[int(value)]) for path, value in rows]
            assert written == [(path, label(s)) for path, s in specs.items()]
            assert (made / f'{kind}_classes.txt').read_text().split('\n')[:-1] == list(names)
        told = {e['video'] for e in json.loads((made / f'captions_{split}.json').read_text())}
        assert told == {path for path, s in specs.items() if not s.heldout}
        questions = json.loads((made / f'qa_{split}.json').read_text())
        assert {e['video'] for e in questions} == told and len({e['question_id'] for e in questions}) == len(questions)
        assert {e['answer'] for e in questions} <= set(json.loads((made / 'answers.json').read_text()))
        rows = list(csv.reader(open(made / f'boxes_{split}.csv')))
        assert len(rows) == sum((~np.isnan(boxes(s)[..., 0])).sum() for s in specs.values())
        for path, seconds, *box, action, actor in rows:
            track = boxes(specs[path])[int(actor), round(float(seconds) * 12)]
            assert np.allclose(np.array(box, float), track, atol=1e-4)
            assert specs[path].actors[int(actor)].action == ACTIONS[int(action) - 1]


def test_heldout_words_are_in_no_training_text(tmp_path):
    root = generate(tmp_path / 'r', dict(train=80), num_objects=120, image_size=16, num_frames=2, num_workers=0)
    hidden = [o.name for o in objects(120) if o.heldout]
    assert any(json.loads(line)['heldout'] for line in open(root / 'metadata_train.jsonl'))
    words = (root / 'captions_train.json').read_text() + (root / 'qa_train.json').read_text()
    assert not [name for name in hidden if re.search(rf'\b{name}\b', words)]
    assert not list(root.glob('*train_heldout*'))


def test_reversal_is_exact_for_companions_too():
    specs = [clip_spec('test', i, image_size=64, num_frames=9) for i in range(60)]
    for spec in [spec for spec in specs if len(spec.actors) > 1]:
        assert (render(reverse(spec)) == render(spec)[::-1]).all()


def test_lead_is_the_largest_and_stays_in_the_picture():
    for spec in (clip_spec('train', i) for i in range(400)):
        side = [[pose(a, t, 24)[2] for t in range(24)] for a in spec.actors]
        assert min(side[0]) > max((max(s) for s in side[1:]), default=0)
        x, y = np.array([pose(a, t, 24)[:2] for a in spec.actors for t in range(24)]).T
        assert min(x.min(), y.min()) > .05 and max(x.max(), y.max()) < .95


def test_splits_and_seeds_share_nothing():
    parts = [(split, seed) for split in ('train', 'val', 'test') for seed in (0, 1)]
    seen = Counter(clip_spec(split, i, seed).texture for split, seed in parts for i in range(100))
    assert max(seen.values()) == 1
    a, b = (stills(4, seed=0, split=split)[0] for split in ('train', 'val'))
    assert not (a == b).all(axis=(1, 2, 3)).any()
