"Numerical parity with the paper's reference implementation: its files, and golden numbers (B/16)"
import numpy as np
import pytest
import torch
from reference import CLOSE, gradients, read_config, read_io, stage1_sizes, teacher_options, vectors
from torch.testing import assert_close

from umt.models.backbone import position_table
from umt.models.heads import Recognizer
from umt.models.masking import visible_from_mask
from umt.models.published import (
    PUBLISHED_GRID, load_model, load_published, load_recognizer, load_student, published_names, save_model,
    save_published, to_published)
from umt.models.student import SIZES, Student
from umt.models.targets import uta_loss
from umt.models.teachers import Teacher, load_teacher, open_clip_visual
from umt.models.weights import WeightsError, read_state_dict

STAGE1 = 'config.json', 'stage1_io.safetensors', 'stage1_student.pth', 'clip_visual.pth'
FINETUNED = 'config.json', 'finetuned_io.safetensors', 'finetuned.pth'


def clip_options(folder): return teacher_options(read_config(folder))


def shown(mask):
    "A recorded mask, as the teacher asks for it."
    return lambda attention: visible_from_mask(mask)


@vectors(*STAGE1)
def test_stage1(folder):
    "Student tokens, loss and every recorded gradient"
    io = read_io(folder, 'stage1')
    student = load_student(folder/'stage1_student.pth', **stage1_sizes(folder)).eval()
    tokens = student(io['video'], visible_from_mask(io['mask']))
    assert_close(tokens, io['student_tokens'], **CLOSE)
    visible = (~io['mask']).nonzero()[:, 1].view(1, len(io['mask']), -1, 1)
    loss = uta_loss(tokens, io['teacher_tokens'].take_along_dim(visible, 2))
    assert_close(loss[None], io['loss'], **CLOSE)
    loss.backward()
    names, parameters = published_names(student), dict(student.named_parameters())
    for name, grad in gradients(io).items():
        assert_close(parameters[names[name]].grad, grad, **CLOSE, msg=lambda m: f'{name}: {m}')


@vectors(*STAGE1)
def test_end_to_end(folder):
    "The same loss with our teacher in place of the recorded one"
    io = read_io(folder, 'stage1')
    student = load_student(folder/'stage1_student.pth', **stage1_sizes(folder)).eval()
    layers = student.config['aligned_layers']
    teacher = load_teacher(folder/'clip_visual.pth', aligned_layers=layers, **clip_options(folder))
    target = teacher(io['video'], shown(io['mask']))
    assert_close(uta_loss(student(io['video'], target.visible), target.tokens)[None], io['loss'], **CLOSE)


@vectors(*FINETUNED)
def test_recognition(folder):
    "Logits of the fine-tuned model, whose positions are in the file; frames and pixels are found from it"
    io = read_io(folder, 'finetuned')
    recognizer = load_recognizer(folder/'finetuned.pth', num_heads=stage1_sizes(folder)['num_heads']).eval()
    assert_close(recognizer(io['video']), io['logits'], **CLOSE)


@vectors(*STAGE1, *FINETUNED)
def test_round_trip(folder, tmp_path):
    "Published -> ours -> our format -> published: every tensor, name, shape and their order, to the bit"
    student = load_student(folder/'stage1_student.pth', **stage1_sizes(folder))
    recognizer = load_recognizer(folder/'finetuned.pth', num_heads=stage1_sizes(folder)['num_heads'])
    for model, file in ((student, 'stage1_student.pth'), (recognizer, 'finetuned.pth')):
        save_model(model, tmp_path/'ours')
        save_published(load_model(tmp_path/'ours'), tmp_path/'published.pth')
        expected, got = read_state_dict(folder/file), read_state_dict(tmp_path/'published.pth')
        assert set(got) == set(expected)
        assert all(torch.equal(got[k], expected[k]) and got[k].dtype == expected[k].dtype for k in expected)
        assert {k.split('.')[0]: None for k in got} == {k.split('.')[0]: None for k in expected}


@vectors(*STAGE1)
@pytest.mark.parametrize('wrapper', ['model', 'module', None])
def test_wrappers(folder, tmp_path, wrapper):
    state = read_state_dict(folder/'stage1_student.pth')
    torch.save({wrapper: state} if wrapper else state, tmp_path/'file.pth')
    loaded = to_published(load_student(tmp_path/'file.pth', **stage1_sizes(folder)))
    assert list(loaded) == list(state) and all(torch.equal(loaded[k], state[k]) for k in state)


