"Recognition: recipes against the published ones, views, processes, classifiers by name, starts, mistakes"
import json, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from umt.core.config import UsageError, leaves, override
from umt.data import emoji_motion
from umt.data.labelled import read_clips, read_test_clips, view_dataset
from umt.data.media import DataError
from umt.data.packing import main as shards
from umt.data.tables import read_manifest
from umt.data.transforms import normalize_video
from umt.models.backbone import position_table
from umt.models.heads import Recognizer
from umt.models.multimodal import Multimodal
from umt.models.published import load_model, save_model, save_published
from umt.models.student import SIZES, Student
from umt.tasks import evaluators, recognition
from umt.tasks.evaluators import clip_probabilities, dependencies, predict, scores
from umt.tasks.recognition import (
    PRESETS, PUBLISHED, EvaluationConfig, build_model, dry_run, evaluate, evaluation_of, finetune, main)
from umt.tasks.recognizers import build_saved
from umt.training.schedule import layer_groups, learning_rate

# The published recipes, script by script: start, batch per GPU (of 16), repeated augmentation, learning rate used,
# epochs, warm-up, drop path, layer decay, weight decay, checkpointed blocks, segments, crops.
SCRIPTS = {
    'b16_k710': ('b16_k710', 16, 2, 4e-4, 35, 2, .1, .75, .05, 0, 4, 3),
    'l16_k710': ('l16_k710', 16, 2, 2e-4, 20, 2, .2, .85, .05, 12, 4, 3),
    **{f'b16_{k}': ('b16_k710_ftk710', 16, 2, 4e-5, 5, 1, .1, .75, .05, 0, 4, 3) for k in ('k400', 'k600', 'k700')},
    **{f'l16_{k}': ('l16_k710_ftk710', 16, 2, 2e-5, 5, 1, .2, .85, .05, 12, 4, 3) for k in ('k400', 'k600', 'k700')},
    **{f'l16_{k}_f16': ('l16_k710_ftk710', 8, 2, 1e-5, 5, 1, .2, .85, .05, 16, 4, 3) for k in ('k400', 'k600', 'k700')},
    'b16_mit': ('b16_k710_ftk710_ftk400', 32, 1, 2e-4, 40, 5, .1, .75, .05, 0, 4, 3),
    'b16_mit_384': ('b16_k710_ftk710_ftk400_ftmit', 16, 1, 1e-5, 4, 1, .1, .75, .1, 8, 4, 3),
    'l16_mit': ('l16_k710_ftk710_ftk400', 32, 1, 2e-4, 20, 5, .2, .85, .05, 12, 4, 3),
    'l16_mit_384': ('l16_k710_ftk710_ftk400_ftmit', 8, 1, 5e-6, 4, 1, .2, .85, .1, 18, 6, 3),
    'b16_ssv2': ('b16_k710', 16, 2, 4e-4, 30, 5, .1, .75, .05, 0, 2, 3),
    'l16_ssv2': ('l16_k710', 16, 2, 8e-4, 14, 4, .2, .85, .05, 12, 2, 3),
}
CLASSES = dict(k710=710, k400=400, k600=600, k700=700, mit=339, ssv2=174)


@pytest.mark.parametrize('name', SCRIPTS)
def test_published_recipes(name):
    start, batch, sample, lr, epochs, warmup, *rest = SCRIPTS[name]
    drop_path, layer_decay, weight_decay, blocks, segments, crops = rest
    c, task = PUBLISHED[name], name.split('_')[1]
    loop, adam, data, augment, student, views = c.loop, c.optimizer, c.data, c.augment, c.student, c.views
    assert PRESETS[name] is c and c.start.init == f'runs/{start}'
    assert (loop.batch_size, loop.micro_batch_size, loop.num_sample) == (16 * batch, batch, sample)
    scale, n = 16 * batch * sample / 256, 100
    def rate(step): return learning_rate(step, adam, n, loop.epochs, loop.batch_size * loop.num_sample)
    assert_close(rate(warmup * n), lr)
    assert_close([rate(0), rate(warmup * n - 1)], [1e-6 * scale, lr])
    end = rate(epochs * n - 1)
    assert_close(adam.min_lr * scale, 1e-6 * scale)
    assert 1e-6 * scale < end < 1e-6 * scale + 1e-3 * lr
    assert (loop.epochs, adam.warmup_epochs) == (epochs, warmup)
    assert (student.drop_path, c.layer_decay) == (drop_path, layer_decay)
    assert (adam.weight_decay, student.checkpoint_blocks) == (weight_decay, blocks)
    assert (views.num_segments, views.num_crops) == (segments, crops)
    assert (adam.betas, adam.eps, loop.clip_grad, loop.ema_decay) == ((.9, .999), 1e-8, None, None)
    assert (c.device.precision, c.loader.num_workers) == ('fp16', 12)
    assert (augment.mixup, augment.cutmix, augment.label_smoothing) == (.8, 1., .1)
    assert (augment.rand_augment, augment.random_erasing) == ('rand-m7-n4-mstd0.5-inc1', .25)
    assert (augment.crop, c.pool_grid, student.patch_size, c.mode) == ('random_resized', (1, 1, 1), 16, 'full')
    assert (student.tubelet_size, student.attention) == (1, 'joint')
    assert (data.num_classes, data.train_list, data.val_list) == (CLASSES[task], f'{task}_train.csv', f'{task}_val.csv')
    assert data.classes == (f'{task}_classes.txt' if task[0] == 'k' else None)
    assert data.num_frames == (16 if name.endswith('f16') else 8)
    assert data.image_size == (384 if name.endswith('384') else 224)
    assert student.size == ('large' if name[0] == 'l' else 'base')
    rules = ('ssv2_train', 'ssv2_test') if task == 'ssv2' else ('kinetics_sparse_train', 'kinetics_sparse_test')
    assert augment.flip == (task != 'ssv2') and (data.sampling, views.sampling) == rules
    carried = task in ('k400', 'k600', 'k700') or name.endswith('384')
    assert c.start.head == ('carry' if carried else 'fresh' if task == 'mit' else None)


