"Stage 1 as a user starts it: on own clips, with mistakes, with clips that cannot be read, stopped and continued."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umt.core.config import UsageError, override
from umt.core.signals import Preempted
from umt.data import emoji_motion
from umt.data.media import TooManyBadClips
from umt.models.published import load_model
from umt.tasks import stage1
from umt.training import loop

QUICK = ['--preset', 'quick_emoji', '--epochs', '2', '--batch-size', '4', '--log-every', '1']


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "A folder of twelve clips that is not EmojiMotion's, and its list."
    made = emoji_motion.generate(tmp_path_factory.mktemp('emoji'), {'train': 12}, num_workers=0)
    root = tmp_path_factory.mktemp('mine')
    for i, file in enumerate(sorted((made/'videos/train').glob('*.mp4'))): shutil.copy(file, root/f'{i}.mp4')
    (root/'mine.csv').write_text(''.join(f'{i}.mp4 0\n' for i in range(12)))
    return root


@pytest.fixture
def own(clips, tmp_path):
    "A copy of it that a test may damage."
    return Path(shutil.copytree(clips, tmp_path/'mine'))


def command(root, *options):
    return [*QUICK, '--data-root', str(root), '--train-list', 'mine.csv', *map(str, options)]


def start(root, *options, seconds=120):
    "In a process of its own; exit code, standard output, standard error."
    run = [sys.executable, '-m', 'umt.tasks.stage1', *command(root, *options)]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(run, capture_output=True, text=True, timeout=seconds, env=env)
    return done.returncode, done.stdout, done.stderr


def refused(capsys, root, *options):
    "The line that ends the program, in this process; the code is 2."
    with pytest.raises(UsageError) as error: stage1.main(command(root, *options))
    assert error.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith('umt stage1: error: ') or ': error: ' in shown
    return shown


# options and files

MISTAKES = {
    'log_every': (['--log-every', 0], 'log_every 0: expected at least 1'),
    'epochs': (['--epochs', 0], 'epochs 0: expected at least 1'),
    'lr': (['--lr', 'nan'], 'lr'),
    'warmup': (['--warmup-epochs', -1], 'warmup_epochs -1.0: expected at least 0'),
    'keep': (['--keep-checkpoints', -1], 'keep_checkpoints -1: expected at least 1'),
    'aligned': (['--aligned-layers', 0], 'aligned_layers 0: expected at least 1'),
    'layers': (['--aligned-layers', 9], 'aligned_layers=9'),
    'name': (['--mask-ration', .5], "did you mean 'mask_ratio'"),
    'choice': (['--mask', 'semantik'], 'semantic'),
    'list': (['--train-list', 'yours.csv'], 'yours.csv'),
    'batch': (['--batch-size', 16], '12 clips, fewer than batch_size 16'),
    'teacher': (['--teacher', 'nona'], 'nona'),
    'grid': (['--image-size', 96], 'patches per side'),
    'watch': (['--validation.every', 1], 'validation.every needs data.val_list'),
}


@pytest.mark.parametrize('dry', [False, True], ids=['run', 'dry-run'])
@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line_that_names_it(capsys, clips, tmp_path, name, dry):
    options, expected = MISTAKES[name]
    line = refused(capsys, clips, *options, '--run-dir', tmp_path/'run', *['--dry-run'] * dry)
    assert expected in line and not (tmp_path/'run'/'checkpoints').exists()


def test_a_presets_leftovers_do_not_reach_other_data(caplog, clips, tmp_path):
    before = sorted(clips.iterdir())
    caplog.set_level('INFO', 'umt')
    stage1.main(command(clips, '--run-dir', tmp_path, '--dry-run'))
    assert '12 clips x 2 epochs' in caplog.text
    assert sorted(clips.iterdir()) == before, 'nothing was generated in it'


def test_a_dry_run_makes_nothing(caplog, tmp_path):
    caplog.set_level('INFO', 'umt')
    folders = ['--data-root', str(tmp_path/'data'), '--run-dir', str(tmp_path/'run')]
    stage1.main(['--preset', 'nano_emoji', *folders, '--dry-run'])
    assert 'EmojiMotion with 2,000 training clips would be made' in caplog.text and not list(tmp_path.iterdir())


def test_a_leftover_data_folder_is_refused(capsys, tmp_path):
    emoji_motion.generate(tmp_path/'data', {'train': 4}, num_workers=0)
    argv = ['--preset', 'quick_emoji', '--data-root', str(tmp_path/'data'), '--run-dir', str(tmp_path/'run')]
    for options in ([], ['--dry-run']):
        with pytest.raises(UsageError): stage1.main([*argv, *options])
        assert 'holds another EmojiMotion' in capsys.readouterr().err


def test_a_file_with_the_name_of_a_choice_changes_nothing(clips, tmp_path, monkeypatch):
    "Only options whose type says so name files."
    from umt.tasks.task import input_hashes
    config = override(stage1.PRESETS['quick_emoji'], data_root=str(clips), train_list='mine.csv')
    before = input_hashes(config)
    monkeypatch.chdir(tmp_path)
    for name in ('joint', 'l2', 'sparse', 'fp32', 'semantic', 'imagenet', 'end'): (tmp_path/name).write_text('x')
    assert input_hashes(config) == before and 'data.train_list' in before


# clips that cannot be read

