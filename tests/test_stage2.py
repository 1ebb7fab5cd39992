"Stage 2 as a run: stopped and continued it ends with the same weights; what it starts from; pairs that cannot be read."
import json, os, shutil, signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertTokenizerFast

from umt.core.config import UsageError, override
from umt.core.signals import Preempted
from umt.models.published import load_model, save_model, save_published
from umt.models.student import Student
from umt.models.text import bert_folder
from umt.tasks import stage2
from umt.tasks.continuing import vocabulary_hash

SIZES = dict(image_size=112, num_frames=4, embed_dim=32, depth=2, num_heads=2)

@pytest.fixture(scope='module')
def config(tmp_path_factory):
    "The smallest run: clips, stills, a tiny student as Stage 1 leaves it; text dropout and drop path are on."
    root = tmp_path_factory.mktemp('stage2')
    torch.manual_seed(0)
    save_model(Student(2, 64, **SIZES), root/'student')
    config = override(
        stage2.PRESETS['quick_emoji'], data_root=str(root/'data'), run_dir=str(root/'straight'),
        init=str(root/'student'), emoji_clips=12, emoji_stills=8, aligned_layers=2, batch_size=4, text_dropout=.1,
        drop_path=.1, log_every=1, checkpoint_every=100)
    stage2.pretrain(config)
    return config

def metrics(config): return [json.loads(line) for line in open(f'{config.run_dir}/metrics.jsonl')]

# Runs

def test_stopped_and_continued_ends_with_the_same_weights(config, tmp_path, monkeypatch):
    calls, whole = iter(range(10**6)), stage2.pretraining_loss
    def stopping(*args):
        loss_fn = whole(*args)
        def stop_in_the_fourth_step(model, batch): # two calls before the first step count FLOPs
            if next(calls) == 2 + 3: os.kill(os.getpid(), signal.SIGTERM)
            return loss_fn(model, batch)
        return stop_in_the_fourth_step
    monkeypatch.setattr(stage2, 'pretraining_loss', stopping)
    stopped = override(config, run_dir=str(tmp_path/'stopped'))
    with pytest.raises(Preempted): stage2.pretrain(stopped)
    stage2.pretrain(stopped)
    a, b = (load_file(f'{c.run_dir}/model.safetensors') for c in (config, stopped))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    starts = json.loads((tmp_path/'stopped/environment.json').read_text())
    assert [s['start_step'] for s in starts] == [0, 4]