def test_all_recipes_are_checked(): assert set(SCRIPTS) == set(PUBLISHED)


@pytest.mark.parametrize('size, decay, stem, last', [('base', .75, .0238, .75), ('large', .85, .0172, .85)])
def test_layer_decay(size, decay, stem, last):
    with torch.device('meta'): model = Recognizer(400, **SIZES[size])
    scale = {id(p): (g['lr_scale'], g['weight_decay']) for g in layer_groups(model, .05, decay) for p in g['params']}
    found = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(list(model.parameters()))
    assert_close(found['encoder.patch_embed.proj.weight'][0], stem, rtol=0, atol=5e-5)
    blocks = sorted({name.split('.')[2] for name in found if '.blocks.' in name}, key=int)
    assert_close(found[f'encoder.blocks.{blocks[-1]}.mlp.fc1.weight'][0], last)
    assert found['fc_norm.weight'] == (1., 0.) and found['head.weight'] == (1., .05) and found['head.bias'] == (1., 0.)
    assert found['encoder.blocks.0.attn.q_bias'][1] == 0.


# ---- A few clips on disk; two of them share their file name ----

DATA = dict(image_size=48, num_frames=2, num_classes=3, val_list='val.csv', eval_batch_size=5)
TRAINING = dict(
    pool_grid='1,1,1', batch_size=4, epochs=1, warmup_epochs=0, train_clips=None, train_list='train.csv', log_every=1)


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clips')
    emoji_motion.generate(folder/'emoji', {'train': 8, 'val': 8, 'test': 8}, num_workers=0)
    val, train = sorted((folder/'emoji').rglob('val_*.mp4')), sorted((folder/'emoji').rglob('train_*.mp4'))
    names = ['a/clip.mp4', 'b/clip.mp4', *(f'{n}.mp4' for n in range(5))]
    for name, path in zip(names, val):
        (folder/name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder/name)
    for n, path in enumerate(train): shutil.copy(path, folder/f'train{n}.mp4')
    (folder/'val.csv').write_text(''.join(f'{name},{i % 3}\n' for i, name in enumerate(names)))
    (folder/'train.csv').write_text(''.join(f'train{n}.mp4,{n % 3}\n' for n in range(8)))
    (folder/'broken.mp4').write_bytes(b'no video')
    (folder/'broken.csv').write_text((folder/'val.csv').read_text() + 'broken.mp4,0\n')
    (folder/'one.csv').write_text('a/clip.mp4,2\n')
    (folder/'classes.txt').write_text('jumping jacks\nt\'ai chi\nriding (a) mule\n')
    return folder


def small(clips, run_dir, **changes):
    "A training run of seconds"
    places = dict(data_root=str(clips), run_dir=str(run_dir))
    return override(PRESETS['quick_emoji'], DATA | TRAINING | places | changes)


def test_of(clips, run_dir, init, **changes):
    "An evaluation of seconds"
    places = dict(data_root=str(clips), run_dir=str(run_dir), init=str(init))
    return override(EvaluationConfig(), DATA | places | changes)


test_of.__test__ = False # not a test itself


@pytest.fixture(scope='module')
def fine(clips, tmp_path_factory):
    "A recogniser of 3 classes that is sure of itself"
    folder = tmp_path_factory.mktemp('fine')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recognizer(3, image_size=48, num_frames=2, init_scale=1., **SIZES['nano'])
        nn.init.normal_(model.head.weight)
    save_model(model, folder)
    return folder


def command_line(config):
    def text(value): return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
    alone = ['evaluate'] if isinstance(config, EvaluationConfig) else []
    return alone + [f'--{leaf.name.replace("_", "-")}={text(leaf.value)}' for leaf in leaves(config)]


def mistake(capsys, *argv):
    "The one line that a user's mistake ends in"
    capsys.readouterr()
    with pytest.raises(UsageError) as ended: main([*argv])
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'error: ' in str(ended.value)
    return str(ended.value) + line


WORKER = """import json, sys
from umt.tasks.recognition import main
for argv in json.loads(sys.argv[1]):
    try: main(argv)
    except SystemExit as end: print(f'ended {end.code}: {end}', flush=True)"""


