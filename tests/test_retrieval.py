"Retrieval: metrics by hand, readers, scores against a network whose answers are known, several processes, the reference's vectors"
import json, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from umt.data import emoji_motion
from umt.tasks import retrieval
from umt.models.published import load_multimodal, save_model
from umt.data.tables import ManifestError
from umt.data.galleries import GALLERIES, GalleryDataset, read_gallery
from umt.models.multimodal import EncodedVideo, Multimodal
from umt.tasks.ranking import (
    RetrievalConfig, gallery_metrics, index_videos, retrieval_metrics, score_gallery, target_ranks)
from umt.tasks.retrieval import PRESETS, zero_shot
from umt.tasks.search import search
from umt.models.student import Student
from umt.models.text import Tokenizer
from umt.core.config import override
from umt.training.distributed import start_accelerator

REFERENCE = Path(__file__).parents[1].parent/'shared/reference/tiny_a'


# Metrics

def test_single_targets_by_hand():
    scores = torch.tensor([[9., 1, 2, 3], [9, 8, 7, 6], [1, 2, 3, 4], [4, 1, 3, 2]])
    assert target_ranks(scores, torch.tensor([[0, 0], [1, 1], [2, 0], [3, 3]])).tolist() == [1, 2, 4, 3]
    found = retrieval_metrics(scores, torch.tensor([[0, 0], [1, 1], [2, 0], [3, 3]]))
    assert found == dict(r1=.25, r5=1., r10=1., median_rank=2.5, mean_rank=2.5)


def test_the_best_of_several_targets_counts():
    scores = torch.arange(20.).flip(0)[None].repeat(2, 1)
    assert target_ranks(scores, torch.tensor([[0, 19], [0, 4], [1, 11], [1, 12]])).tolist() == [5, 12]
    found = retrieval_metrics(scores, torch.tensor([[0, 19], [0, 4], [1, 11], [1, 12]]))
    assert (found['r1'], found['r5'], found['r10']) == (0, .5, .5)


