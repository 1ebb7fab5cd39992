"Stage 2 and retrieval: the reference's recorded model, its files, and the figures made of both"
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from reference import CLOSE, folders, multimodal_sizes, read_config, read_io
from torch.testing import assert_close
from torch.utils.data import Dataset

from umt.core.config import override
from umt.models.masking import visible_from_mask
from umt.models.multimodal import Multimodal
from umt.models.objectives import match_negatives, mlm_loss, similarity, vtc_loss
from umt.models.published import load_model, load_multimodal, load_published, save_model, save_published
from umt.models.targets import uta_loss
from umt.models.teachers import load_teacher
from umt.models.weights import WeightsError, read_state_dict
from umt.tasks.ranking import RankingConfig, gallery_metrics, index_videos, score_gallery
from umt.training.distributed import start_accelerator

STAGE2 = 'stage2_config.json', 'stage2.pth', 'stage2_io.safetensors'


def shown(mask):
    "A recorded mask, as the teacher asks for it."
    return lambda attention: visible_from_mask(mask)




@pytest.fixture(scope='module', params=folders(*STAGE2), ids=lambda folder: f'{folder.parent.name}-{folder.name}')
def stage2(request): return request.param/'stage2.pth'


def stage2_config(file): return read_config(file.parent, 'stage2_config.json')


def sizes(file): return multimodal_sizes(stage2_config(file))


def stage2_teacher(file, weights=None):
    "The teacher in a Stage-2 file."
    config = stage2_config(file)
    layers = config['vision']['aligned_layers']
    return load_teacher(weights or file, aligned_layers=layers, num_heads=config['teacher']['heads'])


@pytest.fixture(scope='module')
def multimodal(stage2): return load_multimodal(stage2, **sizes(stage2)).eval()


@pytest.fixture(scope='module')
def recorded(stage2):
    io = read_io(stage2.parent, 'stage2')
    return io | {medium: io[medium].transpose(1, 2) for medium in ('video', 'image')}


@torch.no_grad()
@pytest.mark.parametrize('medium', ['video', 'image'])
def test_stage2_video_side(stage2, multimodal, recorded, medium):
    "Tokens, poolings, aligned tokens, the targets of the teacher in the file, and the loss between them"
    io = {name.removeprefix(f'{medium}_'): tensor for name, tensor in recorded.items() if name.startswith(f'{medium}_')}
    whole = multimodal.encode_video(recorded[medium])
    seen = multimodal.encode_video(recorded[medium], visible_from_mask(io['mask']))
    target = stage2_teacher(stage2)(recorded[medium], shown(io['mask'])).tokens
    found = dict(tokens=whole.tokens, pooled=whole.pooled, visible_tokens=seen.tokens, visible_pooled=seen.pooled)
    found |= dict(aligned=seen.aligned, target=target, uta_loss=uta_loss(seen.aligned, target)[None])
    assert found.keys() | {'mask'} == io.keys() and whole.aligned is None
    for name, tensor in found.items():
        given_length = name in ('aligned', 'target')  # recorded before they were given unit length
        expected = F.normalize(io[name], dim=-1) if given_length else io[name]
        assert_close(tensor, expected, **CLOSE, msg=lambda m: f'{medium}_{name}: {m}')


