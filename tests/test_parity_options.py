"Numerical parity beyond the plain forward: positions, options of Stage 1, fine-tuning and Stage-2 steps, optimizers"
import re

import pytest
import torch
import torch.nn.functional as F
from reference import (
    CLOSE, gradients, multimodal_sizes, read_config, read_io, stage1_sizes, teacher_options, vectors)
from timm.data import mixup as timm_mixup
from torch.testing import assert_close

from umt.data.augmentation import Mixup
from umt.models.fitting import fit_to
from umt.models.heads import Recognizer
from umt.models.masking import EvenVisible, visible_from_mask
from umt.models.multimodal import multimodal_from
from umt.models.published import (
    load_model, load_multimodal, load_recognizer, load_student, published_names, save_model, save_published,
    to_published)
from umt.models.student import Student
from umt.models.targets import uta_loss
from umt.models.teachers import load_teacher
from umt.models.text import TextModel
from umt.training.schedule import OptimizerConfig, layer_groups, learning_rate, weight_decay_at, weight_decay_groups


def check_gradients(model, recorded):
    "Every recorded gradient, by its published name."
    names, parameters = published_names(model), dict(model.named_parameters())
    for name, expected in recorded.items():
        found = parameters[names[name]].grad.view_as(expected)
        assert_close(found, expected, **CLOSE, msg=lambda message: f'{name}: {message}')


# Positions

def encoded(model, video):
    with torch.no_grad(): return model.eval().encode_video(video.transpose(1, 2))


def positions_model(folder):
    "The Stage-2 model of positions_io at its trained size, and the sizes of the cases."
    config = read_config(folder, 'extra_config.json')
    cases = config['positions']
    sizes = multimodal_sizes(config[cases['checkpoint'].removesuffix('.pth')])
    sizes |= dict(image_size=cases['trained_image_size'], num_frames=cases['trained_frames'])
    return load_multimodal(folder/cases['checkpoint'], **sizes), cases


STAGE2_POSITIONS = 'positions_io.safetensors', 'extra_config.json', 'stage2_b.pth'


@vectors(*STAGE2_POSITIONS)
def test_stage2_at_another_size(folder):
    "The reference's Stage-2 loader makes the table anew: rule 'fresh'"
    model, cases = positions_model(folder)
    io = read_io(folder, 'positions')
    fresh = fit_to(model, image_size=cases['image_size'], positions='fresh')
    video = encoded(fresh, io['size.video'])
    assert_close(video.tokens, io['size.tokens'], **CLOSE)
    assert_close(video.pooled, io['size.pooled'], **CLOSE)
    assert_close(encoded(fresh, io['size.image']).tokens, io['size.image_tokens'], **CLOSE)
    both = cases['both']
    fresh = fit_to(model, both['frames'], both['image_size'], positions='fresh')
    assert_close(encoded(fresh, io['size.video'][:, :both['frames']]).tokens, io['both.tokens'], **CLOSE)


@pytest.mark.parametrize('rule', ['extend', 'fresh'])
@vectors(*STAGE2_POSITIONS)
def test_stage2_with_other_frames(folder, rule):
    "At the trained size our rule for Stage 2 and the reference's loader agree: time goes on"
    model, cases = positions_model(folder)
    io = read_io(folder, 'positions')
    video = encoded(fit_to(model, cases['frames'], positions=rule), io['frames.video'])
    assert_close(video.tokens, io['frames.tokens'], **CLOSE)
    assert_close(video.pooled, io['frames.pooled'], **CLOSE)
    fewer = fit_to(model, cases['fewer_frames'], positions=rule)
    assert_close(encoded(fewer, io['frames.video'][:, :cases['fewer_frames']]).tokens, io['fewer.tokens'], **CLOSE)