@pytest.mark.parametrize('target, rank', [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_ties(target, rank): assert target_ranks(torch.zeros(1, 4), torch.tensor([[0, target]])).item() == rank


def test_ties_are_where_a_reversed_stable_sort_puts_them():
    scores = torch.randint(0, 4, (30, 40), generator=torch.Generator().manual_seed(0)).float()
    pairs = torch.cartesian_prod(torch.arange(30), torch.tensor([3, 17, 30]))
    order = scores.argsort(dim=1, stable=True).flip(1)
    by_sorting = [min((order[q] == i).nonzero().item() + 1 for i in (3, 17, 30)) for q in range(30)]
    assert target_ranks(scores, pairs).tolist() == by_sorting


def test_nan_is_not_a_good_score():
    with pytest.raises(ValueError, match='finite'): target_ranks(torch.full((2, 2), torch.nan), torch.tensor([[0, 0], [1, 1]]))


# Readers: each published form, as small as it can be, and what must be refused

FILES = {
    'json': [dict(video='a.mp4', caption=['one', 'two']), dict(video=['b.mp4', 'c.mp4'], caption='three')],
    'msrvtt': 'key,vid_key,video_id,sentence\nret0,msr1,a,one\nret1,msr2,b,"two, too"\n',
    'didemo': [dict(video='a.avi', description='one', times=[[0, 0]]), dict(video='b.mov', description='two'), dict(video='a.avi', description='three')],
    'activitynet': dict(v_a=dict(duration=3.5, timestamps=[[0, 1], [1, 3]], sentences=['One.', ' Two.']), v_b=dict(sentences=['Three.'])),
    'lsmdc': ''.join(f'1_Film_00.00.0{i}.000-00.00.0{i}.900\t0\t0\t0\t0\t{text}\n' for i, text in enumerate(('one', 'two'))),
    'msvd': 'a_1_2 one\na_1_2 two words\nb_3_4 three\n',
    'ssv2_label': [dict(id='1', label='lifting a cup', template='Lifting [something]'), dict(id='2', label='lifting a pen', template='Lifting [something]')],
    'ssv2_template': [dict(id='1', label='lifting a cup', template='Lifting [something]'), dict(id='2', label='lifting a pen', template='Lifting [something]')],
}
TEXTS = {
    'json': [('one', 'a.mp4'), ('two', 'a.mp4'), ('three', 'b.mp4'), ('three', 'c.mp4')],
    'msrvtt': [('one', 'a.mp4'), ('two, too', 'b.mp4')],
    'didemo': [('one', 'a.avi'), ('three', 'a.avi'), ('two', 'b.mov')],
    'activitynet': [('One.', 'v_a.mp4'), (' Two.', 'v_a.mp4'), ('Three.', 'v_b.mp4')],
    'lsmdc': [(text, f'1_Film/1_Film_00.00.0{i}.000-00.00.0{i}.900.avi') for i, text in enumerate(('one', 'two'))],
    'msvd': [('one', 'a_1_2.avi'), ('two words', 'a_1_2.avi'), ('three', 'b_3_4.avi')],
    'ssv2_label': [('lifting a cup', '1.webm'), ('lifting a pen', '2.webm')],
    'ssv2_template': [('Lifting something', '1.webm'), ('Lifting something', '2.webm')],
}


def written(folder, content, name='annotations'):
    path = folder/(name + ('.txt' if isinstance(content, str) else '.json'))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def pairs_of(gallery): return [(gallery.texts[t], gallery.manifest.name(v)) for t, v in gallery.pairs.tolist()]


@pytest.mark.parametrize('kind', GALLERIES)
def test_readers(kind, tmp_path):
    gallery = read_gallery(kind, written(tmp_path, FILES[kind]), tmp_path)
    assert pairs_of(gallery) == TEXTS[kind]
    assert gallery.pairs[:, 0].unique().tolist() == [*range(len(gallery.texts))]


@pytest.mark.parametrize('kind, first', [('didemo', 'one three'), ('activitynet', 'One.  Two.'), ('msrvtt', 'one')])
def test_paragraphs(kind, first, tmp_path):
    gallery = read_gallery(kind, written(tmp_path, FILES[kind]), tmp_path, paragraph=True)
    assert gallery.texts[0] == first and len(gallery.texts) == len(gallery.manifest) == 2


def test_split_and_layout(tmp_path):
    names, file = written(tmp_path, 'b_3_4\n', 'names'), written(tmp_path, FILES['msvd'])
    assert pairs_of(read_gallery('msvd', file, tmp_path, names, layout='clips/{video}.mp4')) == [('three', 'clips/b_3_4.mp4')]
    names.write_text('b_3_4\nc_5_6\n')
    with pytest.raises(ManifestError, match="line 2: 'c_5_6' is not in"): read_gallery('msvd', file, tmp_path, names)


@pytest.mark.parametrize('kind, content, complaint', [
    ('json', [dict(video='a.mp4', caption='')], 'expected text'), ('json', [dict(video='/etc/passwd', caption='x')], 'outside the root'),
    ('json', [dict(video=3, caption='x')], 'expected a name'), ('json', dict(a=1), 'expected a list'), ('json', [dict(video='a.mp4', caption=[])], 'expected text'),
    ('msrvtt', 'video_id,sentence\na\n', 'expected 2 fields'), ('msrvtt', 'a,no header\n', 'expected text'), ('didemo', dict(a=1), 'JSON list'),
    ('activitynet', [1], 'JSON object'), ('activitynet', '{', 'not JSON'),
    ('lsmdc', 'a\tb\n', 'expected 6 fields'), ('msvd', 'a_1_2\n', 'expected text'), ('msvd', '# nothing\n', 'no rows'), ('ssv2_label', [dict(id='1')], "no 'label'")])
def test_malformed_files_are_refused(kind, content, complaint, tmp_path):
    with pytest.raises(ManifestError, match=complaint): read_gallery(kind, written(tmp_path, content), tmp_path)


def test_published_protocols():
    "Spec 4 and 6.4: lengths, paragraphs, the first 30 seconds, 4 frames, 128 candidates"
    lengths = dict(msrvtt=32, didemo=64, activitynet=150, lsmdc=96, msvd=64, ssv2_label=25, ssv2_template=25)
    for name, length in lengths.items():
        c = PRESETS[name]
        assert (c.max_length, c.num_frames, c.image_size, c.k_test, c.sep, c.precision) == (length, 4, 224, 128, False, 'fp16'), name
        assert c.paragraph == (name in ('didemo', 'activitynet')) and c.trim == (30 if name == 'didemo' else None)
    assert set(PRESETS) == {*lengths, 'nano_emoji', 'nano_emoji_heldout'}


# A network whose answers are known: videos of one grey each, texts of one number each

class Oracle(nn.Module):
    "Its cosine prefers the nearest grey, its matching head the grey that is `off` further, so that the two orders differ"
    def __init__(self, off=0.):
        super().__init__()
        self.config, self.off = dict(embed_dim=2), off
        self.text = nn.Module()
        self.text.hidden_size = 1
        self.temperature = nn.Parameter(torch.tensor([1.]))
    def encode_video(self, video): return EncodedVideo(video.mean((1, 3, 4)).unsqueeze(-1), video.mean((1, 3, 4)).unsqueeze(-1), None)
    def encode_text(self, ids, mask): return ids[..., None] / 10 * mask[..., None]
    def embed(self, x): return torch.cat([x.cos(), x.sin()], -1)
    def embed_video(self, pooled): return self.embed(pooled)
    def embed_text(self, hidden): return self.embed(hidden[:, 0])
    def match(self, hidden, mask, tokens):
        assert len(hidden) == len(mask) and len(tokens) in (1, len(hidden))
        logit = -(hidden[:, 0, 0] + self.off - tokens.mean((1, 2))).abs()
        return torch.stack([-logit, logit], 1)


class Greys(torch.utils.data.Dataset):
    "Video i has the value i / 10"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, position): return dict(video=torch.full((3, 2, 4, 4), position[1] / 10), sample_id=position[1], failures=[])


def scored(oracle, videos, texts, **changes):
    config = override(RetrievalConfig(half=False, eval_batch_size=3, text_batch_size=4, match_batch_size=2, k_test=3), **changes)
    return score_gallery(oracle, Greys(videos), [torch.tensor([text] + [0] * (text % 3)) for text in texts], config, start_accelerator())


def test_scores_of_a_network_with_known_answers():
    texts = torch.tensor([4, 0, 2, 3, 1, 2])
    scores = scored(Oracle(), 5, texts.tolist())
    angle = (torch.arange(5)[:, None] - texts) / 10
    assert_close(scores['dual'], angle.cos())
    pairs = torch.stack([torch.arange(6), texts], 1)
    found = gallery_metrics(scores, pairs)
    assert [found[f'{way}_r1'] for way in ('t2v', 'v2t', 'dual_t2v', 'dual_v2t')] == [1, 1, 1, 1] and found['r_mean'] == 1
    kept = scores['t2v'] > -100
    assert kept.sum(1).tolist() == [3] * 6
    assert_close(scores['t2v'][kept], -angle.T.abs()[kept])
    assert kept[1].tolist() == [True, True, True, False, False]
    assert (scores['v2t'] > -100).sum(1).tolist() == [3] * 5


def test_the_matching_head_alone_orders_the_candidates():
    "The right video is nearest by cosine; a head that is off by one grey ranks its neighbour first, whatever the cosine says"
    scores = scored(Oracle(off=.1), 6, range(5))
    pairs = torch.arange(5)[:, None].expand(-1, 2)
    assert scores['t2v'].argmax(1).tolist() == [1, 2, 3, 4, 5]
    scores = {way: x[:, :5] if way == 't2v' else x[:5] for way, x in scores.items()}
    found = gallery_metrics(scores, pairs)
    assert found['dual_t2v_r1'] == found['dual_v2t_r1'] == 1 and found['t2v_r1'] < .5


def test_what_is_not_a_candidate_ranks_below_however_bad_the_candidates_are():
    class Bad(Oracle):
        def match(self, *inputs): return super().match(*inputs) * 1e4 - 1e5
    scores = scored(Bad(), 6, range(6), k_test=2)
    kept = torch.zeros(6, 6, dtype=torch.bool).scatter_(1, scores['dual'].topk(2).indices, True)
    assert scores['v2t'][kept].min() > scores['v2t'][~kept].max()


def test_more_candidates_than_there_are():
    scores = scored(Oracle(), 3, range(3), k_test=50)
    assert (scores['v2t'] > -100).all() and torch.equal(scores['v2t'], scores['t2v'].T)


# Against the reference

@pytest.mark.skipif(not REFERENCE.is_dir(), reason='the reference vectors are not here')
def test_parity_of_scores_and_metrics(capsys):
    io, about = load_file(REFERENCE/'retrieval_io.safetensors'), json.loads((REFERENCE/'stage2_config.json').read_text())
    model = load_multimodal(REFERENCE/'stage2.pth', image_size=64, num_frames=4, num_heads=2, text_heads=2)
    class Videos(Greys):
        def __getitem__(self, position): return dict(video=io['video'][position[1]].transpose(0, 1), sample_id=position[1], failures=[])
    config = RetrievalConfig(half=False, k_test=about['k_test'], eval_batch_size=3, text_batch_size=4)
    scores = score_gallery(model, Videos(len(io['video'])), list(io['input_ids']), config, start_accelerator())
    for ours, theirs in dict(dual='dual_v2t', v2t='rerank_v2t', t2v='rerank_t2v').items(): assert_close(scores[ours], io[theirs], rtol=1e-4, atol=1e-5)
    assert_close(scores['dual'].T, io['dual_t2v'], rtol=1e-4, atol=1e-5)
    found = gallery_metrics(scores, torch.stack([torch.arange(len(io['text_to_video'])), io['text_to_video']], 1))
    for prefix, theirs in dict(dual_='dual_metrics', **{'': 'rerank_metrics'}).items():
        for name, value in about[theirs].items():
            way = {'txt': 'v2t', 'img': 't2v'}.get(name.split('_')[0])
            if way and name.endswith('r_mean'): ours = sum(found[f'{prefix}{way}_r{k}'] for k in (1, 5, 10)) / 3
            else: ours = found[f'{prefix}{way}_{name.split("_")[1]}' if way else f'{prefix}r_mean']
            assert round(100 * ours, 2) == pytest.approx(value, abs=.011), (prefix, name)


# Files, runs and several processes

SIZES = dict(student=dict(image_size=64, num_frames=2, embed_dim=32, depth=2, num_heads=2, aligned_layers=0),
             text=dict(vision_dim=32, fusion_layer=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, lm_head=False))


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clips')
    emoji_motion.generate(folder, {'train': 2, 'val': 2, 'test': 11}, num_workers=0)
    return folder


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Multimodal(**SIZES, embed_dim=16).eval()
        for p in (p for p in model.parameters() if p.ndim > 1): nn.init.normal_(p, std=.3) # scores that are far apart
    return model


@pytest.fixture(scope='module')
def trained(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    save_model(model, folder)
    return folder


def small(clips, trained, run_dir, **changes):
    return override(PRESETS['nano_emoji'], **dict(data_root=str(clips), init=str(trained), run_dir=str(run_dir), image_size=64, num_frames=2, k_test=5,
                                                  eval_batch_size=3, text_batch_size=7, match_batch_size=6) | changes)


def stored(config): return json.loads(Path(config.run_dir, 'evaluation.json').read_text())


WORKER = """import json, sys
from umt import retrieval
from umt.datasets import DataError
held, index_videos = [], retrieval.index_videos
def noting(*args, **options):
    index = index_videos(*args, **options)
    held.append((list(index.places), list(index.tokens.shape), str(index.tokens.dtype)))
    return index
def noting_texts(*args, encode_texts=retrieval.encode_texts):
    texts = encode_texts(*args)
    held[-1] += (texts.states.untyped_storage().filename is not None,)
    return texts
retrieval.index_videos, retrieval.encode_texts = noting, noting_texts
for argv in json.loads(sys.argv[1]):
    try: retrieval.main(argv)
    except DataError as error: sys.stdout.write(f'DataError: {error}\\n')
sys.stdout.write(f'HELD {json.dumps(held)}\\n'); sys.stdout.flush()"""


def command_line(config): return [f'--{name}={getattr(config, name)}' for name in config.__dataclass_fields__]


@pytest.fixture(scope='module')
def together(clips, trained, tmp_path_factory):
    "The evaluations that two processes do together, and what was printed"
    folder = tmp_path_factory.mktemp('together')
    captions = json.loads((clips/'captions_test.json').read_text())
    (clips/'one.json').write_text(json.dumps(captions[:1]))
    (clips/'broken.mp4').write_bytes(b'no video')
    (clips/'broken.json').write_text(json.dumps([*captions, dict(video='broken.mp4', caption='nothing')]))
    configs = {name: small(clips, trained, folder/name, **changes) for name, changes in dict(
        all={}, disk=dict(on_disk=True, half=False), one=dict(captions='one.json'), broken=dict(captions='broken.json')).items()}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--no-python', sys.executable, '-c', WORKER]
    done = subprocess.run([*launch, json.dumps([command_line(c) for c in configs.values()])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return configs, done.stdout


@pytest.mark.parametrize('name', ['all', 'disk', 'one'])
def test_two_processes_evaluate_as_one(name, together, tmp_path):
    config = together[0][name]
    assert zero_shot(replace(config, run_dir=str(tmp_path))) == stored(config)
    alone, shared = (load_file(Path(run)/'scores.safetensors') for run in (tmp_path, config.run_dir))
    assert alone.keys() == shared.keys() == {'dual', 'v2t', 't2v', 'pairs'}
    for key in alone: assert_close(shared[key], alone[key], rtol=1e-4, atol=2e-3 if config.half else 1e-5)
    assert not [p.name for p in Path(config.run_dir).iterdir() if p.name.startswith('.')]


def test_each_process_holds_its_own_videos_only(together, clips):
    "And the texts are in one mapped file for both"
    n = len(json.loads((clips/'captions_test.json').read_text()))
    held = sorted((json.loads(line[5:]) for line in together[1].splitlines() if line.startswith('HELD ')), key=lambda runs: runs[0][0])
    assert len(held) == 2 and n > 2
    for (all_, disk, one), share, sole in zip(held, (range(0, n, 2), range(1, n, 2)), ([0], [])):
        assert all_ == [list(share), [len(share), 32, 32], 'torch.float16', True]
        assert disk == [list(share), [len(share), 32, 32], 'torch.float32', True]
        assert one[0] == sole and one[1][0] == len(sole)


def test_a_broken_clip_stops_all_processes(together):
    configs, printed = together
    assert printed.count('DataError: 1 of') == 2 and 'broken.mp4' in printed
    assert not Path(configs['broken'].run_dir, 'evaluation.json').exists()


def test_an_evaluation_is_not_repeated_unless_something_changed(clips, trained, model, tmp_path, monkeypatch):
    config = small(clips, trained, tmp_path)
    found = zero_shot(config)
    assert found['num_videos'] * 4 == found['num_texts'] and found['dropped'] == 0 and found['k_test'] == 5
    assert json.loads((tmp_path/'config.json').read_text())['max_length'] == 16
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, 'score_gallery', lambda *_: pytest.fail('evaluated again'))
        assert zero_shot(override(config, eval_batch_size=2, on_disk=True)) == found
    assert zero_shot(override(config, k_test=2))['fingerprint'] != found['fingerprint']
    assert json.loads((tmp_path/'config.json').read_text())['k_test'] == 2
    (tmp_path/'config.json').write_text('{"epochs": 3}')
    zero_shot(config)
    assert (tmp_path/'config.json').read_text() == '{"epochs": 3}'


def test_the_network_sees_the_middle_frames_and_the_whole_picture(clips, model):
    gallery = read_gallery('json', clips/'captions_test.json', clips)
    dataset = GalleryDataset(gallery.manifest, 2, 64)
    index = index_videos(model, gallery.manifest)
    with torch.no_grad(): encoded = model.encode_video(torch.stack([dataset[0, i]['video'] for i in (0, 3)]))
    assert_close(index.embeddings[[0, 3]], model.embed_video(encoded.pooled).detach(), rtol=1e-4, atol=1e-5)
    assert_close(index.tokens[[0, 3]], encoded.tokens.half(), rtol=1e-3, atol=1e-3)


def test_missing_videos(clips, trained, tmp_path):
    captions = json.loads((clips/'captions_test.json').read_text())
    (clips/'lost.json').write_text(json.dumps([dict(video='lost.mp4', caption='gone'), *captions]))
    config = small(clips, trained, tmp_path, captions='lost.json')
    with pytest.raises(FileNotFoundError, match='lost.mp4'): zero_shot(config)
    found = zero_shot(override(config, missing='drop'))
    assert (found['dropped'], found['num_videos']) == (1, len(captions))
    assert found['r_mean'] == zero_shot(small(clips, trained, tmp_path/'whole'))['r_mean']


def test_wrong_starts(clips, trained, tmp_path):
    save_model(Student(1, 8, image_size=64, num_frames=2, embed_dim=32, depth=2, num_heads=2), tmp_path/'student')
    with pytest.raises(ValueError, match='a Student, which knows no texts'): zero_shot(small(clips, tmp_path/'student', tmp_path/'run'))
    with pytest.raises(FileNotFoundError, match='expected a run directory'): zero_shot(small(clips, tmp_path/'none', tmp_path/'run'))
    save_model(Multimodal(SIZES['student'], SIZES['text'] | dict(vocab_size=50), 16), tmp_path/'words')
    with pytest.raises(ValueError, match='30522 tokens, the model 50'): zero_shot(small(clips, tmp_path/'words', tmp_path/'run'))


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_and_loader_processes(precision, clips, trained, tmp_path):
    runs = [small(clips, trained, tmp_path/name, precision=precision, num_workers=workers) for name, precision, workers
            in (('half', precision, 2), ('full', 'fp32', 0))]
    for config in runs: zero_shot(config)
    half, full = (load_file(Path(config.run_dir)/'scores.safetensors')['dual'] for config in runs)
    assert_close(half, full, rtol=0, atol=.05)
    assert not torch.equal(half, full)


def test_more_frames_than_in_training(clips, trained, tmp_path):
    found = zero_shot(small(clips, trained, tmp_path, num_frames=3))
    assert found['num_videos'] > 0 and found['fingerprint'] != zero_shot(small(clips, trained, tmp_path/'two'))['fingerprint']


def test_search_agrees_with_the_scores(clips, model):
    gallery, tokenizer, accelerator = read_gallery('json', clips/'captions_test.json', clips), Tokenizer(), start_accelerator()
    config = RetrievalConfig(image_size=64, num_frames=2, k_test=4, half=False)
    ids = [tokenizer.encode(text, 32) for text in gallery.texts]
    scores, index = score_gallery(model, gallery.manifest, ids, config, accelerator), index_videos(model, gallery.manifest, config)
    for t in (0, 7):
        hits = search(index, model, tokenizer, gallery.texts[t], k=4, num_candidates=4)
        assert [hit.index for hit in hits] == scores['t2v'][t].argsort(descending=True)[:4].tolist()
        assert_close([hit.score for hit in hits], scores['t2v'][t].sort(descending=True).values[:4].tolist(), rtol=1e-4, atol=1e-4)
        assert [hit.index for hit in search(index, model, tokenizer, gallery.texts[t], k=2, rerank=False)] == scores['dual'][:, t].topk(2).indices.tolist()
        assert hits[0].path == gallery.manifest.name(hits[0].index)
