"Stage 2 as a run: stopped and continued it ends with the same weights; what it starts from; what a pair that cannot be read does to it."
import json, os, signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from umt.tasks import stage2
from umt.models.published import load_model, save_model
from umt.models.student import Student
from umt.core.signals import Preempted

SIZES = dict(image_size=112, num_frames=4, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    "The smallest run: clips, stills, a tiny student as Stage 1 leaves it; text dropout and drop path are on."
    root = tmp_path_factory.mktemp('stage2')
    torch.manual_seed(0)
    save_model(Student(2, 64, **SIZES), root/'student')
    config = replace(stage2.PRESETS['quick_emoji'], data_root=str(root/'data'), run_dir=str(root/'straight'), init=str(root/'student'), emoji_clips=12, emoji_stills=8, aligned_layers=2,
                     batch_size=4, text_dropout=.1, drop_path=.1, log_every=1, checkpoint_every=100)
    stage2.pretrain(config)
    return config


def test_stopped_and_continued_ends_with_the_same_weights(config, tmp_path, monkeypatch):
    calls, whole = iter(range(10**6)), stage2.objective
    def stopping(*args):
        loss_fn = whole(*args)
        def stop_in_the_fourth_step(model, batch): # two calls before the first step count FLOPs
            if next(calls) == 2 + 3: os.kill(os.getpid(), signal.SIGTERM)
            return loss_fn(model, batch)
        return stop_in_the_fourth_step
    monkeypatch.setattr(stage2, 'objective', stopping)
    stopped = replace(config, run_dir=str(tmp_path/'stopped'))
    with pytest.raises(Preempted): stage2.pretrain(stopped)
    stage2.pretrain(stopped)
    a, b = (load_file(f'{c.run_dir}/model.safetensors') for c in (config, stopped))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    starts = json.loads((tmp_path/'stopped/environment.json').read_text())
    assert [s['start_step'] for s in starts] == [0, 4]


def test_images_and_videos_are_trained_on_in_proportion(config):
    log = [json.loads(line) for line in open(f'{config.run_dir}/metrics.jsonl')]
    pairs = stage2.build_dataset(config, stage2.Tokenizer(config.text))
    assert len(log) == 2 * sum(len(indices) // 4 for indices in pairs.media.values()) and {'uta', 'vtc', 'vtm', 'mlm'} <= set(log[0])


def test_goes_on_without_masks(config, tmp_path):
    after = replace(stage2.unmasked(config), run_dir=str(tmp_path/'unmasked'))
    before, (teacher, model) = load_model(config.run_dir), stage2.build_models(after)
    assert teacher is None and len(model.student.alignment_heads) == 0
    state = before.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert stage2.pretrain(after)['step'] == stage2.pretrain(config)['step'] // 2


@pytest.mark.parametrize('changes, complaint', [
    (dict(init='nowhere'), "expected 'scratch'"), (dict(aligned_layers=3), 'aligned_layers=3'), (dict(teacher_image_size=64), 'do not fit'), (dict(corpora=('emoij',)), 'did you mean'),
    (dict(text='nowhere/at/all'), 'nowhere/at/all')])
def test_what_does_not_fit_is_said(config, tmp_path, changes, complaint):
    with pytest.raises((ValueError, OSError), match=complaint): stage2.pretrain(replace(config, run_dir=str(tmp_path), **changes))


def test_another_micro_batch_is_another_run(config):
    with pytest.raises(ValueError, match='micro_batch_size'): stage2.pretrain(replace(config, micro_batch_size=2))


def test_unreadable_pairs_are_replaced_and_listed(config, tmp_path):
    data = tmp_path/'data'
    stage2.make_data(replace(config, data_root=str(data)))
    first = json.loads((data/'captions_train.json').read_text())[0]['video']
    (data/first).write_bytes(b'no video')
    result = stage2.pretrain(replace(config, data_root=str(data), run_dir=str(tmp_path/'run'), bad_clip_limit=.5))
    listed = [json.loads(line) for line in (tmp_path/'run/quarantine.jsonl').read_text().splitlines()]
    assert result['quarantined'] == 1 and [entry['path'] for entry in listed] == [first]


def test_a_single_stage_from_scratch(config, tmp_path):
    result = stage2.pretrain(replace(config, init='scratch', student='nano', run_dir=str(tmp_path), aligned_layers=3, epochs=1))
    assert result['uta'] > 1 and load_model(tmp_path).student.config['depth'] == 4