@vectors(*STAGE2_POSITIONS)
def test_stage2_with_resized_time(folder):
    "The option `ckpt_num_frame` of the reference: rule 'resize'"
    model, cases = positions_model(folder)
    io = read_io(folder, 'positions')
    for case, frames in ('frames', cases['frames']), ('fewer', cases['fewer_frames']):
        other = fit_to(model, frames, positions='resize')
        assert_close(other.student.encoder.positions[None], io[f'{case}.interpolated_table'], **CLOSE)
        video = encoded(other, io['frames.video'][:, :frames])
        assert_close(video.tokens, io[f'{case}.interpolated_tokens'], **CLOSE)
        if case == 'frames': assert_close(video.pooled, io['frames.interpolated_pooled'], **CLOSE)
    both = cases['both']
    other = fit_to(fit_to(model, image_size=both['image_size'], positions='fresh'), both['frames'], positions='resize')
    assert_close(encoded(other, io['size.video'][:, :both['frames']]).tokens, io['both.interpolated_tokens'], **CLOSE)


@vectors(*STAGE2_POSITIONS, 'stage1_student.pth', 'config.json')
def test_stage1_weights_in_stage2(folder):
    "Another frame count; the pooling norm is new; the heads' epsilon is Stage 2's"
    case, io = read_config(folder, 'extra_config.json', 'positions')['stage1'], read_io(folder, 'positions')
    sizes = stage1_sizes(folder) | dict(num_frames=case['trained_frames'])
    student = load_student(folder/case['checkpoint'], **sizes)
    bert = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    text = TextModel(student.config['embed_dim'], fusion_layer=1, **bert)
    model = multimodal_from(student, text, num_frames=case['frames']).eval()
    video, visible = io['stage1.video'].transpose(1, 2), visible_from_mask(io['stage1.mask'])
    with torch.no_grad(): whole, seen = model.encode_video(video), model.encode_video(video, visible)
    found = dict(tokens=whole.tokens, pooled=whole.pooled, visible_tokens=seen.tokens, visible_pooled=seen.pooled)
    for name, tensor in found.items(): assert_close(tensor, io[f'stage1.{name}'], **CLOSE)
    assert_close(seen.aligned, F.normalize(io['stage1.aligned'], dim=-1), **CLOSE)
    for head in model.student.alignment_heads:
        with torch.no_grad(): [p.mul_(.01) for p in head.head.parameters()]
    with torch.no_grad(): small = model.encode_video(video, visible).aligned
    assert_close(small, F.normalize(io['stage1.aligned_small_heads'], dim=-1), **CLOSE)


def recognition_cases(folder):
    "Each case of finetune_positions_io: the weights it starts from, frames and pixels, the video it is shown."
    c = read_config(folder, 'extra_config.json', 'finetune_positions')
    video = read_io(folder, 'finetune_positions')['more_frames.video']
    pixels = lambda grid: grid * c['patch']
    return c, {
        'same': ('trained', c['trained_frames'], pixels(c['trained_grid']), video[:, :, :c['trained_frames']]),
        'more_frames': ('trained', c['more_frames'], pixels(c['trained_grid']), video),
        'smaller_grid': ('trained', c['trained_frames'], pixels(c['smaller_grid']), 'smaller_grid.video'),
        'regrid': ('smaller', c['trained_frames'], pixels(c['regrid']), 'regrid.video'),
        'retime': ('smaller', c['more_frames'], pixels(c['smaller_grid']), None),
        'back': ('smaller', c['trained_frames'], pixels(c['trained_grid']), video[:, :, :c['trained_frames']]),
    }


@pytest.mark.parametrize('source', ['file', 'file with sizes', 'folder'])
@vectors('finetune_positions_io.safetensors', 'positions_finetuned.pth', 'extra_config.json')
def test_recognition_at_another_size(folder, source, tmp_path):
    "The stored table is resized; the same from the reference's file, from a file of ours, and from a run folder"
    config, cases = recognition_cases(folder)
    io, heads = read_io(folder, 'finetune_positions'), config['heads']
    trained = load_recognizer(folder/config['checkpoint'], num_heads=heads)
    smaller = fit_to(trained, *cases['smaller_grid'][1:3])
    for case, (start, frames, size, video) in cases.items():
        weights = dict(trained=trained, smaller=smaller)[start]
        if source == 'folder':
            save_model(weights, tmp_path/start)
            model = fit_to(load_model(tmp_path/start), frames, size)
        else:
            path = tmp_path/f'{start}.pth'
            torch.save(dict(model=to_published(weights)), path)
            if source == 'file with sizes': save_published(weights, path)
            model = load_recognizer(path, size, frames, heads)
        if f'{case}.pos_embed' in io: assert_close(model.encoder.positions[None], io[f'{case}.pos_embed'], **CLOSE)
        video = io[video] if isinstance(video, str) else video
        if video is None: continue
        with torch.no_grad(): logits = model.eval()(video)
        assert_close(logits, io[f'{case}.logits'], **CLOSE, msg=lambda m: f'{case}: {m}')


