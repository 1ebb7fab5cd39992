"Weights that are not what they should be, grouped by the kind of mistake"
import json
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from umt.models.fitting import encoder_of, fit_to
from umt.models.heads import Recognizer, recognizer_from
from umt.models.multimodal import Multimodal, multimodal_from
from umt.models.published import (
    load_model, load_multimodal, load_published, load_recognizer, load_student, save_model, save_published,
    to_published)
from umt.models.student import Student
from umt.models.teachers import load_teacher
from umt.models.text import TextModel, bert_config, load_text
from umt.models.weights import WeightsError, read_state_dict

SIZES = dict(image_size=32, num_frames=4, embed_dim=32, depth=2, num_heads=2)
BERT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
CLIP = dict(num_heads=3, activation='quick_gelu', aligned_layers=2)


def make(kind):
    torch.manual_seed(0)
    if kind == 'student': return Student(1, 8, **SIZES)
    if kind == 'recognizer': return Recognizer(5, init_scale=1., **SIZES)
    return Multimodal(dict(aligned_layers=1, target_dim=8, **SIZES), dict(vision_dim=32, fusion_layer=1, **BERT), 16)


LOADERS = dict(
    student=load_student, recognizer=load_recognizer, multimodal=load_multimodal, any=load_published,
    teacher=lambda path: load_teacher(path, **CLIP))
KINDS = 'student', 'recognizer', 'multimodal'


def equal(one, other):
    one, other = one.state_dict(), other.state_dict() # a table from a file may be beside them
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


# Names: prefixes of training code

@pytest.mark.parametrize('prefix', ['module.', 'model.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.model.'])
@pytest.mark.parametrize('kind', KINDS)
def test_prefixes(kind, prefix, tmp_path):
    "Taken off, and said in the report"
    model = make(kind)
    save_published(model, tmp_path/'plain.pth')
    content = torch.load(tmp_path/'plain.pth', weights_only=True)
    content['model'] = {prefix + name: tensor for name, tensor in content['model'].items()}
    torch.save(content, tmp_path/'wrapped.pth')
    loaded = LOADERS[kind](tmp_path/'wrapped.pth')
    assert equal(loaded, model) and loaded.load_report.wrappers == prefix
    assert f'taken off the names: {prefix}' in str(loaded.load_report)


def test_compiled_blocks(tmp_path):
    "`torch.compile` of each block leaves its word in the middle of the names"
    model = make('student')
    save_published(model, tmp_path/'plain.pth')
    content = torch.load(tmp_path/'plain.pth', weights_only=True)
    compiled = lambda name: name.replace('blocks.1.', 'blocks.1._orig_mod.')
    content['model'] = {compiled(name): tensor for name, tensor in content['model'].items()}
    torch.save(content, tmp_path/'compiled.pth')
    assert equal(load_student(tmp_path/'compiled.pth'), model)


def test_prefix_of_a_teacher(tmp_path):
    state = {f'module.visual.{k}': v.clone() for k, v in load_teacher('nano').visual.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path/'clip.pth')
    teacher = load_teacher(tmp_path/'clip.pth', **CLIP)
    assert len(teacher.visual.load_report.loaded) == len(state)


# Files that hold no weights

def truncated(path):
    torch.save(to_published(make('student')), path)
    path.write_bytes(path.read_bytes()[:-2000])


def archive(path):
    with zipfile.ZipFile(path, 'w') as zipped: zipped.writestr('readme.txt', 'no weights')


POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 345\n'
NO_WEIGHTS = {
    'lfs': (lambda p: p.write_text(POINTER), 'Git LFS pointer.*git lfs pull'),
    'page': (lambda p: p.write_text('\n<!DOCTYPE html>\n<html></html>'), 'a web page .*download the file itself'),
    'truncated': (truncated, 'truncated.*fetch it again'),
    'empty': (lambda p: p.touch(), 'empty .*fetch it again'),
    'json': (lambda p: p.write_text(json.dumps(dict(model='b16'))), 'a text file .JSON'),
    'text': (lambda p: p.write_text('Entry not found'), 'a text file'),
    'zip': (archive, 'a zip archive that PyTorch did not write .readme.txt'),
    'noise': (lambda p: p.write_bytes(bytes(range(1, 256))), 'neither a safetensors file nor one that PyTorch wrote'),
    'gzip': (lambda p: p.write_bytes(b'\x1f\x8b\x08\x00' + bytes(50)), 'compressed archive; unpack'),
    'number': (lambda p: torch.save(3., p), 'no state dict'),
    'optimizer': (lambda p: torch.save(dict(optimizer=dict(lr=1.), epoch=3), p), 'no state dict'),
}


