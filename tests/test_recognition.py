"Evaluation and recognition: recipes against the published ones, views, several processes, classifiers by name, where runs start, and how they go on"
import json, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from umt.data import emoji_motion
from umt.tasks import evaluators as evaluation, recognition
from umt.models.published import load_model, save_model, save_published
from umt.data.media import DataError
from umt.data.tables import read_manifest
from umt.tasks.evaluators import ViewDataset, build_datasets, clip_probabilities, predict, scores
from umt.tasks.recognition import PRESETS, PUBLISHED, build_model, dry_run, finetune, main
from umt.training.schedule import layer_groups
from umt.models.backbone import position_table
from umt.models.heads import Recognizer
from umt.models.student import SIZES, Student
from umt.core.config import override
from umt.training.distributed import start_accelerator
from umt.training.schedule import learning_rate

# The published recipes, script by script: start, batch per GPU (of 16), repeated augmentation, learning rate used, epochs, warm-up, drop path,
# layer decay, weight decay, checkpointed blocks, segments, crops.
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
    start, batch, sample, lr, epochs, warmup, drop_path, layer_decay, weight_decay, blocks, segments, crops = SCRIPTS[name]
    c, task = PUBLISHED[name], name.split('_')[1]
    assert PRESETS[name] is c and c.init == f'runs/{start}'
    assert (c.batch_size, c.micro_batch_size, c.num_sample) == (16 * batch, batch, sample)
    scale, n = 16 * batch * sample / 256, 100
    assert_close(learning_rate(warmup * n, c, n), lr)
    assert_close([learning_rate(0, c, n), learning_rate(warmup * n - 1, c, n)], [1e-6 * scale, lr])
    end = learning_rate(epochs * n - 1, c, n)
    assert_close(c.min_lr * scale, 1e-6 * scale)
    assert 1e-6 * scale < end < 1e-6 * scale + 1e-3 * lr
    assert (c.epochs, c.warmup_epochs, c.drop_path, c.layer_decay, c.weight_decay) == (epochs, warmup, drop_path, layer_decay, weight_decay)
    assert (c.checkpoint_blocks, c.num_segments, c.num_crops) == (blocks, segments, crops)
    assert (c.betas, c.eps, c.clip_grad, c.ema_decay, c.precision, c.num_workers) == ((.9, .999), 1e-8, None, None, 'fp16', 12)
    assert (c.mixup, c.cutmix, c.label_smoothing, c.rand_augment, c.random_erasing) == (.8, 1., .1, 'rand-m7-n4-mstd0.5-inc1', .25)
    assert (c.crop, c.pool_grid, c.patch_size, c.mode) == ('random_resized', (1, 1, 1), 16, 'full')
    assert c.num_classes == CLASSES[task] and c.train_list == f'{task}_train.csv' and c.val_list == f'{task}_val.csv'
    assert c.num_frames == (16 if name.endswith('f16') else 8) and c.image_size == (384 if name.endswith('384') else 224)
    assert c.student == ('large' if name[0] == 'l' else 'base')
    assert c.flip == (task != 'ssv2') and (c.train_sampling, c.val_sampling) == (('ssv2_train', 'ssv2_test') if task == 'ssv2' else ('kinetics_sparse_train', 'kinetics_sparse_test'))
    assert c.head == ('carry' if task in ('k400', 'k600', 'k700') or name.endswith('384') else 'fresh' if task == 'mit' else None)


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


# A few clips on disk; two of them share their file name

SMALL = dict(image_size=48, num_frames=2, num_classes=3, pool_grid='1,1,1', batch_size=4, epochs=1, warmup_epochs=0, train_clips=None,
             train_list='train.csv', val_list='val.csv', eval_batch_size=5, log_every=1)


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
    (folder/'classes.txt').write_text('jumping jacks\nt\'ai chi\nriding (a) mule\n')
    return folder


def small(clips, run_dir, **changes):
    return override(PRESETS['quick_emoji'], **SMALL | dict(data_root=str(clips), run_dir=str(run_dir)) | changes)


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
    return [f'--{name.replace("_", "-")}={getattr(config, name)}' for name in config.__dataclass_fields__]


WORKER = """import json, sys
from umt.datasets import DataError
from umt.recognition import main
for argv in json.loads(sys.argv[1]):
    try: main(argv)
    except DataError as error: sys.stdout.write(f'DataError: {error}\\n'); sys.stdout.flush()"""


