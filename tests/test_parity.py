"Numerical parity with the paper's reference implementation: recorded vectors (tiny_a, tiny_b) and golden numbers (B/16)"
import json, os, sys
from pathlib import Path
from types import ModuleType
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import Dataset
from umt.models.published import (
    PUBLISHED_GRID, load_model, load_multimodal, load_published, load_recognizer, load_student, load_teacher,
    published_names, save_model, save_published, to_published)
from umt.models.weights import WeightsError, read_state_dict
from umt.models.multimodal import Multimodal
from umt.models.objectives import match_negatives, mlm_loss, similarity, vtc_loss
from umt.models.targets import uta_loss
from umt.core.config import override
from umt.tasks.ranking import RankingConfig, gallery_metrics, index_videos, score_gallery
from umt.models.backbone import position_table
from umt.models.masking import visible_from_mask
from umt.models.heads import Recognizer
from umt.models.student import SIZES, Student
from umt.models.teachers import Teacher, open_clip_visual
from umt.training.distributed import start_accelerator

REFERENCE = Path(os.environ.get('UMT_REFERENCE_DIR', Path(__file__).parents[2]/'shared'/'reference'))
close = dict(rtol=1e-4, atol=1e-5)  # the tolerance that the reference vectors are given with


@pytest.fixture(params=['tiny_a', 'tiny_b'])
def tiny(request):
    folder = REFERENCE/request.param
    if not folder.exists(): pytest.skip(f'no reference vectors at {folder} (set UMT_REFERENCE_DIR)')
    return folder


def sizes(folder):
    student = json.loads((folder/'config.json').read_text())['student']
    return dict(image_size=student['image_size'], num_frames=student['frames'], num_heads=student['heads'])


def clip_options(folder, config='config.json'):
    "What a file of the teacher does not say about itself."
    teacher = json.loads((folder/config).read_text())['teacher']
    return dict(num_heads=teacher['heads'], activation=teacher['activation'])


def shown(mask):
    "A recorded mask, as the teacher asks for it."
    return lambda attention: visible_from_mask(mask)


def test_stage1(tiny):
    "Student tokens, loss and every recorded gradient"
    io = load_file(tiny/'stage1_io.safetensors')
    student = load_student(tiny/'stage1_student.pth', **sizes(tiny)).eval()
    tokens = student(io['video'], visible_from_mask(io['mask']))
    assert_close(tokens, io['student_tokens'], **close)
    visible = (~io['mask']).nonzero()[:, 1].view(1, len(io['mask']), -1, 1)
    loss = uta_loss(tokens, io['teacher_tokens'].take_along_dim(visible, 2))
    assert_close(loss[None], io['loss'], **close)
    loss.backward()
    names, parameters = published_names(student), dict(student.named_parameters())
    recorded = {k.removeprefix('grad.'): v for k, v in io.items() if k.startswith('grad.')}
    assert recorded
    for name, grad in recorded.items(): assert_close(parameters[names[name]].grad, grad, **close, msg=lambda m: f'{name}: {m}')


def test_end_to_end(tiny):
    "The same loss with our teacher in place of the recorded one"
    io = load_file(tiny/'stage1_io.safetensors')
    student = load_student(tiny/'stage1_student.pth', **sizes(tiny)).eval()
    layers = student.config['aligned_layers']
    teacher = load_teacher(tiny/'clip_visual.pth', aligned_layers=layers, **clip_options(tiny))
    target = teacher(io['video'], shown(io['mask']))
    assert_close(uta_loss(student(io['video'], target.visible), target.tokens)[None], io['loss'], **close)


def test_recognition(tiny):
    "Logits of the fine-tuned model, whose positions are in the file; frames and pixels are found from it"
    io = load_file(tiny/'finetuned_io.safetensors')
    recognizer = load_recognizer(tiny/'finetuned.pth', num_heads=sizes(tiny)['num_heads']).eval()
    assert_close(recognizer(io['video']), io['logits'], **close)


