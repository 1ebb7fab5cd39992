"""The teacher against the reference's vectors and the golden numbers of the full-size models."""
import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import open_clip
import papermill
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file
from torch.testing import assert_close

from umt.models.backbone import compile_blocks
from umt.models.masking import MASKS, EvenVisible, HostReads, make_mask, visible_from_mask
from umt.models.student import SIZES, Student
from umt.models.targets import uta_loss
from umt.models.teachers import Teacher, build_visual, load_teacher

REF = Path(os.environ.get('UMT_REFERENCE_DIR', Path(__file__).parents[1]/'../shared/reference'))
reference = pytest.mark.skipif(not REF.exists(), reason=f'no reference vectors at {REF}')


def tiny(name):
    config = json.loads((REF/name/'config.json').read_text())
    options = dict(num_heads=config['teacher']['heads'], activation=config['teacher']['activation'])
    teacher = load_teacher(REF/name/'clip_visual.pth', aligned_layers=config['student']['aligned_layers'], **options)
    return teacher, load_file(REF/name/'stage1_io.safetensors')


@reference
@pytest.mark.parametrize('name', ['tiny_a', 'tiny_b'])
def test_reference(name):
    teacher, io = tiny(name)
    out = teacher(io['video'])
    assert_close(out.tokens, io['teacher_tokens'], rtol=1e-4, atol=1e-5)
    assert_close(out.attention, io['teacher_attention'], rtol=1e-4, atol=1e-5)
    assert not out.visible.mask.any()


@reference
@pytest.mark.parametrize('name', ['tiny_a', 'tiny_b'])
def test_reference_at_the_visible_tokens(name):
    teacher, io = tiny(name)
    expected = io['teacher_tokens'][:, ~io['mask']].view(*io['student_tokens'].shape)
    visible = visible_from_mask(io['mask'])
    for given in (visible, EvenVisible(*visible)):
        assert_close(teacher(io['video'], lambda attention: given).tokens, expected, rtol=1e-4, atol=1e-5)


@reference
def test_frozen_and_autocast():
    teacher, io = tiny('tiny_a')
    half = Teacher(teacher.visual, 3, dtype=torch.bfloat16).train()
    tokens = half(io['video']).tokens
    assert not half.visual.training and not tokens.requires_grad
    assert not any(p.requires_grad for p in half.parameters())
    assert tokens.dtype == torch.float32
    assert 0 < (tokens - io['teacher_tokens']).abs().max() < .03
    with torch.autocast('cpu', torch.bfloat16): # a float32 teacher is one, whatever surrounds it
        assert_close(teacher(io['video']).tokens, io['teacher_tokens'], rtol=1e-4, atol=1e-5)


def test_open_clip_by_name():
    teacher = load_teacher('ViT-S-32-alt', image_size=64, input_statistics='clip', pretrained='random')
    assert (teacher.grid, teacher.aligned_layers) == (2, 6)
    out = teacher(torch.randn(1, 3, 2, 64, 64))
    assert out.tokens.shape == (6, 1, 8, teacher.target_dim) and out.attention.shape == (2, 4)
    with pytest.raises(ValueError, match='RN50'): load_teacher('RN50', pretrained='random')


def test_random_weights_are_not_warned_about(caplog):
    load_teacher('ViT-S-32-alt', pretrained='random')
    open_clip.create_model('ViT-S-32-alt')
    assert sum('No pretrained weights' in record.message for record in caplog.records) == 1 # that of the second line


@pytest.mark.filterwarnings('ignore')
def test_torchscript_is_refused_with_the_remedy(tmp_path):
    "OpenAI's own files: the error's two remedies, and torch's advice to switch its check off in neither case."
    file = tmp_path/'ViT-B-16.pt'
    visual = VisionTransformer(32, 16, 64, 2, 1, 4., output_dim=32).eval()
    torch.jit.save(torch.jit.trace(visual, torch.randn(1, 3, 32, 32)), file)
    for call in (lambda: load_teacher(file), lambda: load_teacher('ViT-B-16-quickgelu', pretrained=str(file))):
        with pytest.raises(ValueError, match='TorchScript') as error: call()
        assert "pretrained='openai'" in str(error.value) and 'weights_only' not in str(error.value)
    torch.save(torch.jit.load(file, map_location='cpu').state_dict(), tmp_path/'clip.pth')
    options = dict(num_heads=1, activation='gelu')
    assert load_teacher(tmp_path/'clip.pth', **options).target_dim == 32
    torch.save({'conv1.weight': Path()}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match='not a file of plain tensors, refused$'):
        load_teacher(tmp_path/'other.pth', **options)