@pytest.fixture(scope='module')
def together(clips, fine, tmp_path_factory):
    "The runs that two processes do together, one after the other: their configs by name, and what was printed"
    folder = tmp_path_factory.mktemp('together')
    (clips/'one.csv').write_text('a/clip.mp4,2\n')
    frozen = dict(mode='linear', init=str(fine), head='fresh', epochs=3)
    runs = dict(views=dict(mode='evaluate', init=str(fine), num_segments=2, num_crops=3), broken=dict(mode='evaluate', init=str(fine), val_list='broken.csv'),
                one=dict(mode='evaluate', init=str(fine), val_list='one.csv'), linear=frozen, fsdp=dict(sharding='fsdp'))
    configs = {name: small(clips, folder/name, **changes) for name, changes in runs.items()}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--no-python', sys.executable, '-c', WORKER]
    done = subprocess.run([*launch, json.dumps([command_line(c) for c in configs.values()])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return configs, done.stdout


def stored(config): return json.loads(Path(config.run_dir, 'evaluation.json').read_text())


def test_views_are_averaged_as_probabilities():
    "By hand: softmax of each view, then the mean. Averaging logits, or log-probabilities, would choose the other class"
    logits = torch.tensor([[[.8, .2], [.8, .2], [1e-6, 1 - 1e-6]]]).log() + torch.tensor([[[3.], [0.], [-7.]]])
    assert_close(clip_probabilities(logits), torch.tensor([[1.600001 / 3, 1.399999 / 3]]))
    assert clip_probabilities(logits).argmax() == 0 and logits.mean(1).argmax() == 1


def test_scores_by_hand():
    p = torch.tensor([[.6, .4], [.3, .7], [.9, .1]])
    found = scores(p, torch.tensor([0, 0, 1]))
    assert found == {'num_clips': 3, 'top1': pytest.approx(1 / 3), 'top5': 1., 'per_class': [.5, 0.], 'confusion': [[1, 1], [1, 0]]}
    assert 'confusion' not in scores(torch.rand(2, 1001), torch.tensor([0, 5]))


def test_processes_share_an_evaluation(clips, fine, together, tmp_path):
    "Seven clips, six views each: one process and two find the same, clip by clip, and two files of one name stay two"
    configs, printed = together
    alone = override(configs['views'], run_dir=str(tmp_path/'alone'))
    result, shared = finetune(alone), stored(configs['views'])
    assert shared == {k: result[k] for k in shared} and shared['num_clips'] == 7
    assert printed.count('7 clips\n') == 3 # each run's line once: views, linear, fsdp
    one, two = (pd.read_parquet(Path(c.run_dir)/'predictions.parquet') for c in (alone, configs['views']))
    assert list(one.path) == list(two.path) == ['a/clip.mp4', 'b/clip.mp4', *(f'{n}.mp4' for n in range(5))]
    assert list(two.label) == [0, 1, 2, 0, 1, 2, 0] and list(two.sample_id) == list(range(7))
    stack = lambda table, column: torch.tensor([[list(v) for v in row] if column == 'logits' else list(row) for row in table[column]])
    assert stack(one, 'logits').shape == (7, 6, 3)
    assert_close(stack(one, 'logits'), stack(two, 'logits'), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(stack(two, 'logits')[0], stack(two, 'logits')[1], atol=1e-3)
    data, model = ViewDataset(read_manifest(clips/'val.csv'), alone, 2, 3), load_model(fine).eval()
    with torch.no_grad(): expected = torch.stack([model(data[0, i]['video']) for i in range(7)])
    assert_close(stack(two, 'logits'), expected, rtol=1e-4, atol=1e-4)
    assert_close(stack(two, 'probabilities'), expected.softmax(-1).mean(1), rtol=1e-4, atol=1e-5)


def test_an_undecodable_clip_stops_all_processes(together, tmp_path):
    configs, printed = together
    with pytest.raises(DataError, match='1 of 8 clips cannot be decoded.*\n  broken.mp4'): finetune(override(configs['broken'], run_dir=str(tmp_path)))
    assert printed.count('DataError: 1 of 8 clips cannot be decoded') == 2 and printed.count('  broken.mp4: ') == 2
    assert not Path(configs['broken'].run_dir, 'evaluation.json').exists() and not Path(configs['broken'].run_dir, 'predictions.parquet').exists()


def test_more_processes_than_clips(together): assert stored(together[0]['one'])['num_clips'] == 1


def test_an_evaluation_is_repeated_only_where_something_changed(clips, fine, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluation, 'predict', lambda *args, **kwargs: calls.append(1) or predict(*args, **kwargs))
    config = small(clips, tmp_path/'run', mode='evaluate', init=str(fine))
    first = finetune(config)
    assert finetune(config) == first and len(calls) == 1
    assert finetune(override(config, num_segments=2))['segments'] == 2 and len(calls) == 2


def test_lists(clips, fine, tmp_path):
    "Clips that are not there, labels that cannot be, lists without labels, names that do not fit"
    config = small(clips, tmp_path/'run', mode='evaluate', init=str(fine), val_list='lost.csv')
    (clips/'lost.csv').write_text('a/clip.mp4,0\nlost/clip.mp4,1\nb/clip.mp4,1\n')
    with pytest.raises(FileNotFoundError, match='1 of 3 clips are not in .*\n  lost/clip.mp4'): build_datasets(config, train=False)
    result = finetune(override(config, missing='drop'))
    assert (result['num_clips'], result['dropped']) == (2, 1)
    (clips/'wrong.csv').write_text('a/clip.mp4,0\nb/clip.mp4,3\n')
    with pytest.raises(ValueError, match='1 labels outside 0 .. 2 .*\n  b/clip.mp4: 3'): build_datasets(override(config, val_list='wrong.csv'), train=False)
    with pytest.raises(ValueError, match='train_clips 9: train.csv has 8'): build_datasets(override(config, train_clips=9))
    (clips/'two.txt').write_text('one\ntwo\n')
    (clips/'low.csv').write_text('a/clip.mp4,1\n')
    with pytest.raises(ValueError, match='2 class names, but num_classes is 3'): build_datasets(override(config, val_list='low.csv', classes='two.txt'), train=False)


def test_official_annotations(clips, fine, tmp_path):
    "Kinetics' columns: names are taken from the training list, kept in the run, and label the evaluation"
    header = 'label,youtube_id,time_start,time_end,split\n'
    names = ['jumping jacks', "t'ai chi", 'riding (a) mule']
    for split, count in (('train', 6), ('val', 4)):
        for n in range(count): shutil.copy(clips/f'train{n}.mp4', clips/f'{split}video{n}_000001_000011.mp4')
        (clips/f'k_{split}.csv').write_text(header + ''.join(f'{names[n % 3 if split == "train" else 1]},{split}video{n},1,11,{split}\n' for n in range(count)))
    config = small(clips, tmp_path/'run', annotations='kinetics', train_list='k_train.csv', val_list='k_val.csv', mode='linear')
    data = build_datasets(config)
    assert data.names == sorted(names) and set(data.val.manifest.labels.tolist()) == {sorted(names).index("t'ai chi")}
    finetune(config)
    assert json.loads((tmp_path/'run/classes.json').read_text()) == sorted(names)
    again = finetune(override(config, mode='evaluate', init=config.run_dir, run_dir=str(tmp_path/'again'), classes='classes.txt'))
    assert again['per_class'] == [None, again['top1'], None]
    (clips/'new_classes.txt').write_text('Riding a Mule\ntai_chi\n')
    one = small(clips, tmp_path/'other', init=config.run_dir, head='carry', num_classes=2, classes='new_classes.txt')
    old, new = load_model(config.run_dir), build_model(one, ['Riding a Mule', 'tai_chi'])
    assert torch.equal(new.head.weight, old.head.weight[[sorted(names).index(n) for n in (names[2], names[1])]])
    with pytest.raises(ValueError, match="(?s)'riding a horse': no such class; nearest: 'riding a mule'"): build_model(one, ['riding a horse', 'tai chi'])


def test_a_classifier_is_never_dropped_in_silence(clips, fine, tmp_path):
    config = small(clips, tmp_path/'run', init=str(fine))
    with pytest.raises(ValueError, match="has a classifier of 3 classes: say head='carry'"): build_model(config)
    old = load_model(fine)
    carried, fresh = build_model(override(config, head='carry')), build_model(override(config, head='fresh'))
    assert torch.equal(carried.head.weight, old.head.weight) and fresh.head.weight.abs().max() < 1e-3
    for model in (carried, fresh): assert torch.equal(model.fc_norm.weight, old.fc_norm.weight) and torch.equal(model.encoder.blocks[3].mlp.fc1.weight, old.encoder.blocks[3].mlp.fc1.weight)
    with pytest.raises(ValueError, match='from 3 to 5 classes needs the names of both'): build_model(override(config, head='carry', num_classes=5))
    assert build_model(override(config, head='fresh', num_classes=5)).head.out_features == 5
    save_model(Student(1, 8, image_size=48, num_frames=2, **SIZES['nano']), tmp_path/'student')
    with pytest.raises(ValueError, match='is a Stage-1 student: it has no classifier'): build_model(override(config, init=str(tmp_path/'student'), mode='evaluate'))
    with pytest.raises(FileNotFoundError, match="expected 'scratch', 'teacher', a run directory or a published file"): build_model(override(config, init='runs/nowhere'))


def test_published_files_as_start(clips, tmp_path):
    "Found from their keys; positions as the reference computes them, for other frames and pixels, too"
    size = dict(embed_dim=128, depth=1, num_heads=4)
    student, recogniser = Student(1, 8, **size), Recognizer(3, num_frames=16, base_grid=(8, 14, 14), init_scale=1., **size)
    for model, file in ((student, 'stage1.pth'), (recogniser, 'f16.pth')): save_published(model, tmp_path/file)
    config = small(clips, tmp_path/'run', init=str(tmp_path/'stage1.pth'), num_frames=4, image_size=112)
    model = build_model(config)
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, student.encoder.blocks[0].attn.qkv.weight)
    assert_close(model.encoder.positions, position_table((4, 7, 7), 128, (8, 14, 14)))
    same = build_model(override(config, init=str(tmp_path/'f16.pth'), head='carry', num_frames=16, image_size=224))
    assert torch.equal(same.encoder.positions, recogniser.encoder.positions) and torch.equal(same.head.weight, recogniser.head.weight)
    less = build_model(override(config, init=str(tmp_path/'f16.pth'), head='fresh', num_frames=8, image_size=112))
    assert less.encoder.grid == (8, 7, 7) and less.head.weight.abs().max() < 1e-3
    result = finetune(override(config, num_frames=2, image_size=48, epochs=1, layer_decay=.5))
    assert result['step'] == 2 and load_model(config.run_dir).config['base_grid'] == [8, 14, 14]
    finetune(override(config, mode='evaluate', init=config.run_dir, run_dir=str(tmp_path/'again'), num_frames=2, image_size=48))
    one, two = (pd.read_parquet(tmp_path/run/'predictions.parquet') for run in ('run', 'again'))
    assert all((a == b).all() for a, b in zip(one.probabilities, two.probabilities))


def test_everything_on(clips, tmp_path):
    "Mixup, repeated augmentation, RandAugment, erasing, recomputed activations and a weight average, for two steps"
    config = small(clips, tmp_path/'run', crop='random_resized', rand_augment='rand-m7-n4-mstd0.5-inc1', random_erasing=.5, mixup=.8, cutmix=1., num_sample=2, checkpoint_blocks=2,
                   drop_path=.1, ema_decay=.5, micro_batch_size=2, lr=.01)
    seen = []
    loss_of = recognition.classification
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


def test_a_weight_average_is_what_is_evaluated(clips, tmp_path):
    runs = {decay: small(clips, tmp_path/str(decay), ema_decay=decay, epochs=2, lr=.1) for decay in (None, .9)}
    for config in runs.values(): finetune(config)
    plain, average = (load_model(c.run_dir).eval() for c in runs.values())
    assert not torch.equal(plain.head.weight, average.head.weight)
    table = pd.read_parquet(tmp_path/'0.9/predictions.parquet')
    with torch.no_grad(): logits = average(build_datasets(runs[.9]).val[0, 2]['video'])[0]
    assert_close(torch.tensor(list(table.logits[2][0])), logits, rtol=1e-4, atol=1e-5)


def test_linear_probe_goes_on_where_it_stopped(clips, fine, tmp_path, monkeypatch):
    config = small(clips, tmp_path/'straight', mode='linear', init=str(fine), head='fresh', epochs=10, checkpoint_every=3, lr=.1)
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
    assert {k: resumed[k] for k in ('loss', 'top1', 'confusion')} == {k: straight[k] for k in ('loss', 'top1', 'confusion')}
    one, two = (load_file(tmp_path/run/'model.safetensors') for run in ('straight', 'stopped'))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    model, before = load_model(config.run_dir), load_model(fine)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), before.encoder.parameters(), strict=True))
    assert finetune(config) == resumed