@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_that_fails_ends(own, tmp_path, workers):
    "Severity 5: a failed run with loader workers never ended."
    for i in range(12): (own/f'{i}.mp4').write_bytes(b'no video')
    code, out, err = start(own, '--run-dir', tmp_path/'run', '--num-workers', workers)
    assert code == 1 and 'clips could be decoded' in out + err


def test_too_many_bad_clips_end_the_run(own, tmp_path):
    (own/'3.mp4').write_bytes(b'no video')
    code, _, err = start(own, '--run-dir', tmp_path/'run', '--num-workers', 2)
    assert code == 1 and '1 of 12 clips cannot be decoded, more than 1.0%' in err
    assert '3.mp4' in (tmp_path/'run/quarantine.jsonl').read_text()


ODD = {'damaged': lambda f: f.write_bytes(b'no video'), 'empty': lambda f: f.write_bytes(b''),
       'gone': lambda f: f.unlink(),
       'loop': lambda f: (f.unlink(), f.symlink_to(f.name)),
       'outside': lambda f: (f.unlink(), f.symlink_to('/etc/hostname'))}


@pytest.mark.parametrize('kind', ODD)
def test_an_odd_clip_is_replaced_and_listed(own, tmp_path, kind):
    ODD[kind](own/'5.mp4')
    stage1.main(command(own, '--run-dir', tmp_path/'run', '--bad-clip-limit', .2))
    rows = [json.loads(line) for line in (tmp_path/'run/quarantine.jsonl').read_text().splitlines()]
    assert [row['path'] for row in rows] == ['5.mp4'] and rows[0]['reason']


# stopped, continued, evaluated on the way

def test_a_changed_list_is_refused(capsys, own, tmp_path):
    "The same command on a list that was shortened since."
    stage1.main(command(own, '--run-dir', tmp_path/'run'))
    (own/'mine.csv').write_text(''.join(f'{i}.mp4 0\n' for i in range(8)))
    assert 'data.train_list' in refused(capsys, own, '--run-dir', tmp_path/'run')


def test_evaluation_on_the_way_survives_a_stop(own, tmp_path, monkeypatch):
    "Stopped after each evaluation and continued: the same weights, bit for bit, and the same choice of the best ones."
    (own/'val.csv').write_text(''.join(f'{i}.mp4 0\n' for i in range(4)))
    on_the_way = {'data.val_list': 'val.csv', 'validation.every': 1, 'validation.select': 'best'}
    config = override(stage1.PRESETS['quick_emoji'], on_the_way, data_root=str(own), train_list='mine.csv', epochs=3,
                      batch_size=4, log_every=1)
    straight = stage1.pretrain(override(config, run_dir=str(tmp_path/'straight')))
    stopped, keep = override(config, run_dir=str(tmp_path/'stopped')), loop.train_step

    def stop_at(limit):
        def step(s, number, stop):
            keep(s, number, stop)
            s.guard.stop |= number + 1 >= limit
        return step
    for limit in (4, 7):
        monkeypatch.setattr(loop, 'train_step', stop_at(limit))
        with pytest.raises(Preempted): stage1.pretrain(stopped)
    monkeypatch.setattr(loop, 'train_step', keep)
    result = stage1.pretrain(stopped)
    assert result['selected'] == straight['selected'] and result['selected']['split'] == 'val (val.csv)'
    a, b = (load_model(tmp_path/name).state_dict() for name in ('straight', 'stopped'))
    assert all(torch.equal(a[name], b[name]) for name in a)
    records = [[json.loads(line) for line in open(tmp_path/name/'metrics.jsonl')] for name in ('straight', 'stopped')]
    cosines = [[(r['step'], r['cosine']) for r in run if 'cosine' in r] for run in records]
    assert cosines[0] == cosines[1] and [step for step, _ in cosines[0]] == [3, 6, 9]


@pytest.mark.parametrize('num_workers', (0, 1))
def test_a_validation_clip_that_cannot_be_decoded_does_not_count(own, num_workers, tmp_path, caplog):
    "It is named, and left out of the mean; too many of them end the run."
    (own/'val.csv').write_text(''.join(f'{i}.mp4 0\n' for i in range(4)))
    (own/'bad.mp4').write_text('no video')
    (own/'bad.csv').write_text((own/'val.csv').read_text() + 'bad.mp4 0\n')
    (own/'worse.csv').write_text((own/'bad.csv').read_text() + 'bad.mp4 0\n')
    config = override(stage1.PRESETS['quick_emoji'], data_root=str(own), train_list='mine.csv', val_list='val.csv',
                      epochs=1, batch_size=4, num_workers=num_workers, **{'validation.every': 1})
    def cosine(name):
        stage1.pretrain(override(config, val_list=name, run_dir=str(tmp_path/name)))
        return [json.loads(line) for line in open(tmp_path/name/'metrics.jsonl')][-1]['cosine']
    assert cosine('bad.csv') == pytest.approx(cosine('val.csv'), abs=1e-6)
    assert '1 of 5 clips cannot be decoded and are left out:\n  bad.mp4: ' in caplog.text
    with pytest.raises(TooManyBadClips, match='2 of 6 clips'): cosine('worse.csv')


def test_help_groups_options_and_explains_them():
    command = [sys.executable, '-m', 'umt.experiments.command', 'stage1', '--help']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = ' '.join(re.sub('[│╭╮╰╯─]', ' ', done.stdout).split())
    group = ('mask options', '--mask.ratio FLOAT', 'share of tokens dropped', '{semantic,random,tube,none}')
    for expected in (*group, '--preset'):
        assert expected in text