# Options of Stage 1

STAGE1 = (
    'stage1_options_io.safetensors', 'stage1_io.safetensors', 'stage1_student.pth', 'clip_visual.pth', 'config.json')


def stage1_model(folder, **options):
    "A student with options, from the file of the plain one; its first heads if it has fewer."
    plain = load_student(folder/'stage1_student.pth', **stage1_sizes(folder))
    student = Student(**plain.config | options)
    weights, names = plain.state_dict(), student.state_dict().keys()
    student.load_state_dict({name: weights[name] for name in names})
    return student.eval()


def stage1_teacher(folder, **options):
    config = read_config(folder)
    return load_teacher(folder/'clip_visual.pth', **teacher_options(config), **options)


@vectors(*STAGE1)
def test_loss_types(folder):
    "Tokens divided by their length or not, three losses"
    io, inputs = read_io(folder, 'stage1_options'), read_io(folder, 'stage1')
    layers = read_config(folder)['student']['aligned_layers']
    visible = visible_from_mask(inputs['mask'])
    for norm, unit_tokens in ('l2', True), ('none', False):
        student = stage1_model(folder, unit_tokens=unit_tokens)
        tokens = student(inputs['video'], visible)
        teacher = stage1_teacher(folder, aligned_layers=layers, unit_tokens=unit_tokens)
        target = teacher(inputs['video'], lambda attention: visible).tokens
        if not unit_tokens: assert_close(tokens, io['student_tokens.none_norm'], **CLOSE)
        for kind in ('l2', 'mse', 'smooth_l1'):
            assert_close(uta_loss(tokens, target, kind)[None], io[f'loss.{norm}_norm.{kind}'], **CLOSE)
        uta_loss(tokens, target, 'mse').backward()
        check_gradients(student, gradients(io, f'grad.{norm}_norm.mse.'))


@vectors(*STAGE1)
def test_layer_interval(folder):
    "Layers further apart, in student and teacher"
    io, inputs = read_io(folder, 'stage1_options'), read_io(folder, 'stage1')
    options = dict(aligned_layers=int(io['interval.layers']), layer_interval=float(io['interval.value']))
    student, teacher = stage1_model(folder, **options), stage1_teacher(folder, **options)
    assert list(student.aligned) == io['interval.student_index'].tolist()
    visible = visible_from_mask(inputs['mask'])
    tokens, target = student(inputs['video'], visible), teacher(inputs['video'], lambda attention: visible).tokens
    assert_close(tokens, io['interval.student_tokens'], **CLOSE)
    assert_close(uta_loss(tokens, target)[None], io['interval.loss'], **CLOSE)
    alone = teacher(inputs['video'], only=EvenVisible(*visible))
    assert_close(alone.tokens, io['masked_teacher.tokens'], **CLOSE)
    assert_close(alone.attention, io['masked_teacher.attention'], **CLOSE)


@vectors(*STAGE1)
def test_small_heads(folder):
    "The epsilon of the heads' norm"
    io, inputs = read_io(folder, 'stage1_options'), read_io(folder, 'stage1')
    student = stage1_model(folder)
    with torch.no_grad():
        for head in student.alignment_heads: [p.mul_(.01) for p in head.head.parameters()]
        tokens = student(inputs['video'], visible_from_mask(inputs['mask']))
    assert_close(tokens, io['small_heads.student_tokens'], **CLOSE)
    target = inputs['teacher_tokens'][:, ~inputs['mask']].view_as(tokens)
    assert_close(uta_loss(tokens, target)[None], io['small_heads.loss'], **CLOSE)