def test_round_trip(tiny, tmp_path):
    "Published -> ours -> our format -> published: every tensor, name, shape and their order, to the bit"
    student = load_student(tiny/'stage1_student.pth', **sizes(tiny))
    recognizer = load_recognizer(tiny/'finetuned.pth', num_heads=sizes(tiny)['num_heads'])
    for model, file in ((student, 'stage1_student.pth'), (recognizer, 'finetuned.pth')):
        save_model(model, tmp_path/'ours')
        save_published(load_model(tmp_path/'ours'), tmp_path/'published.pth')
        expected, got = read_state_dict(tiny/file), read_state_dict(tmp_path/'published.pth')
        assert set(got) == set(expected)
        assert all(torch.equal(got[k], expected[k]) and got[k].dtype == expected[k].dtype for k in expected)
        assert {k.split('.')[0]: None for k in got} == {k.split('.')[0]: None for k in expected}


@pytest.mark.parametrize('wrapper', ['model', 'module', None])
def test_wrappers(tiny, tmp_path, wrapper):
    state = read_state_dict(tiny/'stage1_student.pth')
    torch.save({wrapper: state} if wrapper else state, tmp_path/'file.pth')
    loaded = to_published(load_student(tmp_path/'file.pth', **sizes(tiny)))
    assert list(loaded) == list(state) and all(torch.equal(loaded[k], state[k]) for k in state)


@pytest.mark.parametrize('change, expected', [
    (lambda s: s.pop('blocks.0.attn.q_bias'), 'missing         1  blocks.0.attn.q_bias'),
    (lambda s: s.update({'norm.weight': torch.ones(3)}), 'unexpected      1  norm.weight'),
    (lambda s: s.update({'head.bias': torch.ones(3)}), 'mismatched      1  head.bias'),
    (lambda s: s.update({'blocks.0.attn.qkv.bias': torch.ones(3)}), 'unexpected      1  blocks.0.attn.qkv.bias'),
])
def test_strict(tiny, tmp_path, change, expected):
    "No tensor is ignored"
    state = read_state_dict(tiny/'finetuned.pth')
    change(state)
    torch.save(state, tmp_path/'file.pth')
    with pytest.raises(WeightsError, match=expected): load_recognizer(tmp_path/'file.pth', num_heads=sizes(tiny)['num_heads'])


def test_sixteen_frames(tmp_path):
    "A 16-frame file (half precision, under `module`, as DeepSpeed leaves it), which the reference's own loader takes for 8 frames"
    original = Recognizer(5, num_frames=16, base_grid=PUBLISHED_GRID, embed_dim=128, depth=1, num_heads=4)
    state = {k: v.half() for k, v in to_published(original).items()}
    assert state['pos_embed'].shape == (1, 3136, 128)
    torch.save(dict(module=state), tmp_path/'f16.pth')
    assert load_recognizer(tmp_path/'f16.pth').encoder.grid == (16, 14, 14)
    assert_close(load_recognizer(tmp_path/'f16.pth').encoder.positions, original.encoder.positions, rtol=0, atol=1e-3)
    eight = load_recognizer(tmp_path/'f16.pth', num_frames=8)
    assert eight.encoder.grid == PUBLISHED_GRID


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'encoder.'])
def test_fine_tuned_files_under_a_prefix(tiny, tmp_path, capsys, prefix):
    "As training code wraps them; the report says where each tensor came from"
    io, state = load_file(tiny/'finetuned_io.safetensors'), read_state_dict(tiny/'finetuned.pth')
    torch.save(dict(model={prefix + name: tensor for name, tensor in state.items()}), tmp_path/'file.pth')
    model = load_published(tmp_path/'file.pth', num_heads=sizes(tiny)['num_heads']).eval()
    assert_close(model(io['video']), io['logits'], **close)
    report = capsys.readouterr().out
    assert f'loaded        {len(state):3}' in report and 'missing         0' in report
    torch.save({prefix + name: tensor for name, tensor in state.items() if name != 'fc_norm.bias'}, tmp_path/'file.pth')
    with pytest.raises(WeightsError, match=f'missing         1  {prefix}fc_norm.bias'): load_published(tmp_path/'file.pth', num_heads=sizes(tiny)['num_heads'])