@pytest.fixture(scope='module')
def together(clips, fine, tmp_path_factory):
    "The runs that two processes do together, one after the other: their configs by name, and what was printed"
    folder = tmp_path_factory.mktemp('together')
    def tested(name, **changes): return test_of(clips, folder/name, fine, **changes)
    configs = dict(
        views=tested('views', sampling='kinetics_sparse_val', num_segments=2, num_crops=3),
        broken=tested('broken', val_list='broken.csv'),
        refused=tested('refused', val_list='broken.csv', missing='error'),
        one=tested('one', val_list='one.csv'),
        linear=small(clips, folder/'linear', mode='linear', init=str(fine), head='fresh', epochs=3),
        fsdp=small(clips, folder/'fsdp', sharding='fsdp'))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--no-python']
    argv = [*launch, sys.executable, '-c', WORKER, json.dumps([command_line(c) for c in configs.values()])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return configs, done.stdout + done.stderr


def stored(config): return json.loads(Path(config.run_dir, 'evaluation.json').read_text())


def predictions(run_dir): return pd.read_parquet(Path(run_dir)/'predictions.parquet')


def views_of(table, column):
    "A column of predictions as a tensor"
    nested = column == 'logits'
    return torch.tensor([[list(v) for v in row] if nested else list(row) for row in table[column]])


# ---- Figures ----

def test_views_are_averaged_as_probabilities():
    "By hand: softmax of each view, then the mean. Averaging logits, or log-probabilities, would choose the other class"
    logits = torch.tensor([[[.8, .2], [.8, .2], [1e-6, 1 - 1e-6]]]).log() + torch.tensor([[[3.], [0.], [-7.]]])
    assert_close(clip_probabilities(logits), torch.tensor([[1.600001 / 3, 1.399999 / 3]]))
    assert clip_probabilities(logits).argmax() == 0 and logits.mean(1).argmax() == 1


def test_scores_by_hand():
    p = torch.tensor([[.6, .4], [.3, .7], [.9, .1]])
    found = scores(p, torch.tensor([0, 0, 1]))
    assert found == {
        'num_clips': 3, 'top1': pytest.approx(1 / 3), 'top5': 1., 'per_class': [.5, 0.], 'confusion': [[1, 1], [1, 0]]}
    assert 'confusion' not in scores(torch.rand(2, 1001), torch.tensor([0, 5]))


# ---- Several processes ----

def test_processes_share_an_evaluation(clips, fine, together, tmp_path):
    "Seven clips, six views each: one process and two find the same, clip by clip, and two files of one name stay two"
    configs, printed = together
    alone = override(configs['views'], run_dir=str(tmp_path/'alone'))
    result, shared = evaluate(alone), stored(configs['views'])
    assert shared == result and shared['num_clips'] == 7
    one, two = (predictions(c.run_dir) for c in (alone, configs['views']))
    assert list(one.path) == list(two.path) == ['a/clip.mp4', 'b/clip.mp4', *(f'{n}.mp4' for n in range(5))]
    assert list(two.label) == [0, 1, 2, 0, 1, 2, 0] and list(two.sample_id) == list(range(7))
    assert views_of(one, 'logits').shape == (7, 6, 3)
    assert_close(views_of(one, 'logits'), views_of(two, 'logits'), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(views_of(two, 'logits')[0], views_of(two, 'logits')[1], atol=1e-3)
    data, model = view_dataset(read_manifest(clips/'val.csv'), alone.data, alone.views), load_model(fine).eval()
    with torch.no_grad(): expected = torch.stack([model(normalize_video(data[0, i]['video'])) for i in range(7)])
    assert_close(views_of(two, 'logits'), expected, rtol=1e-4, atol=1e-4)
    assert_close(views_of(two, 'probabilities'), expected.softmax(-1).mean(1), rtol=1e-4, atol=1e-5)


def test_processes_agree_on_clips_that_cannot_be_decoded(together):
    configs, printed = together
    found = stored(configs['broken'])
    assert (found['num_clips'], found['num_left_out']) == (7, 1) and found['left_out'][0]['path'] == 'broken.mp4'
    assert list(predictions(configs['broken'].run_dir).path) == list(predictions(configs['views'].run_dir).path)
    assert printed.count('ended 1: ') == 2 and '1 of 8 clips cannot be decoded' in printed
    left = ('evaluation.json', 'predictions.parquet')
    assert not any(Path(configs['refused'].run_dir, file).exists() for file in left)


def test_more_processes_than_clips(together): assert stored(together[0]['one'])['num_clips'] == 1


def test_two_processes_train_a_probe(together, tmp_path):
    two = together[0]['linear']
    one = override(two, run_dir=str(tmp_path/'one'))
    result, shared = finetune(one), stored(two)
    tables = [load_file(Path(c.run_dir)/'features.safetensors') for c in (one, two)]
    assert tables[0]['features'].shape == (8, 128)
    for name in tables[0]: assert_close(tables[0][name], tables[1][name], rtol=1e-4, atol=1e-5)
    assert_close(load_model(two.run_dir).head.weight, load_model(one.run_dir).head.weight, rtol=1e-3, atol=1e-4)
    same = ('num_clips', 'top1', 'confusion')
    assert {k: shared[k] for k in same} == {k: result[k] for k in same}


def test_a_sharded_model_is_evaluated_whole(together):
    config = together[0]['fsdp']
    model, table = load_model(config.run_dir).eval(), predictions(config.run_dir)
    assert len(table) == 7
    with torch.no_grad(): logits = model(normalize_video(read_clips(config).val[0, 6]['video']))[0]
    assert_close(torch.tensor(list(table.logits[6][0])), logits, rtol=1e-4, atol=1e-5)


# ---- Which evaluation is it? ----

def test_an_evaluation_is_kept_and_another_one_refused(clips, fine, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluators, 'predict', lambda *args, **kwargs: calls.append(1) or predict(*args, **kwargs))
    config = test_of(clips, tmp_path/'run', fine)
    first = evaluate(config)
    assert evaluate(config) == first and len(calls) == 1
    changes = {
        r'protocol\.segments: 1 -> 2': dict(num_segments=2), r'protocol\.num_frames: 2 -> 4': dict(num_frames=4),
        r'protocol\.precision': dict(precision='bf16'), r'clips\.list': dict(val_list='one.csv')}
    for differs, change in changes.items():
        with pytest.raises(ValueError, match=f'holds another evaluation .*{differs}'):
            evaluate(override(config, change))
    assert evaluate(override(config, eval_batch_size=1)) == first and len(calls) == 1


def test_another_copy_of_the_clips_is_not_answered_with_the_old_score(clips, fine, tmp_path):
    config, other = test_of(clips, tmp_path/'run', fine), tmp_path/'other'
    shutil.copytree(clips, other, ignore=shutil.ignore_patterns('emoji'))
    evaluate(config)
    evaluate(override(config, data_root=str(other))) # the same files elsewhere
    shutil.copy(other/'2.mp4', other/'a/clip.mp4')
    assert (other/'2.mp4').stat().st_size != (clips/'a/clip.mp4').stat().st_size
    with pytest.raises(ValueError, match=r'clips\.file_sizes'): evaluate(override(config, data_root=str(other)))


@pytest.mark.parametrize('one, two', [(dict(pool_grid=(2, 3, 3)), dict(pool_grid=(2, 3, 3), num_heads=2)),
                                      (dict(pool_grid=(1, 3, 2)), dict(pool_grid=(1, 2, 3)))])
def test_networks_of_the_same_weights_are_told_apart(clips, tmp_path, one, two):
    config = test_of(clips, tmp_path, 'unused')
    data = read_test_clips(config)
    first, second = (Recognizer(3, image_size=48, num_frames=2, **SIZES['nano'] | changes) for changes in (one, two))
    second.load_state_dict(first.state_dict())
    one, two = (dependencies(config, model, data.val, config.views) for model in (first, second))
    assert one['weights'] == two['weights'] and one['model'] != two['model']


def test_a_protocol_that_differs_from_the_training_is_said(clips, fine, tmp_path, caplog):
    config = test_of(clips, tmp_path/'run', fine, num_frames=4, image_size=64)
    with caplog.at_level('WARNING'): result = evaluate(config)
    assert result['other_protocol'] == ['num_frames: 2 -> 4', 'image_size: 48 -> 64']
    assert any('num_frames: 2 -> 4' in record.getMessage() for record in caplog.records)
    assert evaluate(test_of(clips, tmp_path/'same', fine))['other_protocol'] == []


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_evaluation(clips, fine, tmp_path, precision):
    full, half = (evaluate(test_of(clips, tmp_path/p, fine, precision=p)) for p in ('fp32', precision))
    one, two = (views_of(predictions(tmp_path/p), 'probabilities') for p in ('fp32', precision))
    assert_close(one, two, rtol=0, atol=.1)
    assert not torch.equal(one, two) and half['num_clips'] == full['num_clips']


# ---- Clips and lists ----

def test_lists(clips, fine, tmp_path):
    "Clips that are not there, labels that cannot be, names that do not fit"
    config = test_of(clips, tmp_path/'run', fine, val_list='lost.csv')
    (clips/'lost.csv').write_text('a/clip.mp4,0\nlost/clip.mp4,1\nb/clip.mp4,1\n')
    with pytest.raises(FileNotFoundError, match='1 of 3 clips are not in .*\n  lost/clip.mp4'): read_test_clips(config)
    result = evaluate(override(config, missing='drop'))
    assert (result['num_clips'], result['left_out']) == (2, [dict(path='lost/clip.mp4', reason='not there')])
    (clips/'wrong.csv').write_text('a/clip.mp4,0\nb/clip.mp4,3\n')
    with pytest.raises(ValueError, match='(?s)1 labels outside 0 .. 2 .*\n  b/clip.mp4: 3'):
        read_test_clips(override(config, val_list='wrong.csv'))
    (clips/'two.txt').write_text('one\ntwo\n')
    (clips/'low.csv').write_text('a/clip.mp4,1\n')
    with pytest.raises(ValueError, match='2 class names, but num_classes is 3'):
        read_test_clips(override(config, val_list='low.csv', classes='two.txt'))


def test_one_of_the_test_clips_cannot_be_decoded(clips, tmp_path):
    "After days of training: the others are evaluated. Two of two are too many"
    (clips/'half.csv').write_text('a/clip.mp4,0\nbroken.mp4,1\n')
    (clips/'none.csv').write_text('broken.mp4,1\n')
    config = small(clips, tmp_path/'run', val_list='half.csv')
    result = finetune(override(config, {'validation.every': 1}))
    assert (result['num_clips'], result['num_left_out'], result['left_out'][0]['path']) == (1, 1, 'broken.mp4')
    assert 'UnreadableVideo' in result['left_out'][0]['reason']
    strict = small(clips, tmp_path/'strict', val_list='half.csv', missing='error')
    with pytest.raises(DataError, match='1 of 2 clips cannot be decoded'): finetune(strict)
    assert (tmp_path/'strict/model.safetensors').exists()
    nothing_left = test_of(clips, tmp_path/'none', tmp_path/'run', val_list='none.csv')
    with pytest.raises(DataError, match='1 of 1 clips'): evaluate(nothing_left)


def test_links_that_lead_out_or_in_a_circle(clips, tmp_path):
    "In training they are replaced and listed, in a test left out"
    root = tmp_path/'data'
    shutil.copytree(clips, root, ignore=shutil.ignore_patterns('emoji'))
    (root/'out.mp4').symlink_to(clips/'train0.mp4')
    (root/'circle.mp4').symlink_to(root/'circle.mp4')
    for name in ('train', 'val'):
        (root/f'linked_{name}.csv').write_text((root/f'{name}.csv').read_text() + 'out.mp4,0\ncircle.mp4,1\n')
    lists = dict(train_list='linked_train.csv', val_list='linked_val.csv')
    result = finetune(small(root, tmp_path/'run', bad_clip_limit=.5, epochs=3, **lists))
    assert (result['num_clips'], result['num_left_out'], result['quarantined']) == (7, 2, 2)
    assert all('link' in clip['reason'] for clip in result['left_out'])


def test_official_annotations(clips, fine, tmp_path):
    "Kinetics' columns: names are taken from the training list, kept in the run, and label the evaluation"
    header = 'label,youtube_id,time_start,time_end,split\n'
    names = ['jumping jacks', "t'ai chi", 'riding (a) mule']
    for split, count in (('train', 6), ('val', 4)):
        rows = [f'{names[n % 3 if split == "train" else 1]},{split}video{n},1,11,{split}\n' for n in range(count)]
        for n in range(count): shutil.copy(clips/f'train{n}.mp4', clips/f'{split}video{n}_000001_000011.mp4')
        (clips/f'k_{split}.csv').write_text(header + ''.join(rows))
    config = small(clips, tmp_path/'run', annotations='kinetics', train_list='k_train.csv', val_list='k_val.csv',
                   mode='linear', num_classes=None)
    data = read_clips(config)
    assert data.names == sorted(names) and data.num_classes == 3
    assert set(data.val.manifest.labels.tolist()) == {sorted(names).index("t'ai chi")}
    finetune(config)
    assert json.loads((tmp_path/'run/classes.json').read_text()) == sorted(names)
    alone = override(evaluation_of(config), run_dir=str(tmp_path/'again'), classes='classes.txt')
    again = evaluate(alone)
    assert again['per_class'] == [None, again['top1'], None]
    one = small(clips, tmp_path/'other', init=config.run_dir, head='carry', num_classes=2)
    old, new = load_model(config.run_dir), build_model(one, ['Riding a Mule', 'tai_chi'])
    assert torch.equal(new.head.weight, old.head.weight[[sorted(names).index(n) for n in (names[2], names[1])]])
    with pytest.raises(ValueError, match="(?s)'riding a horse': no such class; nearest: 'riding a mule'"):
        build_model(one, ['riding a horse', 'tai chi'])


def test_lists_without_labels_get_predictions(clips, fine, tmp_path):
    (clips/'labels.json').write_text(json.dumps({'a': '0', 'b': '1', 'c': '2'}))
    (clips/'test.json').write_text(json.dumps([{'id': '0'}, {'id': '1'}]))
    official = dict(annotations='ssv2', layout='{id}.mp4', classes='labels.json', val_list='test.json')
    result = evaluate(test_of(clips, tmp_path/'run', fine, **official))
    assert result['num_clips'] == 2 and 'top1' not in result and len(predictions(tmp_path/'run')) == 2
    with pytest.raises(ValueError, match='no labels to train on'):
        read_clips(small(clips, tmp_path, **official | dict(train_list='test.json')))


def test_presets_leftovers_never_limit_other_data(clips, tmp_path, caplog):
    "`train_clips` counts for EmojiMotion's own lists; here it would leave 2 of 8"
    with caplog.at_level('INFO'): data = read_clips(small(clips, tmp_path, train_clips=2))
    assert len(data.train) == 8 and 'train_clips=2 has no effect' in caplog.text
    emoji = small(clips/'emoji', tmp_path, train_list='action_train.csv', val_list='action_val.csv', num_classes=None)
    assert len(read_clips(override(emoji, train_clips=2)).train) == 2
    with pytest.raises(ValueError, match='train_clips 9: action_train.csv has 8'):
        read_clips(override(emoji, train_clips=9))


# ---- Where a run starts ----

def test_a_classifier_is_never_dropped_in_silence(clips, fine, tmp_path):
    config = small(clips, tmp_path/'run', init=str(fine))
    with pytest.raises(ValueError, match="has a classifier of 3 classes: say head='carry'"): build_model(config)
    old = load_model(fine)
    carried, fresh = build_model(override(config, head='carry')), build_model(override(config, head='fresh'))
    assert torch.equal(carried.head.weight, old.head.weight) and fresh.head.weight.abs().max() < 1e-3
    for model in (carried, fresh):
        assert torch.equal(model.fc_norm.weight, old.fc_norm.weight)
        assert torch.equal(model.encoder.blocks[3].mlp.fc1.weight, old.encoder.blocks[3].mlp.fc1.weight)
    with pytest.raises(ValueError, match='from 3 to 5 classes needs the names of both'):
        build_model(override(config, head='carry', num_classes=5))
    assert build_model(override(config, head='fresh', num_classes=5)).head.out_features == 5
    save_model(Student(1, 8, image_size=48, num_frames=2, **SIZES['nano']), tmp_path/'student')
    with pytest.raises(ValueError, match='is a Stage-1 student: it has no classifier'):
        build_saved(test_of(clips, tmp_path, tmp_path/'student'))
    with pytest.raises(FileNotFoundError, match="expected 'scratch', 'teacher', a run directory or a published file"):
        build_model(override(config, init='runs/nowhere'))


def test_published_files_as_start(clips, tmp_path):
    "Found from their keys; positions as the reference computes them, for other frames and pixels, too"
    size = dict(embed_dim=128, depth=1, num_heads=4)
    student = Student(1, 8, **size)
    recogniser = Recognizer(3, num_frames=16, base_grid=(8, 14, 14), init_scale=1., **size)
    for model, file in ((student, 'stage1.pth'), (recogniser, 'f16.pth')): save_published(model, tmp_path/file)
    config = small(clips, tmp_path/'run', init=str(tmp_path/'stage1.pth'), num_frames=4, image_size=112)
    model = build_model(config)
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, student.encoder.blocks[0].attn.qkv.weight)
    assert_close(model.encoder.positions, position_table((4, 7, 7), 128, (8, 14, 14)))
    published = override(config, init=str(tmp_path/'f16.pth'))
    same = build_model(override(published, head='carry', num_frames=16, image_size=224))
    assert torch.equal(same.encoder.positions, recogniser.encoder.positions)
    assert torch.equal(same.head.weight, recogniser.head.weight)
    less = build_model(override(published, head='fresh', num_frames=8, image_size=112))
    assert less.encoder.grid == (8, 7, 7) and less.head.weight.abs().max() < 1e-3
    trained = override(config, num_frames=2, image_size=48, epochs=1, layer_decay=.5)
    result = finetune(trained)
    assert result['step'] == 2 and load_model(config.run_dir).config['base_grid'] == [8, 14, 14]
    evaluate(override(evaluation_of(trained), run_dir=str(tmp_path/'again')))
    one, two = (predictions(tmp_path/run) for run in ('run', 'again'))
    assert all((a == b).all() for a, b in zip(one.probabilities, two.probabilities))


@pytest.mark.parametrize('num_frames, image_size', [(2, 64), (4, 48), (4, 64)])
def test_a_file_and_a_folder_give_the_same_network(clips, tmp_path, num_frames, image_size):
    "Whatever the clips of the task: the positions of a student, and of a Stage-2 model's student, follow one rule"
    student = Student(1, 8, image_size=48, num_frames=2, **SIZES['nano'])
    text = dict(vision_dim=128, fusion_layer=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=64, vocab_size=50)
    joined = Multimodal(dict(aligned_layers=0, image_size=48, num_frames=2, **SIZES['nano']), text)
    for name, model in dict(student=student, joined=joined).items():
        save_model(model, tmp_path/name)
        save_published(model, tmp_path/f'{name}.pth')
        changes = dict(num_frames=num_frames, image_size=image_size)
        starts = (str(tmp_path/name), str(tmp_path/f'{name}.pth'))
        folder, file = (build_model(small(clips, tmp_path/'run', init=start, **changes)) for start in starts)
        assert folder.encoder.grid == (num_frames, image_size // 16, image_size // 16)
        pairs = zip(folder.encoder.parameters(), file.encoder.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert_close(folder.encoder.positions, file.encoder.positions)


def test_a_teacher_is_probed_and_a_run_without_a_model_is_no_start(clips, tmp_path):
    "A frame recogniser has features, too; what a teacher leaves is no `Recognizer`, and that is said"
    config = small(clips, tmp_path/'run', mode='linear', init='teacher')
    assert finetune(config)['num_clips'] == 7
    with pytest.raises(FileNotFoundError, match='no model.json'):
        build_model(override(config, init=config.run_dir, head='fresh'))


def test_exchanged_weights_are_no_start(clips, tmp_path):
    "The weights of a finished run are checked against the hash in its result"
    config = small(clips, tmp_path/'run')
    finetune(config)
    other = load_model(config.run_dir)
    with torch.no_grad(): other.head.bias += 1
    save_model(other, config.run_dir)
    alone = override(evaluation_of(config), run_dir=str(tmp_path/'alone'))
    with pytest.raises(ValueError, match='its hash is not'): evaluate(alone)


# ---- Training ----

def test_everything_on(clips, tmp_path):
    "Mixup, repeated augmentation, RandAugment, erasing, recomputed activations and a weight average, for two steps"
    config = small(
        clips, tmp_path/'run', crop='random_resized', rand_augment='rand-m7-n4-mstd0.5-inc1', random_erasing=.5,
        mixup=.8, cutmix=1., num_sample=2, checkpoint_blocks=2, drop_path=.1, ema_decay=.5, micro_batch_size=2, lr=.01)
    seen, loss_of = [], recognition.classification
    def spy(*args):
        inner = loss_of(*args)
        return lambda model, batch: seen.append(batch['video'].shape[0]) or inner(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognition, 'classification', spy)
        result = finetune(config)
    assert seen == [4] * 4 and result['step'] == 2 and 0 < result['loss'] < 10
    log = [json.loads(line) for line in (tmp_path/'run/metrics.jsonl').read_text().splitlines()]
    assert_close([r['lr'] for r in log][0], .01 * 4 * 2 / 256)
    started, ended = build_model(config), load_model(config.run_dir)
    assert ended.config['checkpoint_blocks'] == 2 and not torch.equal(started.head.weight, ended.head.weight)


def test_clips_arrive_as_bytes_where_that_is_exact(clips, tmp_path):
    plain = small(clips, tmp_path)
    strong = override(plain, crop='random_resized', random_erasing=.5)
    assert read_clips(plain).train[0, 0]['video'].dtype == torch.uint8
    assert read_clips(strong).train[0, 0]['video'].dtype == torch.float32
    assert read_clips(strong).val[0, 0]['video'].dtype == torch.uint8


def test_a_weight_average_is_what_is_evaluated(clips, tmp_path):
    runs = {decay: small(clips, tmp_path/str(decay), ema_decay=decay, epochs=2, lr=.1) for decay in (None, .9)}
    for config in runs.values(): finetune(config)
    plain, average = (load_model(c.run_dir).eval() for c in runs.values())
    assert not torch.equal(plain.head.weight, average.head.weight)
    table = predictions(tmp_path/'0.9')
    with torch.no_grad(): logits = average(normalize_video(read_clips(runs[.9]).val[0, 2]['video']))[0]
    assert_close(torch.tensor(list(table.logits[2][0])), logits, rtol=1e-4, atol=1e-5)


def test_evaluation_on_the_way(clips, tmp_path):
    "It changes nothing, is on the declared split, and the best weights are named with the split that selected them"
    (clips/'selection.csv').write_text('train1.mp4,1\ntrain2.mp4,2\n')
    plain = small(clips, tmp_path/'plain', epochs=2, lr=.1)
    validation = {'validation.every': 1, 'selection_list': 'selection.csv'}
    watched = override(plain, {'run_dir': str(tmp_path/'watched')} | validation)
    finetune(plain)
    finetune(watched)
    one, two = (load_file(Path(c.run_dir)/'model.safetensors') for c in (plain, watched))
    assert all(torch.equal(one[name], two[name]) for name in one)
    records = [json.loads(line) for line in Path(watched.run_dir, 'metrics.jsonl').read_text().splitlines()]
    found = [r for r in records if r.get('kind') == 'eval']
    assert [r['split'] for r in found] == ['selection (selection.csv)'] * 2 and all(0 <= r['top1'] <= 1 for r in found)
    best = override(watched, {'run_dir': str(tmp_path/'best'), 'validation.select': 'best'})
    result = finetune(best)
    assert result['selected']['split'] == 'selection (selection.csv)' and result['selected_on_test'] is False
    on_test = finetune(override(best, run_dir=str(tmp_path/'on_test'), selection_list=None))
    assert on_test['selected']['split'] == 'test (val.csv)' and on_test['selected_on_test'] is True


def test_linear_probe_goes_on_where_it_stopped(clips, fine, tmp_path, monkeypatch):
    config = small(
        clips, tmp_path/'straight', mode='linear', init=str(fine), head='fresh', epochs=10, checkpoint_every=3, lr=.1)
    straight = finetune(config)
    loss_of, steps = recognition.classification, iter(range(1000))
    def stop(*args):
        inner = loss_of(*args)
        def loss_fn(model, batch):
            if next(steps) == 8: raise InterruptedError
            return inner(model, batch)
        return loss_fn
    monkeypatch.setattr(recognition, 'classification', stop)
    config = override(config, run_dir=str(tmp_path/'stopped'))
    with pytest.raises(InterruptedError): finetune(config)
    extracted = (tmp_path/'stopped/features.safetensors').stat().st_mtime_ns
    assert not (tmp_path/'stopped/model.safetensors').exists()
    resumed = finetune(config)
    assert (tmp_path/'stopped/features.safetensors').stat().st_mtime_ns == extracted and resumed['step'] == 20
    assert all(resumed[name] == straight[name] for name in ('loss', 'top1', 'confusion'))
    one, two = (load_file(tmp_path/run/'model.safetensors') for run in ('straight', 'stopped'))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    model, before = load_model(config.run_dir), load_model(fine)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), before.encoder.parameters(), strict=True))
    assert finetune(config) == resumed