@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.parametrize('fault', NO_WEIGHTS)
def test_files_without_weights(fault, loader, tmp_path):
    "One line that names the file, what it is, and what to do"
    write, message = NO_WEIGHTS[fault]
    path = tmp_path/f'{fault}.pth'
    write(path)
    with pytest.raises(WeightsError, match=f'{fault}.pth: .*{message}') as caught: LOADERS[loader](path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('loader', ['student', 'recognizer', 'multimodal', 'any'])
def test_folder_and_nothing(loader, tmp_path):
    with pytest.raises(WeightsError, match='a folder.*load_model reads our own'): LOADERS[loader](tmp_path)
    with pytest.raises(FileNotFoundError, match='none.pth: no such file'): LOADERS[loader](tmp_path/'none.pth')


@pytest.mark.parametrize('share', [.01, .3, .9, .999])
@pytest.mark.parametrize('form', ['zip', 'old', 'safetensors'])
def test_cut_off_anywhere(form, share, tmp_path):
    state, path = {f'layer.{i}': torch.randn(40, 40) for i in range(5)}, tmp_path/'whole'
    if form == 'safetensors': save_file(state, path)
    else: torch.save(state, path, _use_new_zipfile_serialization=form == 'zip')
    assert len(read_state_dict(path)) == 5
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(WeightsError, match='whole: .*fetch it again') as caught: read_state_dict(path)
    assert '\n' not in str(caught.value)


def test_damaged_run_folder(tmp_path):
    save_model(make('recognizer'), tmp_path)
    weights = (tmp_path/'model.safetensors').read_bytes()
    (tmp_path/'model.safetensors').write_bytes(weights[:-100])
    with pytest.raises(WeightsError, match='model.safetensors: damaged or truncated'): load_model(tmp_path)
    (tmp_path/'model.safetensors').write_bytes(weights)
    config = json.loads((tmp_path/'model.json').read_text())
    (tmp_path/'model.json').write_text(json.dumps(config | dict(num_hats=2)))
    with pytest.raises(WeightsError, match='model.json: .*num_hats'): load_model(tmp_path)


# Files that are fine, though not as we write them

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', KINDS)
def test_half_precision(kind, dtype, tmp_path):
    model = make(kind)
    save_published(model, tmp_path/'file.pth')
    content = torch.load(tmp_path/'file.pth', weights_only=True)
    content['model'] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in content['model'].items()}
    torch.save(content, tmp_path/'half.pth')
    loaded = LOADERS[kind](tmp_path/'half.pth')
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.to(dtype).float())


@pytest.mark.parametrize('container', ['model', 'module', 'state_dict'])
def test_entries_beside_the_weights(container, tmp_path):
    model = make('student')
    optimizer = dict(state={0: dict(exp_avg=torch.ones(3))}, param_groups=[dict(lr=1e-4)])
    beside = dict(optimizer=optimizer, epoch=3, args=Namespace(lr=1e-4), scaler=OrderedDict(scale=2.))
    torch.save({container: to_published(model)} | beside, tmp_path/'file.pth')
    assert equal(load_student(tmp_path/'file.pth', 32, 4, 2), model)


def test_nothing_is_executed(tmp_path):
    torch.save(dict(model=to_published(make('student')), hook=print), tmp_path/'code.pth')
    for loader in LOADERS.values():
        with pytest.raises(WeightsError, match=r'would run code \(builtins.print\)'): loader(tmp_path/'code.pth')


def test_what_was_read_can_be_saved(tmp_path):
    torch.save(to_published(make('student')), tmp_path/'file.pth')
    torch.save(read_state_dict(tmp_path/'file.pth'), tmp_path/'again.pth')
    assert list(torch.load(tmp_path/'again.pth', weights_only=True)) == list(read_state_dict(tmp_path/'file.pth'))


def test_name_does_not_matter(tmp_path):
    save_file({'a': torch.ones(2)}, tmp_path/'weights.pth')
    assert torch.equal(read_state_dict(tmp_path/'weights.pth')['a'], torch.ones(2))


# Positions: a file is a folder, at any size