def test_stage1_files_are_known_by_their_keys(tiny):
    assert type(load_published(tiny/'stage1_student.pth', num_heads=sizes(tiny)['num_heads'])) is Student


def test_teacher_report(tiny, tmp_path, capsys):
    "Strict, like the others"
    layers, state, options = sizes(tiny), read_state_dict(tiny/'clip_visual.pth'), clip_options(tiny)
    teacher = load_teacher(tiny/'clip_visual.pth', aligned_layers=2, **options)
    assert f'loaded        {len(state):3}' in capsys.readouterr().out
    patch = teacher.visual.patch_size[0]
    assert load_teacher(tiny/'clip_visual.pth', image_size=3 * patch, aligned_layers=2, **options).grid == 3
    assert f'interpolated    1  positional_embedding {(layers["image_size"] // 16)**2} -> 9 patches' in capsys.readouterr().out
    name = next(k for k in state if k.endswith('ln_post.bias'))
    torch.save({k: v for k, v in state.items() if k != name}, tmp_path/'clip.pth')
    with pytest.raises(WeightsError, match='ln_post.bias'): load_teacher(tmp_path/'clip.pth', **options)
    torch.save(state | {name.replace('ln_post', 'ln_extra'): state[name]}, tmp_path/'clip.pth')
    with pytest.raises(WeightsError, match='ln_extra.bias'): load_teacher(tmp_path/'clip.pth', **options)


# Stage 2 and retrieval: one recorded model (tiny_a)

TINY = dict(image_size=64, num_frames=4, num_heads=2, text_heads=2)
CLIP_HEADS = 1


@pytest.fixture(scope='module')
def stage2():
    if not (REFERENCE/'tiny_a').exists(): pytest.skip(f'no reference vectors at {REFERENCE} (set UMT_REFERENCE_DIR)')
    return REFERENCE/'tiny_a'/'stage2.pth'


@pytest.fixture(scope='module')
def multimodal(stage2): return load_multimodal(stage2, **TINY).eval()


@pytest.fixture(scope='module')
def recorded(stage2):
    io = load_file(stage2.with_name('stage2_io.safetensors'))
    return io | {medium: io[medium].transpose(1, 2) for medium in ('video', 'image')}


@torch.no_grad()
@pytest.mark.parametrize('medium', ['video', 'image'])
def test_stage2_video_side(stage2, multimodal, recorded, medium):
    "Tokens, poolings, aligned tokens, the targets of the teacher in the file, and the loss between them"
    io = {name.removeprefix(f'{medium}_'): tensor for name, tensor in recorded.items() if name.startswith(f'{medium}_')}
    whole, seen = multimodal.encode_video(recorded[medium]), multimodal.encode_video(recorded[medium], visible_from_mask(io['mask']))
    target = load_teacher(stage2, aligned_layers=3, num_heads=CLIP_HEADS)(recorded[medium], shown(io['mask'])).tokens
    found = dict(tokens=whole.tokens, pooled=whole.pooled, visible_tokens=seen.tokens, visible_pooled=seen.pooled, aligned=seen.aligned,
                 target=target, uta_loss=uta_loss(seen.aligned, target)[None])
    assert found.keys() | {'mask'} == io.keys() and whole.aligned is None
    for name, tensor in found.items():
        expected = F.normalize(io[name], dim=-1) if name in ('aligned', 'target') else io[name]  # recorded before they were given unit length
        assert_close(tensor, expected, **close, msg=lambda m: f'{medium}_{name}: {m}')