GOLDEN = {
    'b16': dict(
        sizes=(224, 16, 768, 12, 12), target_dim=512, first=[-.050187, .017280, .064984, -.012688],
        mean=.00060986, mean_abs=.03526984,
        attention=[.004269, .004918, .005003, .005512], rows=[.995306, .995367, .995302]),
    'l14': dict(
        sizes=(196, 14, 1024, 24, 16), target_dim=768, first=[-.019808, .052904, -.012824, -.023344],
        mean=.00034631, mean_abs=.02882985,
        attention=[.004627, .004992, .005120, .005189], rows=[.995099, .995187, .995043]),
}


@pytest.mark.parametrize('name', ['b16', pytest.param(
    'l14', marks=pytest.mark.skipif('UMT_SLOW' not in os.environ, reason='half a minute and 3 GB; set UMT_SLOW=1'))])
def test_golden(name):
    "Full-size models filled with a recipe's numbers: the reference's outputs to every printed digit."
    golden = GOLDEN[name]
    with torch.device('meta'):
        shapes = VisionTransformer(*golden['sizes'], mlp_ratio=4, output_dim=golden['target_dim']).state_dict()
    state = {}
    for n, key in enumerate(sorted(shapes)):
        value = .02 * np.random.RandomState(1000 + n).standard_normal(shapes[key].numel()).reshape(shapes[key].shape)
        state[key] = torch.tensor(value + (value.ndim == 1 and key.endswith('.weight')), dtype=torch.float32)
    video = torch.tensor(np.random.RandomState(7).standard_normal((1, 3, 8, 224, 224)), dtype=torch.float32)
    tokens, _, attention = Teacher(build_visual(state), aligned_layers=6)(video)
    close = lambda a, b: assert_close(a, torch.tensor(b), rtol=0, atol=1e-6)
    assert tokens.shape[:3] == (6, 1, 1568) and attention.shape == (8, 196)
    close(tokens.flatten()[:4], golden['first'])
    close(torch.stack([tokens.mean(), tokens.abs().mean()]), [golden['mean'], golden['mean_abs']])
    close(attention.flatten()[:4], golden['attention'])
    close(attention.sum(1)[:3], golden['rows'])


def test_nano_teacher_notebook_retrains(tmp_path):
    "Three steps of the notebook that makes the nano teacher; the shipped one stays as it is"
    notebook = Path(__file__).parents[1]/'nbs/nano_teacher.ipynb'
    quick = dict(retrain=True, out=str(tmp_path/'nano.safetensors'), steps=3, batch_size=16, num_images=64, num_val=64)
    papermill.execute_notebook(notebook, tmp_path/'out.ipynb', quick, progress_bar=False, cwd=str(tmp_path))
    again = load_teacher(tmp_path/'nano.safetensors', num_heads=3, activation='quick_gelu')
    assert again.target_dim == load_teacher('nano').target_dim


# Weights that do not say what they are

def quick_gelu_clip(width=320, heads=4):
    "A CLIP of OpenAI's kind with 80 channels per head."
    torch.manual_seed(0)
    visual = VisionTransformer(32, 16, width, 2, heads, 4., output_dim=32, act_layer=QuickGELU).eval()
    torch.nn.init.normal_(visual.class_embedding)
    torch.nn.init.normal_(visual.positional_embedding)
    return visual