def sources(model, folder):
    "The same weights from a published file and from a run folder."
    save_published(model, folder/'file.pth')
    save_model(model, folder/'run')
    return load_published(folder/'file.pth'), load_model(folder/'run')


def check_equal_networks(one, other, video):
    read = lambda model: encoder_of(model).eval()(video)
    with torch.no_grad(): assert torch.equal(read(one), read(other))


@pytest.mark.parametrize('frames, size', [(4, 32), (4, 48), (8, 32), (2, 64), (6, 16)])
@pytest.mark.parametrize('kind', KINDS)
def test_file_and_folder_at_other_sizes(kind, frames, size, tmp_path):
    models = [fit_to(model, frames, size) for model in sources(make(kind), tmp_path)]
    assert encoder_of(models[0]).grid == encoder_of(models[1]).grid
    check_equal_networks(*models, torch.randn(1, 3, frames, size, size))


@pytest.mark.parametrize('kind', KINDS)
def test_file_and_folder_after_two_trainings(kind, tmp_path):
    "Trained at 32 and at 64 pixels: what is resized is the table of the second training"
    second = fit_to(make(kind), 4, 64)
    models = [fit_to(model, 4, 48) for model in sources(second, tmp_path)]
    check_equal_networks(*models, torch.randn(1, 3, 4, 48, 48))
    back = [fit_to(model, 4, 32) for model in sources(second, tmp_path)]
    check_equal_networks(make(kind), back[0], torch.randn(1, 3, 4, 32, 32))
    check_equal_networks(*back, torch.randn(1, 3, 4, 32, 32))


@pytest.mark.parametrize('frames, size', [(4, 48), (8, 32), (8, 64)])
@pytest.mark.parametrize('start', ['student', 'multimodal'])
def test_recognition_from_file_and_folder(start, frames, size, tmp_path):
    "Fine-tuning stretches a clip to more frames and pixels"
    students = [m.student if start == 'multimodal' else m for m in sources(make(start), tmp_path)]
    models = [recognizer_from(student, 3, num_frames=frames, image_size=size) for student in students]
    check_equal_networks(*models, torch.randn(1, 3, frames, size, size))
    assert encoder_of(models[0]).config['base_grid'] == (4, 2, 2)


def test_stage2_from_file_and_folder(tmp_path):
    "Other pixels: space is resized; other frames: time goes on, and an image has the first frame's positions"
    text = TextModel(32, 1, **BERT)
    models = [multimodal_from(m, text, num_frames=2, image_size=64) for m in sources(make('student'), tmp_path)]
    check_equal_networks(*models, torch.randn(1, 3, 2, 64, 64))
    check_equal_networks(*models, torch.randn(1, 3, 1, 64, 64))
    grids = encoder_of(models[0]).grid, encoder_of(models[0]).config['base_grid']
    assert grids == ((2, 4, 4), (2, 2, 2))


def test_what_a_file_does_not_say(tmp_path):
    "A file of the reference: the trained size is asked for, or as published; heads are never guessed"
    torch.save(dict(model=to_published(make('student'))), tmp_path/'file.pth')
    assert load_student(tmp_path/'file.pth', num_heads=2).encoder.grid == (8, 14, 14)
    assert load_student(tmp_path/'file.pth', 32, 4, num_heads=2).encoder.grid == (4, 2, 2)
    with pytest.raises(WeightsError, match='pass num_heads'): load_student(tmp_path/'file.pth')
    with pytest.raises(WeightsError, match='3 heads do not divide'): load_student(tmp_path/'file.pth', num_heads=3)


def test_attention_that_a_file_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match='for joint attention only'):
        save_published(Student(1, 8, attention='spatial', **SIZES), tmp_path/'file.pth')


# Messages

def test_unknown_fields_are_corrected():
    with pytest.raises(ValueError, match="unknown field 'hidden_sise'; did you mean 'hidden_size'?"):
        bert_config(hidden_sise=3)
    with pytest.raises(ValueError, match="did you mean 'drop_path'?"): fit_to(make('student'), drop_pth=.1)


def test_reports_are_logged_not_printed(tmp_path, capsys, caplog):
    save_published(make('recognizer'), tmp_path/'file.pth')
    with caplog.at_level('INFO', logger='umt'):
        load_recognizer(tmp_path/'file.pth')
        load_text(vision_dim=8)
    assert capsys.readouterr().out == ''
    assert 'Recognizer' in caplog.text and 'tensors loaded' in caplog.text