@torch.no_grad()
def test_stage2_text_side(multimodal, recorded):
    "What the texts become; how they compare with, match, and are guessed from the visible tokens of the videos"
    io, attention_mask = recorded, recorded['attention_mask']
    hidden, seen = multimodal.encode_text(io['input_ids'], attention_mask), multimodal.encode_video(io['video'], visible_from_mask(io['video_mask']))
    video, text = multimodal.embed_video(seen.pooled), multimodal.embed_text(hidden)
    assert_close(hidden, io['text_tokens'], **close)
    assert_close(hidden[:, 0], io['text_pooled'], **close)
    assert_close(similarity(video, text) / multimodal.temperature, io['similarity_v2t'], **close)
    assert_close(vtc_loss(video, text, io['sample_id'], multimodal.temperature)[None], io['vtc_loss'], **close)
    logits = torch.stack([multimodal.match(hidden, attention_mask, tokens.expand(len(hidden), -1, -1)) for tokens in seen.tokens])
    assert_close(logits, io['match_logits'], **close)
    masked = multimodal.encode_text(io['mlm_input_ids'], attention_mask)
    words = multimodal.text.predict_words(multimodal.text.fuse(masked, attention_mask, seen.tokens))
    assert_close(words, io['mlm_logits'], **close)
    assert_close(mlm_loss(words.flatten(0, 1), io['mlm_labels'].flatten())[None], io['mlm_loss'], **close)


@torch.no_grad()
def test_stage2_step(stage2, multimodal, recorded):
    "The losses that one training step computes in `forward`, where words are guessed at the chosen places only"
    io, labels = recorded, recorded['mlm_labels'].flatten()
    places = (labels != -100).nonzero()[:, 0]
    batch = dict(video=io['video'], input_ids=io['input_ids'], attention_mask=io['attention_mask'], sample_id=io['sample_id'], key=torch.arange(6),
                 mlm_ids=io['mlm_input_ids'], mlm_positions=places, mlm_labels=labels[places])
    target = load_teacher(stage2, aligned_layers=3, num_heads=CLIP_HEADS)(io['video'], shown(io['video_mask']))
    losses = multimodal(batch, dict(uta=1., vtc=1., vtm=1., mlm=1.), target.visible, target.tokens)
    for ours, theirs in dict(uta='video_uta_loss', vtc='vtc_loss', mlm='mlm_loss').items(): assert_close(losses[ours][None], io[theirs], **close)
    pair, each = -io['match_logits'].log_softmax(-1), torch.arange(6)  # [video, text, class]
    video, text, exists = match_negatives(io['similarity_v2t'], io['sample_id'], batch['key'])
    assert exists.all() and not (io['sample_id'] == io['sample_id'][video]).any() and not (io['sample_id'] == io['sample_id'][text]).any()
    expected = (pair[each, each, 1] + pair[video, each, 0] + pair[each, text, 0]).mean() / 3
    assert_close(losses['vtm'], expected, **close)


class Clips(Dataset):
    "Decoded videos, as `umt.data.galleries.GalleryDataset` gives them"
    def __init__(self, videos): self.videos = videos
    def __len__(self): return len(self.videos)
    def __getitem__(self, position):
        _, index = position  # the first is the epoch
        return dict(video=self.videos[index], sample_id=index, failures=[])


def test_retrieval(stage2, multimodal, tmp_path):
    "Scores of the two encoders, match logits of the candidates of either direction, and the figures made of both"
    io, config = load_file(stage2.with_name('retrieval_io.safetensors')), json.loads(stage2.with_name('stage2_config.json').read_text())
    protocol = override(RankingConfig(), run_dir=str(tmp_path), half=False, k_test=config['k_test'])
    index = index_videos(multimodal, Clips(io['video'].transpose(1, 2)), protocol)
    ours = score_gallery(multimodal, index, list(io['input_ids']), protocol, start_accelerator())
    for name, tensor in dict(dual_v2t=ours['dual'], dual_t2v=ours['dual'].T, rerank_v2t=ours['v2t'], rerank_t2v=ours['t2v']).items():
        assert_close(tensor, io[name], **close, msg=lambda m: f'{name}: {m}')
    figures = gallery_metrics(ours, torch.stack([torch.arange(9), io['text_to_video']], 1))
    for prefix, recorded in ('', config['rerank_metrics']), ('dual_', config['dual_metrics']):
        for way, theirs in ('v2t', 'txt'), ('t2v', 'img'):  # the reference names a direction after what is found: `txt` is video to text
            for k in (1, 5, 10): assert round(100 * figures[f'{prefix}{way}_r{k}'], 2) == recorded[f'{theirs}_r{k}']
        assert round(100 * figures[f'{prefix}r_mean'], 2) == recorded['r_mean']