@torch.no_grad()
def test_stage2_text_side(multimodal, recorded):
    "What the texts become; how they compare with, match, and are guessed from the visible tokens of the videos"
    io, attention_mask = recorded, recorded['attention_mask']
    hidden = multimodal.encode_text(io['input_ids'], attention_mask)
    seen = multimodal.encode_video(io['video'], visible_from_mask(io['video_mask']))
    video, text = multimodal.embed_video(seen.pooled), multimodal.embed_text(hidden)
    assert_close(hidden, io['text_tokens'], **CLOSE)
    assert_close(hidden[:, 0], io['text_pooled'], **CLOSE)
    assert_close(similarity(video, text) / multimodal.temperature, io['similarity_v2t'], **CLOSE)
    assert_close(vtc_loss(video, text, io['sample_id'], multimodal.temperature)[None], io['vtc_loss'], **CLOSE)
    beside = [tokens.expand(len(hidden), -1, -1) for tokens in seen.tokens]
    logits = torch.stack([multimodal.match(hidden, attention_mask, tokens) for tokens in beside])
    assert_close(logits, io['match_logits'], **CLOSE)
    masked = multimodal.encode_text(io['mlm_input_ids'], attention_mask)
    words = multimodal.text.predict_words(multimodal.text.fuse(masked, attention_mask, seen.tokens))
    assert_close(words, io['mlm_logits'], **CLOSE)
    assert_close(mlm_loss(words.flatten(0, 1), io['mlm_labels'].flatten())[None], io['mlm_loss'], **CLOSE)


@torch.no_grad()
def test_stage2_step(stage2, multimodal, recorded):
    "The losses that one training step computes in `forward`, where words are guessed at the chosen places only"
    io, labels, each = recorded, recorded['mlm_labels'].flatten(), torch.arange(len(recorded['video']))
    places = (labels != -100).nonzero()[:, 0]
    batch = {name: io[name] for name in ('video', 'input_ids', 'attention_mask', 'sample_id')}
    batch |= dict(key=each, mlm_ids=io['mlm_input_ids'], mlm_positions=places, mlm_labels=labels[places])
    target = stage2_teacher(stage2)(io['video'], shown(io['video_mask']))
    losses = multimodal(batch, dict(uta=1., vtc=1., vtm=1., mlm=1.), target.visible, target.tokens)
    for ours, theirs in dict(uta='video_uta_loss', vtc='vtc_loss', mlm='mlm_loss').items():
        assert_close(losses[ours][None], io[theirs], **CLOSE)
    pair, ids = -io['match_logits'].log_softmax(-1), io['sample_id']  # [video, text, class]
    video, text, exists = match_negatives(io['similarity_v2t'], ids, batch['key'])
    assert exists.all() and not (ids == ids[video]).any() and not (ids == ids[text]).any()
    expected = (pair[each, each, 1] + pair[video, each, 0] + pair[each, text, 0]).mean() / 3
    assert_close(losses['vtm'], expected, **CLOSE)


class Clips(Dataset):
    "Decoded videos, as `umt.data.galleries.gallery_dataset` gives them"
    def __init__(self, videos): self.videos = videos
    def __len__(self): return len(self.videos)
    def __getitem__(self, position):
        _, index = position  # the first is the epoch
        return dict(video=self.videos[index], sample_id=index, failures=[])


def test_retrieval(stage2, multimodal, tmp_path):
    "Scores of the two encoders, match logits of the candidates of either direction, and the figures made of both"
    if not stage2.with_name('retrieval_io.safetensors').exists(): pytest.skip('no recorded retrieval beside this model')
    io, config = read_io(stage2.parent, 'retrieval'), stage2_config(stage2)
    protocol = override(RankingConfig(), run_dir=str(tmp_path), half=False, k_test=config['k_test'])
    index = index_videos(multimodal, Clips(io['video'].transpose(1, 2)), protocol)
    ours = score_gallery(multimodal, index, list(io['input_ids']), protocol, start_accelerator())
    found = dict(dual_v2t=ours['dual'], dual_t2v=ours['dual'].T, rerank_v2t=ours['v2t'], rerank_t2v=ours['t2v'])
    for name, tensor in found.items(): assert_close(tensor, io[name], **CLOSE, msg=lambda m: f'{name}: {m}')
    texts = torch.arange(len(io['input_ids']))
    figures = gallery_metrics(ours, torch.stack([texts, io['text_to_video']], 1))
    for prefix, recorded in ('', config['rerank_metrics']), ('dual_', config['dual_metrics']):
        # the reference names a direction after what is found: `txt` is video to text
        for way, theirs in ('v2t', 'txt'), ('t2v', 'img'):
            for k in (1, 5, 10): assert round(100 * figures[f'{prefix}{way}_r{k}'], 2) == recorded[f'{theirs}_r{k}']
        assert round(100 * figures[f'{prefix}r_mean'], 2) == recorded['r_mean']