def test_features_of_another_network_are_not_reused(clips, fine, tmp_path):
    config = small(clips, tmp_path/'run', mode='linear', init=str(fine), head='fresh')
    finetune(config)
    first = load_file(tmp_path/'run/features.safetensors')['features']
    shutil.rmtree(tmp_path/'run/probe')
    finetune(override(config, init='scratch', seed=3))
    assert not torch.equal(load_file(tmp_path/'run/features.safetensors')['features'], first)


def test_two_processes_train_a_probe(together, tmp_path):
    two = together[0]['linear']
    one = override(two, run_dir=str(tmp_path/'one'))
    result, shared = finetune(one), stored(two)
    tables = [load_file(Path(c.run_dir)/'features.safetensors') for c in (one, two)]
    assert tables[0]['features'].shape == (8, 128)
    for name in tables[0]: assert_close(tables[0][name], tables[1][name], rtol=1e-4, atol=1e-5)
    assert_close(load_model(two.run_dir).head.weight, load_model(one.run_dir).head.weight, rtol=1e-3, atol=1e-4)
    assert {k: shared[k] for k in ('num_clips', 'top1', 'confusion')} == {k: result[k] for k in ('num_clips', 'top1', 'confusion')}


def test_a_sharded_model_is_evaluated_whole(together):
    config = together[0]['fsdp']
    model, table = load_model(config.run_dir).eval(), pd.read_parquet(Path(config.run_dir)/'predictions.parquet')
    assert len(table) == 7
    with torch.no_grad(): logits = model(build_datasets(config).val[0, 6]['video'])[0]
    assert_close(torch.tensor(list(table.logits[6][0])), logits, rtol=1e-4, atol=1e-5)