def test_features_of_another_network_are_not_reused(clips, fine, tmp_path):
    config = small(clips, tmp_path/'run', mode='linear', init=str(fine), head='fresh')
    finetune(config)
    first = load_file(tmp_path/'run/features.safetensors')['features']
    other = override(config, init='scratch', head=None, seed=3)
    (tmp_path/'other').mkdir()
    shutil.copy(tmp_path/'run/features.safetensors', tmp_path/'other')
    finetune(override(other, run_dir=str(tmp_path/'other')))
    assert not torch.equal(load_file(tmp_path/'other/features.safetensors')['features'], first)


def test_a_run_does_not_go_on_with_another_list(clips, tmp_path):
    root = tmp_path/'data'
    shutil.copytree(clips, root, ignore=shutil.ignore_patterns('emoji'))
    config = small(root, tmp_path/'run')
    finetune(config)
    (root/'train.csv').write_text(''.join(f'train{n}.mp4,{n % 3}\n' for n in range(6)))
    with pytest.raises(ValueError, match='data.train_list changed'): finetune(config)


def test_names_of_classes_from_lists_to_shards(clips, tmp_path):
    "The same weights from names, numbers and copies in shards; an evaluation counts as its model does"
    root, names = tmp_path/'data', ['jump, high', 'run', 'sit']
    shutil.copytree(clips, root, ignore=shutil.ignore_patterns('emoji'))
    (root/'names.csv').write_text('path,label\n' + ''.join(f'train{n}.mp4,"{names[n % 3]}"\n' for n in range(8)))
    (root/'val_names.csv').write_text('path,label\n' + ''.join(f'{n}.mp4,"{names[(n + 2) % 3]}"\n' for n in range(5)))
    (root/'few.csv').write_text('path,label\n' + ''.join(f'{n}.mp4,{names[1 + n % 2]}\n' for n in range(5)))
    (root/'other.csv').write_text('path,label\n0.mp4,swim\n')
    shards([str(root/'names.csv'), str(root/'shards'), '--copy', 'True', '--clips-per-shard', '3', '--processes', '1'])
    def fit(run, **changes): return finetune(small(root, tmp_path/run, num_classes=None, **changes))
    fit('numbers')
    for run, train_list in (('names', 'names.csv'), ('shards', 'shards')):
        fit(run, train_list=train_list, val_list='val_names.csv')
        assert json.loads((tmp_path/run/'classes.json').read_text()) == names
        for name, weights in load_file(tmp_path/'numbers/model.safetensors').items():
            assert torch.equal(weights, load_file(tmp_path/run/'model.safetensors')[name])
    few = test_of(root, tmp_path/'few', tmp_path/'names', val_list='few.csv', num_classes=None)
    evaluate(few)
    table = predictions(tmp_path/'few')
    assert table.label.tolist() == [1, 2, 1, 2, 1] and len(table.logits[0][0]) == 3
    other = override(few, val_list='other.csv', run_dir=str(tmp_path/'other'))
    with pytest.raises(ValueError, match="'swim': none of the 3"): evaluate(other)