def test_stage2_round_trip(stage2, multimodal, tmp_path):
    "Published -> ours -> our format -> published, teacher included or not: every tensor, name, shape and type, to the bit"
    expected, clip = read_state_dict(stage2), load_teacher(stage2, aligned_layers=3, num_heads=CLIP_HEADS)
    save_model(multimodal, tmp_path/'ours')
    save_published(load_model(tmp_path/'ours'), tmp_path/'alone.pth')
    save_published(load_model(tmp_path/'ours'), tmp_path/'both.pth', clip)
    for file, wanted in (('alone.pth', {k: v for k, v in expected.items() if not k.startswith('clip_teacher.')}), ('both.pth', expected)):
        got = read_state_dict(tmp_path/file)
        assert set(got) == set(wanted) and list(dict.fromkeys(k.split('.')[0] for k in got)) == list(dict.fromkeys(k.split('.')[0] for k in wanted))
        assert all(torch.equal(got[k], wanted[k]) and got[k].dtype == wanted[k].dtype and got[k].shape == wanted[k].shape for k in wanted)


def as_retrieval(state):
    "What fine-tuning leaves of a Stage-2 file"
    return {name.replace('text_encoder.bert.', 'text_encoder.'): tensor for name, tensor in state.items()
            if not any(part in name for part in ('clip_teacher.', 'clip_decoder.', 'text_encoder.cls.'))}


@torch.no_grad()
def test_retrieval_files(stage2, multimodal, recorded, tmp_path, capsys):
    "Keys without `bert.`, no heads, no teacher; the same answers. Twelve frames, as retrieval is fine-tuned with, need nothing else"
    state = as_retrieval(read_state_dict(stage2))
    torch.save(dict(model=state), tmp_path/'ret.pth')
    model = load_published(tmp_path/'ret.pth', 64, 4, 2, 2).eval()
    assert type(model) is Multimodal and f'loaded        {len(state) - 1}' in (report := capsys.readouterr().out) and 'ignored         1' in report
    whole, expected = model.encode_video(recorded['video']), multimodal.encode_video(recorded['video'])
    assert_close(whole.pooled, recorded['video_pooled'], **close)
    hidden, attention_mask = model.encode_text(recorded['input_ids'], recorded['attention_mask']), recorded['attention_mask']
    assert_close(hidden, recorded['text_tokens'], **close)
    assert torch.equal(model.match(hidden, attention_mask, whole.tokens), multimodal.match(hidden, attention_mask, expected.tokens))
    save_model(model, tmp_path/'ours')
    save_published(load_model(tmp_path/'ours'), tmp_path/'again.pth')
    again = read_state_dict(tmp_path/'again.pth')
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    twelve = load_multimodal(tmp_path/'ret.pth', **TINY | dict(num_frames=12)).eval()
    assert twelve.encode_video(torch.randn(1, 3, 12, 64, 64)).pooled.shape == (1, 12, 64)