def without_teacher(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith('clip_teacher.')}


def test_stage2_round_trip(stage2, multimodal, tmp_path):
    "Published -> ours -> our format -> published, teacher included or not: names, shapes, types and numbers"
    expected, clip = read_state_dict(stage2), stage2_teacher(stage2)
    save_model(multimodal, tmp_path/'ours')
    save_published(load_model(tmp_path/'ours'), tmp_path/'alone.pth')
    save_published(load_model(tmp_path/'ours'), tmp_path/'both.pth', clip)
    for file, wanted in ('alone.pth', without_teacher(expected)), ('both.pth', expected):
        got = read_state_dict(tmp_path/file)
        assert set(got) == set(wanted)
        families = lambda state: list(dict.fromkeys(name.split('.')[0] for name in state))
        assert families(got) == families(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype
            assert got[name].shape == tensor.shape


def as_retrieval(state):
    "What fine-tuning leaves of a Stage-2 file"
    lost = 'clip_teacher.', 'clip_decoder.', 'text_encoder.cls.'
    return {name.replace('text_encoder.bert.', 'text_encoder.'): tensor for name, tensor in state.items()
            if not any(part in name for part in lost)}


@torch.no_grad()
def test_retrieval_files(stage2, multimodal, recorded, tmp_path):
    "Keys without `bert.`, no heads, no teacher; the same answers. Twelve frames, as in fine-tuning, need nothing else"
    state = as_retrieval(read_state_dict(stage2))
    torch.save(dict(model=state), tmp_path/'ret.pth')
    model = load_published(tmp_path/'ret.pth', **sizes(stage2)).eval()
    report = model.load_report
    assert type(model) is Multimodal and len(report.loaded) == len(state) - 1 and len(report.ignored) == 1
    whole, expected = model.encode_video(recorded['video']), multimodal.encode_video(recorded['video'])
    assert_close(whole.pooled, recorded['video_pooled'], **CLOSE)
    attention_mask = recorded['attention_mask']
    hidden = model.encode_text(recorded['input_ids'], attention_mask)
    assert_close(hidden, recorded['text_tokens'], **CLOSE)
    matches = multimodal.match(hidden, attention_mask, expected.tokens)
    assert torch.equal(model.match(hidden, attention_mask, whole.tokens), matches)
    save_model(model, tmp_path/'ours')
    save_published(load_model(tmp_path/'ours'), tmp_path/'again.pth')
    again = read_state_dict(tmp_path/'again.pth')
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    twelve = load_multimodal(tmp_path/'ret.pth', **sizes(stage2) | dict(num_frames=12)).eval()
    size, width = twelve.student.config['image_size'], twelve.student.config['embed_dim']
    assert twelve.encode_video(torch.randn(1, 3, 12, size, size)).pooled.shape == (1, 12, width)


@pytest.mark.parametrize('teacher', [True, False])
def test_stage2_report(stage2, tmp_path, teacher):
    "The teacher and `position_ids` are left aside by name; all else is loaded"
    whole = read_state_dict(stage2)
    state = dict(whole) if teacher else without_teacher(whole)
    torch.save(state, tmp_path/'file.pth')
    report = load_multimodal(tmp_path/'file.pth', **sizes(stage2)).load_report
    assert set(report.ignored) == {k for k in state if k.startswith('clip_teacher.') or k.endswith('.position_ids')}
    assert set(report.loaded) == state.keys() - set(report.ignored) and report.complete and not report.interpolated


WORDS = 'text_encoder.cls.predictions'
DECODER = f'{WORDS}.decoder.weight'
NUMBERS = 'text_encoder.bert.embeddings.position_ids'


@pytest.mark.parametrize('change, expected', [
    (lambda s: s.pop(next(k for k in s if 'crossattention.self.key' in k)), 'missing         1  .*self.key'),
    (lambda s: [s.pop(f'{WORDS}.{name}') for name in ('bias', 'decoder.bias')], 'missing         2  text_encoder.cls'),
    (lambda s: s.pop('vision_encoder.clip_decoder.1.norm.bias'), 'missing         1  .*clip_decoder.1.norm.bias'),
    (lambda s: s.pop('temp'), 'missing         1  temp'),
    (lambda s: s.update({'vision_encoder.cls_token': torch.ones(3)}), 'unexpected      1  vision_encoder.cls_token'),
    (lambda s: s.update({'vision_encoder.pool_norm.bias': torch.ones(3)}), 'mismatched      1  .*pool_norm.bias'),
    (lambda s: s.update({DECODER: torch.ones_like(s[DECODER])}), 'decoder.weight: differs from .*word_emb'),
    (lambda s: s.update({NUMBERS: torch.ones_like(s[NUMBERS])}), 'position_ids is not 0, 1, 2'),
    (lambda s: s.pop('itm_head.weight'), 'expected a Stage-2 or retrieval model'),
])
def test_stage2_strict(stage2, tmp_path, change, expected):
    "No tensor is ignored, and none is read twice with different contents"
    state = read_state_dict(stage2)
    change(state)
    torch.save(state, tmp_path/'file.pth')
    with pytest.raises(WeightsError, match=expected): load_multimodal(tmp_path/'file.pth', **sizes(stage2))


@pytest.mark.parametrize('file, kind', [
    ('qa.pth', 'question-answering'), ('stage1_student.pth', 'Stage-1 student'), ('finetuned.pth', 'recogniser'),
    ('clip_visual.pth', 'CLIP')])
def test_other_files_are_refused_by_kind(stage2, file, kind):
    "The reference's `b16_25m.pth` was a question-answering model for a time"
    if not stage2.with_name(file).exists(): pytest.skip(f'no {file}')
    expected = f'{file}: expected a Stage-2 or retrieval model, but it looks like a .*{kind}'
    with pytest.raises(WeightsError, match=expected):
        load_multimodal(stage2.with_name(file), **sizes(stage2))


def test_training_files(stage2, multimodal, tmp_path, monkeypatch):
    "As the reference's Stage-2 trainer writes them: optimiser beside the model, config of a class of its own"
    module = ModuleType('utils.easydict')
    for name in ('EasyDict', 'Other'):
        setattr(module, name, type(name, (dict,), dict(__module__='utils.easydict', __qualname__=name)))
    config = module.EasyDict(lr=1e-4, optimizer=module.EasyDict(opt='adamW', betas=[.9, .999]))
    config.__dict__.update(config)  # its fields are attributes, too
    state = read_state_dict(stage2)
    with monkeypatch.context() as patch:
        for name in ('utils', 'utils.easydict'): patch.setitem(sys.modules, name, module)
        optimizer = dict(state={0: dict(step=3, exp_avg=torch.ones(9))})
        checkpoint = dict(model=state, optimizer=optimizer, config=config)
        torch.save(checkpoint | dict(epoch=9, global_step=3), tmp_path/'ckpt_09.pth')
        torch.save(checkpoint | dict(config=module.Other()), tmp_path/'other.pth')
    loaded = load_multimodal(tmp_path/'ckpt_09.pth', **sizes(stage2)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in multimodal.state_dict().items())
    teacher = stage2_teacher(stage2, tmp_path/'ckpt_09.pth')
    assert teacher.target_dim == stage2_config(stage2)['teacher']['output_dim']
    with pytest.raises(WeightsError, match=r'would run code \(utils.easydict.Other\)'):
        load_multimodal(tmp_path/'other.pth', **sizes(stage2))