@pytest.mark.parametrize('tubelet', ['centre', 'mean'])
@vectors(*STAGE1)
def test_teacher_of_two_frames(folder, tubelet):
    "A patch convolution over two frames, made of the one over one frame"
    io, video = read_io(folder, 'stage1_options'), read_io(folder, 'stage1')['video']
    teacher = stage1_teacher(folder, aligned_layers=1, tubelet_size=2, tubelet=tubelet)
    found = teacher(video)
    assert_close(found.tokens, io[f'kernel2_{tubelet}.tokens'], **CLOSE)
    assert_close(found.attention, io[f'kernel2_{tubelet}.attention'], **CLOSE)


# One step of fine-tuning

def recorded_draw(monkeypatch, mix, lam, box=None):
    "Make a `Mixup` draw what the reference drew: a weight, or a box."
    cutmix = box is not None
    monkeypatch.setattr(mix.mix, '_params_per_batch', lambda: (lam, cutmix))
    monkeypatch.setattr(timm_mixup, 'cutmix_bbox_and_lam', lambda *args, **kwargs: (box, lam))


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
@vectors('finetune_step_io.safetensors', 'extra_config.json')
def test_mixing(folder, kind, monkeypatch):
    io = {k.removeprefix('mix.'): v for k, v in read_io(folder, 'finetune_step').items() if k.startswith('mix.')}
    smoothing = read_config(folder, 'extra_config.json', 'finetune_step')['smoothing']
    mix = Mixup(io[f'{kind}_target'].shape[1], label_smoothing=smoothing)
    recorded_draw(monkeypatch, mix, float(io[f'{kind}_lam']), io['cutmix_box'].tolist() if kind == 'cutmix' else None)
    video, target = mix(io['video'], io['label'])
    assert_close(video, io[f'{kind}_video'], **CLOSE)
    assert_close(target, io[f'{kind}_target'], **CLOSE)


FINETUNE = 'finetune_step_io.safetensors', 'finetuned_io.safetensors', 'finetuned.pth'


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
@vectors(*FINETUNE, 'extra_config.json', 'config.json')
def test_finetune_step(folder, kind, monkeypatch):
    "Mixed clips, soft targets, logits, loss, gradients; one step of AdamW with layer decay"
    config, io = read_config(folder, 'extra_config.json', 'finetune_step'), read_io(folder, 'finetune_step')
    clips = read_io(folder, 'finetuned')['video']
    model = load_recognizer(folder/config['checkpoint'], num_heads=stage1_sizes(folder)['num_heads'])
    assert_close(model(clips), io['plain_logits'], **CLOSE)
    label, hard = io['label'], F.cross_entropy(model(clips), io['label'])
    assert_close(hard[None], io['hard_loss'], **CLOSE)
    smooth = F.cross_entropy(model(clips), label, label_smoothing=config['smoothing'])
    assert_close(smooth[None], io['smoothing_loss'], **CLOSE)
    mix = Mixup(read_config(folder)['num_classes'], label_smoothing=config['smoothing'])
    recorded_draw(monkeypatch, mix, float(io[f'{kind}_lam']), io['cutmix_box'].tolist() if kind == 'cutmix' else None)
    video, target = mix(clips, label)
    assert_close(target, io[f'{kind}_target'], **CLOSE)
    logits = model(video)
    assert_close(logits, io[f'{kind}_logits'], **CLOSE)
    loss = F.cross_entropy(logits, target)
    assert_close(loss[None], io[f'{kind}_loss'], **CLOSE)
    loss.backward()
    check_gradients(model, gradients(io, f'{kind}_grad.'))
    if kind == 'cutmix': return
    options = config['optimizer']
    groups = layer_groups(model, options['weight_decay'], options['layer_decay'])
    groups = [group | dict(lr=options['lr'] * group['lr_scale']) for group in groups]
    torch.optim.AdamW(groups, betas=options['betas'], eps=options['eps']).step()
    names, parameters = published_names(model), dict(model.named_parameters())
    for name, expected in gradients(io, 'mixup_after.').items():
        assert_close(parameters[names[name]].detach(), expected, **CLOSE, msg=lambda m: f'{name}: {m}')