def test_heads_and_activation_of_a_file_are_asked_for(tmp_path):
    "80 channels per head, and QuickGELU or not: nothing in the file says so, and a guess gives another network."
    visual, video = quick_gelu_clip(), torch.randn(1, 3, 2, 32, 32)
    torch.save(visual.state_dict(), tmp_path/'clip.pth')
    with pytest.raises(ValueError, match="clip.pth.*activation='quick_gelu'"): load_teacher(tmp_path/'clip.pth')
    with pytest.raises(ValueError, match='clip.pth.*width 320: pass num_heads'):
        load_teacher(tmp_path/'clip.pth', activation='quick_gelu')
    with torch.no_grad(): expected = visual(video[0].transpose(0, 1))
    expected = torch.nn.functional.normalize(expected, dim=-1)[None]
    right = load_teacher(tmp_path/'clip.pth', num_heads=4, activation='quick_gelu')
    assert_close(right.embed(video), expected, rtol=0, atol=1e-6)
    for wrong in (dict(num_heads=5, activation='quick_gelu'), dict(num_heads=4, activation='gelu')):
        assert (load_teacher(tmp_path/'clip.pth', **wrong).embed(video) - expected).abs().max() > 1e-4


def test_quick_gelu_weights_under_a_gelu_name(tmp_path):
    "OpenAI's weights under 'ViT-B-32', whose name means GELU."
    file = tmp_path/'openai.pth'
    model = open_clip.create_model('ViT-S-32-alt')
    torch.save(model.state_dict(), file)
    with pytest.raises(ValueError, match="ViT-S-32-alt means GELU.*activation='quick_gelu'"):
        load_teacher('ViT-S-32-alt', pretrained=str(file))
    quick, plain = (load_teacher('ViT-S-32-alt', pretrained=str(file), activation=a) for a in ('quick_gelu', 'gelu'))
    kinds = [type(t.visual.transformer.resblocks[0].mlp.gelu) for t in (quick, plain)]
    assert kinds == [QuickGELU, torch.nn.GELU]


# Ready for a GPU, as far as a CPU can tell

def models(**options):
    torch.manual_seed(0)
    teacher = load_teacher('nano', aligned_layers=3, **options)
    return teacher, Student(3, teacher.target_dim, image_size=112, num_frames=2, **SIZES['nano'])


@pytest.mark.parametrize('statistics', ['imagenet', 'clip'])
@pytest.mark.parametrize('kind', MASKS)
def test_a_step_reads_nothing(kind, statistics):
    "Teacher, mask, student, loss and backward: no value goes to the host, and none comes from it."
    teacher, student = models(input_statistics=statistics)
    video, keys = torch.randn(2, 3, 2, 112, 112), torch.arange(2)
    with HostReads() as reads:
        target = teacher(video, lambda attention: make_mask(kind, attention, .8, keys))
        uta_loss(student(video, target.visible), target.tokens).backward()
    assert reads.names == []


def test_buffers_are_constants():
    "DDP need not broadcast them: a step changes none, and two models of the same config have the same."
    teacher, student = models()
    before = copy.deepcopy(dict(student.named_buffers()) | dict(teacher.named_buffers()))
    video = torch.randn(2, 3, 2, 112, 112)
    target = teacher(video, lambda attention: make_mask('semantic', attention, .8, torch.arange(2)))
    uta_loss(student.train()(video, target.visible), target.tokens).backward()
    after = dict(student.named_buffers()) | dict(teacher.named_buffers())
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert not set(student.state_dict()) & set(before)


@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler (g++), which inductor needs on the CPU')
def test_compiled_blocks_give_the_same_loss():
    "inductor, no graph break in a block: loss and gradients of teacher and student, compiled and not."
    video, keys = torch.randn(2, 3, 2, 112, 112), torch.arange(2)
    results = []
    for how in ('none', 'blocks'):
        teacher, student = models()
        options = {} if how == 'none' else dict(fullgraph=True)
        for network in (teacher, student): compile_blocks(network, how, **options)
        target = teacher(video, lambda attention: make_mask('semantic', attention, .8, keys))
        loss = uta_loss(student(video, target.visible), target.tokens)
        loss.backward()
        results.append((loss.detach(), student.encoder.patch_embed.proj.weight.grad, target.tokens))
    for compiled, eager in zip(*reversed(results)): assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