@pytest.mark.parametrize('teacher', [True, False])
def test_stage2_report(stage2, tmp_path, capsys, teacher):
    "The teacher and `position_ids` are left aside by name; all else is loaded"
    state = {k: v for k, v in read_state_dict(stage2).items() if teacher or not k.startswith('clip_teacher.')}
    torch.save(state, tmp_path/'file.pth')
    load_multimodal(tmp_path/'file.pth', **TINY)
    kinds = {line.split()[0]: int(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert kinds == dict(loaded=163, renamed=kinds['renamed'], interpolated=0, ignored=1 + 56 * teacher, missing=0, unexpected=0, mismatched=0)


@pytest.mark.parametrize('change, expected', [
    (lambda s: s.pop('text_encoder.bert.encoder.layer.3.crossattention.self.key.bias'), 'missing         1  .*crossattention.self.key.bias'),
    (lambda s: [s.pop(f'text_encoder.cls.predictions.{name}') for name in ('bias', 'decoder.bias')], 'missing         2  text_encoder.cls'),
    (lambda s: s.pop('vision_encoder.clip_decoder.1.norm.bias'), 'missing         1  vision_encoder.clip_decoder.1.norm.bias'),
    (lambda s: s.pop('temp'), 'missing         1  temp'),
    (lambda s: s.update({'vision_encoder.cls_token': torch.ones(3)}), 'unexpected      1  vision_encoder.cls_token'),
    (lambda s: s.update({'vision_encoder.pool_norm.bias': torch.ones(3)}), 'mismatched      1  vision_encoder.pool_norm.bias'),
    (lambda s: s.update({'text_encoder.cls.predictions.decoder.weight': torch.ones(97, 64)}), 'decoder.weight: differs from .*word_embeddings.weight'),
    (lambda s: s.update({'text_encoder.bert.embeddings.position_ids': torch.ones(1, 64, dtype=torch.long)}), 'position_ids is not 0, 1, 2'),
    (lambda s: s.pop('itm_head.weight'), 'expected a Stage-2 or retrieval model'),
])
def test_stage2_strict(stage2, tmp_path, change, expected):
    "No tensor is ignored, and none is read twice with different contents"
    state = read_state_dict(stage2)
    change(state)
    torch.save(state, tmp_path/'file.pth')
    with pytest.raises(WeightsError, match=expected): load_multimodal(tmp_path/'file.pth', **TINY)


@pytest.mark.parametrize('file, kind', [('qa.pth', 'question-answering'), ('stage1_student.pth', 'Stage-1 student'), ('finetuned.pth', 'recogniser'),
                                        ('clip_visual.pth', 'CLIP')])
def test_other_files_are_refused_by_kind(stage2, file, kind):
    "The reference's `b16_25m.pth` was a question-answering model for a time"
    with pytest.raises(WeightsError, match=f'{file}: expected a Stage-2 or retrieval model, but it looks like a .*{kind}'):
        load_multimodal(stage2.with_name(file), **TINY)


def test_training_files(stage2, multimodal, tmp_path, monkeypatch):
    "As the reference's Stage-2 trainer writes them: optimiser beside the model, config of a class of its own. Any other class is refused by name"
    module = ModuleType('utils.easydict')
    module.EasyDict = type('EasyDict', (dict,), dict(__module__='utils.easydict', __qualname__='EasyDict'))
    module.Other = type('Other', (dict,), dict(__module__='utils.easydict', __qualname__='Other'))
    config = module.EasyDict(lr=1e-4, optimizer=module.EasyDict(opt='adamW', betas=[.9, .999]))
    config.__dict__.update(config)  # its fields are attributes, too
    state = read_state_dict(stage2)
    with monkeypatch.context() as patch:
        for name in ('utils', 'utils.easydict'): patch.setitem(sys.modules, name, module)
        checkpoint = dict(model=state, optimizer=dict(state={0: dict(step=3, exp_avg=torch.ones(9))}), config=config, epoch=9, global_step=3)
        torch.save(checkpoint, tmp_path/'ckpt_09.pth')
        torch.save(checkpoint | dict(config=module.Other()), tmp_path/'other.pth')
    loaded = load_multimodal(tmp_path/'ckpt_09.pth', **TINY).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in multimodal.state_dict().items())
    assert load_teacher(tmp_path/'ckpt_09.pth', num_heads=CLIP_HEADS).target_dim == 32
    with pytest.raises(WeightsError, match=r'would run code \(utils.easydict.Other\)'): load_multimodal(tmp_path/'other.pth', **TINY)


# Golden numbers of B/16: weights from a recipe, so that no file is needed

def fill(tensors):
    "0.02 times normal numbers, seeded by the place of a name among the sorted names; the weights of norms around 1"
    for n, name in enumerate(sorted(tensors)):
        value = .02 * np.random.RandomState(1000 + n).standard_normal(tensors[name].numel())
        tensors[name].copy_(torch.from_numpy(value + (tensors[name].ndim == 1 and name.endswith('.weight'))).view_as(tensors[name]))


def golden(model):
    tensors = model.state_dict()
    fill({published: tensors[name] for published, name in published_names(model).items()})
    return model.eval()


@pytest.fixture(scope='module')
def clip(): return torch.from_numpy(np.random.RandomState(7).standard_normal((1, 3, 8, 224, 224))).float()


@pytest.fixture(scope='module')
def mask():
    rng = np.random.RandomState(11)
    mask = torch.ones(8, 196, dtype=torch.bool)
    for frame in mask: frame[rng.permutation(196)[:40]] = False
    assert (~mask[0]).nonzero()[:6, 0].tolist() == [0, 2, 3, 14, 16, 22]
    return mask.view(1, -1)


@torch.no_grad()
def test_golden_stage1(clip, mask):
    "Student, teacher and loss of B/16 at full size"
    student = golden(Student(**SIZES['base']))(clip, visible_from_mask(mask))
    assert_close(student[0, 0, 0, :4], torch.tensor([-.014734, .083953, .023323, .052353]), rtol=0, atol=1e-5)
    assert_close(student.abs().mean().item(), .03529195, rtol=0, atol=1e-6)
    visual = open_clip_visual('ViT-B-16-quickgelu', 'random')
    fill(dict(visual.named_parameters()))
    teacher = Teacher(visual, aligned_layers=6)(clip, shown(mask))
    assert_close(uta_loss(student, teacher.tokens).item(), 2.0025079, rtol=0, atol=1e-5)
    per_layer = torch.stack([uta_loss(s[None], t[None]) for s, t in zip(student, teacher.tokens)])
    assert_close(per_layer, torch.tensor([2.000072, 2.014096, 1.997691, 1.991774, 1.989117, 2.022295]), rtol=0, atol=1e-5)
    assert_close(uta_loss(student, teacher.tokens, 'mse').item(), .003911148, rtol=0, atol=1e-7)


@torch.no_grad()
def test_golden_recognition(clip):
    logits = golden(Recognizer(400, **SIZES['base']))(clip)[0]
    assert_close(logits[:4], torch.tensor([.242813, -.044103, -.395453, .231979]), rtol=0, atol=1e-5)
    assert_close(logits.abs().mean().item(), .41995019, rtol=0, atol=1e-5)
    assert logits.argmax() == 35


@pytest.mark.parametrize('grid, second, last, total', [
    ((8, 14, 14), [.841471, .540302, .828431, .560091], [.608948, -.793210, .093232, -.995644], 245744.9896),
    ((16, 14, 14), None, [.608948, -.793210, .093232, -.995644], 491489.9791),
    ((8, 24, 24), [.236956, 1.002239, .228754, .976923], [.533990, -1.008805, -.074023, -1.103680], 722143.8422),
])
def test_position_tables(grid, second, last, total):
    table = position_table(grid, 768, PUBLISHED_GRID)
    if second: assert_close(table[1, :4], torch.tensor(second), rtol=0, atol=1e-5)
    assert_close(table[-1, :4], torch.tensor(last), rtol=0, atol=1e-5)
    assert_close(table.double().sum().item(), total, rtol=1e-7, atol=0)