# ---- A user's mistakes, by kind: one line, code 2, before anything is trained; the same in a dry run ----

MISTAKES = dict(
    too_few_classes=(dict(num_classes=2), 'write data.num_classes=3'),
    leftover_classes=(dict(num_classes=400), 'write data.num_classes=3'),
    sampling=(dict(val_sampling='ssv2_val', num_segments=2), 'ssv2_val'),
    missing_list=(dict(train_list='no-such.csv'), 'no-such.csv: no such file'),
    missing_test_list=(dict(val_list='no-such.csv'), 'no-such.csv: no such file'),
    missing_selection_list=(dict(selection_list='no-such.csv'), 'no-such.csv: no such file'),
    missing_init=(dict(init='runs/nowhere'), "init 'runs/nowhere': no such file or folder"),
    batch=(dict(batch_size=9), '8 clips, fewer than batch_size 9'),
    teacher=(dict(init='teacher', teacher='ViT-B-16-quickgelu'), 'start.teacher_weights=openai'),
    head=(dict(head='carry'), 'no classifier to carry over'),
    odd_micro_batch=(dict(micro_batch_size=1, mixup=.8), 'must be even'),
    unlabelled_selection=(dict(selection_list='unlabelled.csv', every=1), 'needs labelled clips'),
    range=(dict(layer_decay=0), 'layer_decay 0.0: expected at most 1 and more than 0'),
    segments=(dict(num_segments=0), 'num_segments 0: expected at least 1'))