def test_command_line(clips, fine, tmp_path, capsys):
    config = small(clips, tmp_path/'run', mode='evaluate', init=str(fine))
    main(command_line(config))
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith('top-5 1.000 7 clips')
    main([*command_line(small(clips, tmp_path/'dry')), '--dry-run'])
    printed = capsys.readouterr().out
    assert '8 clips, 0 missing\n2 steps x 1 epochs' in printed and f'{clips}/val.csv: 7 clips' in printed and not (tmp_path/'dry').exists()
    assert 'no-such.csv: not there' in dry_run(small(clips, tmp_path/'dry', train_list='no-such.csv'))
    with pytest.raises(SystemExit): main(['--preset', 'b16_k400', '--mode', 'train'])


def test_lists_without_labels_get_predictions(clips, fine, tmp_path):
    (clips/'labels.json').write_text(json.dumps({'a': '0', 'b': '1', 'c': '2'}))
    (clips/'test.json').write_text(json.dumps([{'id': '0'}, {'id': '1'}]))
    config = small(clips, tmp_path/'run', mode='evaluate', init=str(fine), annotations='ssv2', layout='{id}.mp4', classes='labels.json', val_list='test.json')
    result = finetune(config)
    assert result['num_clips'] == 2 and 'top1' not in result and len(pd.read_parquet(tmp_path/'run/predictions.parquet')) == 2
    with pytest.raises(ValueError, match='no labels to train on'): build_datasets(override(config, train_list='test.json'))


def test_a_teacher_is_probed_and_a_run_without_a_model_is_no_start(clips, tmp_path):
    "A frame recogniser has features, too; what a teacher leaves is no `Recognizer`, and that is said"
    config = small(clips, tmp_path/'run', mode='linear', init='teacher')
    assert finetune(config)['num_clips'] == 7
    with pytest.raises(FileNotFoundError, match='no model.json'): build_model(override(config, init=config.run_dir, head='fresh'))


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_evaluation(clips, fine, tmp_path, precision):
    full, half = (finetune(small(clips, tmp_path/p, mode='evaluate', init=str(fine), precision=p)) for p in ('fp32', precision))
    one, two = (torch.tensor([list(p) for p in pd.read_parquet(tmp_path/run/'predictions.parquet').probabilities]) for run in ('fp32', precision))
    assert_close(one, two, rtol=0, atol=.1)
    assert not torch.equal(one, two) and half['num_clips'] == full['num_clips']