@vectors(*FINETUNED)
@pytest.mark.parametrize('change, expected', [
    (lambda s: s.pop('blocks.0.attn.q_bias'), 'missing         1  blocks.0.attn.q_bias'),
    (lambda s: s.update({'norm.weight': torch.ones(3)}), 'unexpected      1  norm.weight'),
    (lambda s: s.update({'head.bias': torch.ones(3)}), 'mismatched      1  head.bias'),
    (lambda s: s.update({'blocks.0.attn.qkv.bias': torch.ones(3)}), 'unexpected      1  blocks.0.attn.qkv.bias'),
])
def test_strict(folder, tmp_path, change, expected):
    "No tensor is ignored"
    state = read_state_dict(folder/'finetuned.pth')
    change(state)
    torch.save(state, tmp_path/'file.pth')
    heads = stage1_sizes(folder)['num_heads']
    with pytest.raises(WeightsError, match=expected): load_recognizer(tmp_path/'file.pth', num_heads=heads)


def test_sixteen_frames(tmp_path):
    "A 16-frame file (half precision, under `module`, from DeepSpeed); the reference's loader takes it for 8 frames"
    original = Recognizer(5, num_frames=16, base_grid=PUBLISHED_GRID, embed_dim=128, depth=1, num_heads=4)
    state = {k: v.half() for k, v in to_published(original).items()}
    assert state['pos_embed'].shape == (1, 3136, 128)
    torch.save(dict(module=state), tmp_path/'f16.pth')
    assert load_recognizer(tmp_path/'f16.pth').encoder.grid == (16, 14, 14)
    assert_close(load_recognizer(tmp_path/'f16.pth').encoder.positions, original.encoder.positions, rtol=0, atol=1e-3)
    eight = load_recognizer(tmp_path/'f16.pth', num_frames=8)
    assert eight.encoder.grid == PUBLISHED_GRID


@vectors(*FINETUNED)
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'encoder.'])
def test_fine_tuned_files_under_a_prefix(folder, tmp_path, prefix):
    "As training code wraps them; the report says where each tensor came from"
    io, state = read_io(folder, 'finetuned'), read_state_dict(folder/'finetuned.pth')
    torch.save(dict(model={prefix + name: tensor for name, tensor in state.items()}), tmp_path/'file.pth')
    model = load_published(tmp_path/'file.pth', num_heads=stage1_sizes(folder)['num_heads']).eval()
    assert_close(model(io['video']), io['logits'], **CLOSE)
    assert len(model.load_report.loaded) == len(state) and model.load_report.complete
    assert not prefix or any(name.startswith(prefix) for name in model.load_report.renamed)
    state.pop('fc_norm.bias')
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path/'file.pth')
    with pytest.raises(WeightsError, match=f'missing         1  {prefix}fc_norm.bias'):
        load_published(tmp_path/'file.pth', num_heads=stage1_sizes(folder)['num_heads'])


@vectors(*STAGE1)
def test_stage1_files_are_known_by_their_keys(folder):
    student = load_published(folder/'stage1_student.pth', **stage1_sizes(folder))
    assert type(student) is Student and student.load_report.complete


@vectors(*STAGE1)
def test_teacher_report(folder, tmp_path):
    "Strict, like the others"
    state, options = read_state_dict(folder/'clip_visual.pth'), clip_options(folder)
    teacher = load_teacher(folder/'clip_visual.pth', aligned_layers=2, **options)
    assert len(teacher.visual.load_report.loaded) == len(state)
    patch = teacher.visual.patch_size[0]
    smaller = load_teacher(folder/'clip_visual.pth', image_size=3 * patch, aligned_layers=2, **options)
    assert smaller.grid == 3
    assert smaller.visual.load_report.interpolated == (f'positional_embedding {teacher.grid**2} -> 9 patches',)
    name = next(k for k in state if k.endswith('ln_post.bias'))
    torch.save({k: v for k, v in state.items() if k != name}, tmp_path/'clip.pth')
    with pytest.raises(WeightsError, match='ln_post.bias'): load_teacher(tmp_path/'clip.pth', **options)
    torch.save(state | {name.replace('ln_post', 'ln_extra'): state[name]}, tmp_path/'clip.pth')
    with pytest.raises(WeightsError, match='ln_extra.bias'): load_teacher(tmp_path/'clip.pth', **options)


# Golden numbers of B/16: weights from a recipe, so that no file is needed

def fill(tensors):
    "0.02 times normal numbers, seeded by the place of a name among the sorted names; the weights of norms around 1"
    for n, name in enumerate(sorted(tensors)):
        tensor = tensors[name]
        value = .02 * np.random.RandomState(1000 + n).standard_normal(tensor.numel())
        around_one = tensor.ndim == 1 and name.endswith('.weight')
        tensor.copy_(torch.from_numpy(value + around_one).view_as(tensor))


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
    expected = torch.tensor([2.000072, 2.014096, 1.997691, 1.991774, 1.989117, 2.022295])
    assert_close(per_layer, expected, rtol=0, atol=1e-5)
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