@pytest.mark.parametrize('kind', MISTAKES)
def test_mistakes(kind, clips, tmp_path, capsys):
    changes, expected = MISTAKES[kind]
    (clips/'unlabelled.csv').write_text('train1.mp4,-1\n')
    argv = command_line(small(clips, tmp_path/'run'))
    argv += [f'--{name.replace("_", "-")}={value}' for name, value in changes.items()]
    for words in (argv, [*argv, '--dry-run']): assert expected in mistake(capsys, *words)
    assert not (tmp_path/'run').exists()


def test_mistakes_of_an_evaluation(clips, fine, tmp_path, capsys):
    argv = command_line(test_of(clips, tmp_path/'run', fine))
    wrong = {
        f'--init={tmp_path}': 'no model.safetensors in this folder', '--init=scratch': 'needs a fine-tuned init',
        '--lr=1': "has no option 'lr'", '--train-list=x.csv': "has no option 'train_list'",
        '--val-list=no.csv': 'no.csv: no such file', '--num-classes=2': 'write data.num_classes=3'}
    for option, expected in wrong.items():
        for words in ([*argv, option], [*argv, option, '--dry-run']): assert expected in mistake(capsys, *words)
    assert not (tmp_path/'run').exists()


def test_the_wrong_head_is_refused_in_a_dry_run(clips, fine, tmp_path):
    text = dry_run(small(clips, tmp_path/'run', init=str(fine)))
    assert 'The run would be refused' in text and "say head='carry'" in text


def test_command_line(clips, fine, tmp_path, caplog):
    with caplog.at_level('INFO'):
        main(command_line(test_of(clips, tmp_path/'run', fine)))
        assert caplog.records[-1].getMessage().endswith('top-5 1.000 7 clips')
        old = [word for word in command_line(test_of(clips, tmp_path/'run', fine)) if word != 'evaluate']
        main([*old, '--mode', 'evaluate']) # as it was called before
        assert caplog.records[-1].getMessage().endswith('top-5 1.000 7 clips')
        main([*command_line(small(clips, tmp_path/'dry')), '--dry-run'])
    printed = caplog.text
    for expected in ('train.csv: 8 clips', 'val.csv: 7 clips, 0 missing', '2 steps x 1 epochs'):
        assert expected in printed
    assert not (tmp_path/'dry').exists()
    with pytest.raises(SystemExit): main(['--preset', 'b16_k400', '--mode', 'train'])