def test_images_and_videos_are_trained_on_in_proportion(config):
    log, pairs = metrics(config), stage2.read_pairs(config).train
    assert len(log) == 2 * sum(len(indices) // 4 for indices in pairs.media.values())
    assert {'uta', 'vtc', 'vtm', 'mlm'} <= set(log[0])

def test_a_single_stage_from_scratch(config, tmp_path):
    changes = dict(init='scratch', student='nano', run_dir=str(tmp_path), aligned_layers=3, epochs=1)
    result = stage2.pretrain(override(config, changes))
    assert result['uta'] > 1 and load_model(tmp_path).student.config['depth'] == 4

@pytest.mark.parametrize('vtm_weight, figure', [(1., 'r_mean'), (0., 'dual_r_mean')])
def test_the_gallery_is_evaluated_on_the_way_and_the_best_weights_are_kept(config, tmp_path, vtm_weight, figure):
    "Which figure counts depends on whether the matching head is trained; the pairs that train are the same."
    changes = {'data.val_captions': 'captions_val.json', 'validation.every': 1, 'validation.select': 'best'}
    watched = override(config, changes | dict(run_dir=str(tmp_path), vtm_weight=vtm_weight))
    result = stage2.pretrain(watched)
    evaluations = [record for record in metrics(watched) if record.get('kind') == 'eval']
    assert len(evaluations) == 2 and all('captions_val.json' in record['split'] for record in evaluations)
    assert all(0 < record[figure] <= 1 for record in evaluations)
    assert ('r_mean' in evaluations[0]) == (figure == 'r_mean')
    assert figure in json.dumps(result)

def test_evaluation_changes_nothing(config, tmp_path):
    changes = {'data.val_captions': 'captions_val.json', 'validation.every': 1}
    stage2.pretrain(override(config, changes | dict(run_dir=str(tmp_path))))
    a, b = (load_file(Path(run)/'model.safetensors') for run in (config.run_dir, tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)

# Data

def test_unreadable_pairs_are_replaced_and_listed(config, tmp_path):
    data = tmp_path/'data'
    shutil.copytree(config.data.root, data)
    first = json.loads((data/'captions_train.json').read_text())[0]['video']
    (data/first).write_bytes(b'no video')
    changes = dict(data_root=str(data), run_dir=str(tmp_path/'run'), bad_clip_limit=.5)
    result = stage2.pretrain(override(config, changes))
    listed = [json.loads(line) for line in (tmp_path/'run/quarantine.jsonl').read_text().splitlines()]
    assert result['quarantined'] == 1 and [entry['path'] for entry in listed] == [first]

def test_a_validation_clip_that_cannot_be_decoded_is_left_out(config, tmp_path):
    data = tmp_path/'data'
    shutil.copytree(config.data.root, data)
    first = json.loads((data/'captions_val.json').read_text())[0]['video']
    (data/first).write_bytes(b'no video')
    changes = {'data.val_captions': 'captions_val.json', 'validation.every': 2, 'loader.bad_clip_limit': .5}
    watched = override(config, changes | dict(data_root=str(data), run_dir=str(tmp_path/'run')))
    stage2.pretrain(watched)
    assert metrics(watched)[-1]['r_mean'] > 0

def test_the_preset_never_generates_into_other_data(config, tmp_path):
    (tmp_path/'mine.json').write_text(json.dumps([dict(video='a.mp4', caption='one')]))
    other = override(config, data_root=str(tmp_path), run_dir=str(tmp_path/'run'), corpora=('video:mine.json',))
    assert 'run would be refused' in stage2.dry_run(other)
    with pytest.raises((ValueError, RuntimeError)): stage2.pretrain(other)
    assert not list(tmp_path.glob('**/*.mp4')) and not (tmp_path/'captions_train.json').exists()

# What identifies a run

def test_another_micro_batch_is_another_run(config):
    with pytest.raises(ValueError, match='micro_batch_size'): stage2.pretrain(override(config, micro_batch_size=2))

def test_changed_captions_are_another_run(config, tmp_path):
    data, run = tmp_path/'data', tmp_path/'run'
    shutil.copytree(config.data.root, data)
    shutil.copytree(config.run_dir, run)
    moved = override(config, data_root=str(data), run_dir=str(run))
    assert stage2.pretrain(moved)['step'] > 0 # finished, and the same pairs
    captions = json.loads((data/'captions_train.json').read_text())
    captions[0]['caption'] = ['something else']
    (data/'captions_train.json').write_text(json.dumps(captions))
    with pytest.raises(ValueError, match='captions_train.json changed'): stage2.pretrain(moved)

# Going on

def test_goes_on_without_masks(config, tmp_path):
    after = override(stage2.unmasked(config), run_dir=str(tmp_path/'unmasked'))
    before, (teacher, model) = load_model(config.run_dir), stage2.build_models(after)
    assert teacher is None and len(model.student.alignment_heads) == 0
    state = before.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert stage2.pretrain(after)['step'] == stage2.pretrain(config)['step'] // 2

@pytest.fixture(scope='module')
def shuffled(tmp_path_factory):
    "MiniLM with as many words, and other numbers."
    folder = tmp_path_factory.mktemp('words')/'bert'
    tokenizer = BertTokenizerFast.from_pretrained(bert_folder('minilm'))
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words[2000:] = words[:1999:-1]
    shutil.copytree(bert_folder('minilm'), folder)
    spec = json.loads((folder/'tokenizer.json').read_text())
    spec['model']['vocab'] = {word: i for i, word in enumerate(words)}
    (folder/'tokenizer.json').write_text(json.dumps(spec))
    (folder/'vocab.txt').write_text('\n'.join(words) + '\n')
    return str(folder)

CONTINUED = {'embed_dim': dict(embed_dim=512), 'text.sep': dict(sep=True), 'text.fusion_layer': dict(fusion_layer=2),
             'text.name': dict(text='shuffled'), 'max_length': dict(max_length=600)}

@pytest.mark.parametrize('name', CONTINUED)
def test_what_a_model_was_not_trained_with_is_refused(config, shuffled, tmp_path, name):
    changes = {k: shuffled if v == 'shuffled' else v for k, v in CONTINUED[name].items()}
    further = override(stage2.unmasked(config), changes | dict(run_dir=str(tmp_path/'further')))
    with pytest.raises(ValueError, match=f'^{name} .*(trained with|positions)'): stage2.pretrain(further)
    refusals = stage2.dry_run(further).split('The run would be refused')[1]
    assert name in refusals and not (tmp_path/'further/checkpoints').exists()

def test_a_published_file_that_is_continued_is_compared_too(config, tmp_path):
    save_published(load_model(config.run_dir), tmp_path/'stage2.pth')
    changes = dict(init=str(tmp_path/'stage2.pth'), embed_dim=512, run_dir=str(tmp_path/'run'))
    further = override(stage2.unmasked(config), changes)
    found = stage2.dry_run(further).splitlines()[-1]
    assert 'refused' in stage2.dry_run(further) and ('embed_dim' in found or 'heads' in found)

def test_the_vocabulary_is_kept_with_the_run(config):
    kept = json.loads(Path(config.run_dir, 'inputs.json').read_text())
    assert kept['vocabulary'] == vocabulary_hash(stage2.Tokenizer('minilm'))

def test_a_renamed_copy_of_the_same_tokenizer_is_the_same(config, tmp_path):
    shutil.copytree(bert_folder('minilm'), tmp_path/'copy')
    further = override(stage2.unmasked(config), text=str(tmp_path/'copy'))
    stage2.Stage2().check(further)

def test_a_student_of_another_size_brings_its_positions(config):
    "Stage 2 at 144 pixels from a student of 112: the old table, resized."
    larger = override(config, image_size=144, teacher_image_size=144, mask='random', uta_weight=0.)
    _, model = stage2.build_models(larger)
    start = load_model(config.start.init)
    old, new = start.encoder.positions.view(4, 7, 7, -1), model.student.encoder.positions.view(4, 9, 9, -1)
    assert (new.mean((1, 2)) - old.mean((1, 2))).abs().max() < .1

# Mistakes

@pytest.mark.parametrize('changes, complaint', [
    (dict(init='nowhere'), "expected 'scratch'"), (dict(aligned_layers=3), 'aligned_layers=3'),
    (dict(teacher_image_size=64), 'do not fit'), (dict(text='nowhere/at/all'), 'nowhere/at/all'),
    (dict(batch_size=400), 'fewer than batch_size 400'), ({'validation.every': 1}, 'needs data.val_captions')])
def test_what_does_not_fit_is_said(config, tmp_path, changes, complaint):
    wrong = override(config, dict(run_dir=str(tmp_path/'run')) | changes)
    with pytest.raises((ValueError, OSError), match=complaint): stage2.pretrain(wrong)

@pytest.mark.parametrize('changes, complaint', [
    (dict(corpora=('emoij',)), 'did you mean'), (dict(sampling='rnd'), 'rnd'),
    (dict(crop_scale=(.9, .1)), 'crop_scale'),
    (dict(video_mask_ratio=1.), 'video_ratio'), (dict(word_mask_ratio=-.1), 'word_ratio'),
    (dict(num_sample=2), 'num_sample'),
    (dict(hardness=-1), 'hardness'), (dict(max_length=1), 'max_length'), (dict(tubelet_size=2), 'tubelet_size'),
    (dict(vtc_weight=0, vtm_weight=0, mlm_weight=0), 'that is Stage 1'), (dict(temperature=0.), 'temperature')])
def test_options_out_of_range_are_refused_by_name(config, changes, complaint):
    with pytest.raises(ValueError, match=complaint): override(config, changes)

def test_a_mistake_on_the_command_line_is_one_line(config, capsys, tmp_path):
    argv = ['--preset', 'quick_emoji', '--data-root', config.data.root, '--init', 'nowhere', '--run-dir', str(tmp_path)]
    for dry in ([], ['--dry-run']):
        with pytest.raises(UsageError) as error: stage2.main([*argv, *dry])
        assert error.value.code == 2 and 'nowhere' in capsys.readouterr().err