# Stage 2 and retrieval: one step

def step_batch(io, video='video', prefix=''):
    "A recorded batch as `Multimodal` takes it, words to be guessed included where there are some."
    batch = {name: io[prefix + name] for name in ('input_ids', 'attention_mask', 'sample_id')}
    batch |= dict(video=io[video].transpose(1, 2), key=torch.arange(len(batch['input_ids'])))
    if prefix + 'mlm_labels' not in io: return batch
    labels = io[prefix + 'mlm_labels'].flatten()
    places = (labels != -100).nonzero()[:, 0]
    return batch | dict(mlm_ids=io[prefix + 'mlm_input_ids'], mlm_positions=places, mlm_labels=labels[places])


@pytest.mark.parametrize('medium', ['video', 'image'])
@vectors('stage2_total_io.safetensors', 'stage2_b.pth', 'extra_config.json')
def test_stage2_total(folder, medium):
    "All losses of a step of Stage 2, their sum, and its gradients; masks and negatives as recorded"
    config, io = read_config(folder, 'extra_config.json', 'stage2_b'), read_io(folder, 'stage2_total')
    model = load_multimodal(folder/'stage2_b.pth', **multimodal_sizes(config)).eval()
    teacher = load_teacher(
        folder/'stage2_b.pth', aligned_layers=config['vision']['aligned_layers'], **teacher_options(config))
    batch, visible = step_batch(io, medium, f'{medium}_'), visible_from_mask(io[f'{medium}_mask'])
    target = teacher(batch['video'], lambda attention: visible).tokens
    negatives = io[f'{medium}_negative_media'], io[f'{medium}_negative_text']
    losses = model(batch, dict(uta=1., vtc=1., vtm=1., mlm=1.), visible, target, negatives=negatives)
    for name, loss in losses.items(): assert_close(loss[None], io[f'{medium}_{name}_loss'], **CLOSE)
    total = sum(losses.values())
    assert_close(total[None], io[f'{medium}_loss'], **CLOSE)
    total.backward()
    recorded = gradients(io, f'{medium}_grad.')
    assert len(recorded) == 19
    check_gradients(model, recorded)
    with torch.no_grad():
        video = model.encode_video(batch['video'], visible)
        hidden = model.encode_text(batch['input_ids'], batch['attention_mask'])
        assert_close(model.video_proj(video.pooled), io[f'{medium}_vision_proj'], **CLOSE)
        assert_close(model.text_proj(hidden[:, 0]), io[f'{medium}_text_proj'], **CLOSE)


@vectors('retrieval_train_io.safetensors', 'stage2_b.pth', 'extra_config.json')
def test_retrieval_step(folder):
    "Fine-tuning for retrieval: more frames, no mask, a vector per frame"
    config, io = read_config(folder, 'extra_config.json'), read_io(folder, 'retrieval_train')
    case = config['retrieval_train']
    sizes = multimodal_sizes(config[case['checkpoint'].removesuffix('.pth')])
    trained = load_multimodal(folder/case['checkpoint'], **sizes).eval()
    model, batch = fit_to(trained, case['frames']), step_batch(io)
    video = model.encode_video(batch['video'])
    hidden = model.encode_text(batch['input_ids'], batch['attention_mask'])
    assert_close(video.pooled, io['pooled_per_frame'], **CLOSE)
    cosine = model.embed_video(video.pooled).mean(1) @ model.embed_text(hidden).T
    assert_close(cosine, io['similarity_per_frame'], **CLOSE)
    losses = model(batch, dict(vtc=1., vtm=1.), negatives=(io['negative_video'], io['negative_text']))
    for name, loss in losses.items(): assert_close(loss[None], io[f'{name}_loss'], **CLOSE)
    total = sum(losses.values())
    assert_close(total[None], io['loss'], **CLOSE)
    total.backward()
    bert = {name.replace('text_encoder.', 'text_encoder.bert.'): grad for name, grad in gradients(io).items()}
    check_gradients(model, bert)


# Optimizers

def groups_by_name(model, groups):
    "Published name -> (learning-rate scale, weight decay)."
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {names[id(p)]: (g.get('lr_scale', 1.), g['weight_decay']) for g in groups for p in g['params']}
    return {theirs: ours[name] for theirs, name in published_names(model).items() if name in ours}


def number(title, name): return float(re.search(rf'{name} ([\d.]+)', title)[1])


@vectors('layer_groups.json')
def test_layer_groups(folder):
    "Learning-rate scale and weight decay of every parameter; a stored position table is no parameter here"
    recipes = read_config(folder, 'layer_groups.json')
    judged = {title: groups for title, groups in recipes.items() if title.startswith(('recognition', 'stage 1'))}
    assert judged
    for title, expected in judged.items():
        sizes, decay = dict(embed_dim=8, num_heads=2, depth=int(number(title, 'depth'))), number(title, 'weight_decay')
        if title.startswith('stage 1'):
            heads = {name.split('.')[1] for name in expected if name.startswith('clip_decoder.')}
            model = Student(len(heads), 8, **sizes)
            groups = weight_decay_groups(model, decay)
        else:
            model = Recognizer(3, num_frames=int(number(title, 'frames')), **sizes)
            groups = layer_groups(model, decay, number(title, ' decay'))
        found, expected = groups_by_name(model, groups), {k: v for k, v in expected.items() if k != 'pos_embed'}
        assert found.keys() == expected.keys()
        for name, (scale, weight_decay) in expected.items():
            assert found[name] == pytest.approx((scale, weight_decay), rel=1e-9), f'{title}: {name}'


def rates(config, steps_per_epoch, epochs, samples):
    "Learning rate and weight decay of every step of a run."
    steps = range(steps_per_epoch * epochs)
    lr = [learning_rate(step, config, steps_per_epoch, epochs, samples) for step in steps]
    return lr, [weight_decay_at(step, config, len(steps)) for step in steps]


@vectors('schedules.json')
def test_schedules(folder):
    for recipe in read_config(folder, 'schedules.json'):
        warmup = dict(warmup_steps=recipe['warmup_steps']) if recipe['warmup_steps'] > 0 else {}
        config = OptimizerConfig(
            lr=recipe['base_lr'], min_lr=recipe['min_lr'], warmup_lr=recipe['warmup_lr'],
            warmup_epochs=recipe['warmup_epochs'], weight_decay=recipe['weight_decay_start'],
            weight_decay_end=recipe['weight_decay_end'], **warmup)
        samples = recipe['total_batch'] * recipe['num_sample']
        lr, weight_decay = rates(config, recipe['steps_per_epoch'], recipe['epochs'], samples)
        assert lr == pytest.approx(recipe['lr'], rel=1e-9), recipe['recipe']
        assert weight_decay == pytest.approx(recipe['weight_decay'], rel=1e-9), recipe['recipe']


@vectors('stage2_optimizer.json', 'stage2_b.pth', 'extra_config.json')
def test_stage2_optimizer(folder):
    recorded = read_config(folder, 'stage2_optimizer.json')
    config = read_config(folder, 'extra_config.json', 'stage2_b')
    model = load_multimodal(folder/'stage2_b.pth', **multimodal_sizes(config))
    groups = weight_decay_groups(model, recorded['weight_decay_base'], decayed=('temperature',))
    found = {name: decay for name, (_, decay) in groups_by_name(model, groups).items()}
    elsewhere = 'clip_teacher.', 'text_encoder.cls.predictions.decoder.' # frozen, and tied to the word table
    pick = lambda decays: {name: decay for name, decay in decays.items() if not name.startswith(elsewhere)}
    assert pick(found) == pick(recorded['weight_decay'])
    for schedule in recorded['schedules']:
        config = OptimizerConfig(
            lr=1., min_lr=schedule['min_lr_multi'], min_lr_as='floor', warmup_steps=schedule['warmup_steps'] or None)
        lr, _ = rates(config, schedule['total_steps'], 1, 256)
        assert lr == pytest.approx(schedule['factor'], rel=1e-9)
