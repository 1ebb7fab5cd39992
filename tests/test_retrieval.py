"Retrieval: metrics by hand, readers, scores against a network whose answers are known, several processes, vectors."
import json, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from umt.core.config import UsageError, leaves, override
from umt.data import emoji_motion
from umt.data.galleries import GALLERIES, gallery_dataset, read_gallery
from umt.data.transforms import normalize_video
from umt.data.media import DataError, TooManyBadClips
from umt.data.tables import ManifestError
from umt.models.multimodal import EncodedVideo, Multimodal
from umt.models.published import load_model, load_multimodal, save_model, save_published
from umt.models.student import Student
from umt.models.text import Tokenizer
from umt.tasks import retrieval
from umt.tasks.ranking import (
    RankingConfig, gallery_metrics, index_videos, retrieval_metrics, score_gallery, target_ranks)
from umt.tasks.retrieval import PRESETS, zero_shot
from umt.tasks.search import search
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
    scores = torch.full((2, 2), torch.nan)
    with pytest.raises(ValueError, match='finite'): target_ranks(scores, torch.tensor([[0, 0], [1, 1]]))


# Readers: each published form, as small as it can be, and what must be refused

SSV2 = [dict(id='1', label='lifting a cup', template='Lifting [something]'),
        dict(id='2', label='lifting a pen', template='Lifting [something]')]
FILES = {
    'json': [dict(video='a.mp4', caption=['one', 'two']), dict(video=['b.mp4', 'c.mp4'], caption='three')],
    'msrvtt': 'key,vid_key,video_id,sentence\nret0,msr1,a,one\nret1,msr2,b,"two, too"\n',
    'didemo': [dict(video='a.avi', description='one', times=[[0, 0]]), dict(video='b.mov', description='two'),
               dict(video='a.avi', description='three')],
    'activitynet': dict(v_a=dict(duration=3.5, timestamps=[[0, 1], [1, 3]], sentences=['One.', ' Two.']),
                        v_b=dict(sentences=['Three.'])),
    'lsmdc': ''.join(f'1_Film_00.00.0{i}.000-00.00.0{i}.900\t0\t0\t0\t0\t{t}\n' for i, t in enumerate(('one', 'two'))),
    'msvd': 'a_1_2 one\na_1_2 two words\nb_3_4 three\n',
    'ssv2_label': SSV2,
    'ssv2_template': SSV2,
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
    gallery = read_gallery('msvd', file, tmp_path, names, layout='clips/{video}.mp4')
    assert pairs_of(gallery) == [('three', 'clips/b_3_4.mp4')]
    names.write_text('b_3_4\nc_5_6\n')
    with pytest.raises(ManifestError, match="line 2: 'c_5_6' is not in"): read_gallery('msvd', file, tmp_path, names)


@pytest.mark.parametrize('kind, content, complaint', [
    ('json', [dict(video='a.mp4', caption='')], 'expected text'),
    ('json', [dict(video='/etc/passwd', caption='x')], 'outside the root'),
    ('json', [dict(video=3, caption='x')], 'expected a name'),
    ('json', dict(a=1), 'expected a list'),
    ('json', [dict(video='a.mp4', caption=[])], 'expected text'),
    ('msrvtt', 'video_id,sentence\na\n', 'expected 2 fields'),
    ('msrvtt', 'a,no header\n', 'is the header missing'),
    ('didemo', dict(a=1), 'expected a list of objects'),
    ('activitynet', [1], 'JSON object'),
    ('activitynet', '{', 'not JSON'),
    ('lsmdc', 'a\tb\n', 'expected 6 fields'),
    ('msvd', 'a_1_2\n', 'expected text'),
    ('msvd', '# nothing\n', 'no rows'),
    ('ssv2_label', [dict(id='1')], "no 'label'")])
def test_malformed_files_are_refused(kind, content, complaint, tmp_path):
    with pytest.raises(ManifestError, match=complaint): read_gallery(kind, written(tmp_path, content), tmp_path)


def test_published_protocols():
    "Spec 4 and 6.4: lengths, paragraphs, the first 30 seconds, 4 frames, 128 candidates"
    lengths = dict(msrvtt=32, didemo=64, activitynet=150, lsmdc=96, msvd=64, ssv2_label=25, ssv2_template=25)
    for name, length in lengths.items():
        c = PRESETS[name]
        assert (c.text.max_length, c.text.sep, c.scoring.k_test) == (length, False, 128), name
        assert (c.data.num_frames, c.data.image_size, c.device.precision) == (4, 224, 'fp16'), name
        assert c.data.paragraph == (name in ('didemo', 'activitynet'))
        assert c.data.trim == (30 if name == 'didemo' else None)
    assert set(PRESETS) == {*lengths, 'nano_emoji', 'nano_emoji_heldout'}


# A network whose answers are known: videos of one grey each, texts of one number each

class Oracle(nn.Module):
    "Its cosine prefers the nearest grey, its matching head the one that is `off` further, so the two orders differ"
    def __init__(self, off=0.):
        super().__init__()
        self.config, self.off = dict(embed_dim=2), off
        self.text = nn.Module()
        self.text.hidden_size = 1
        self.temperature = nn.Parameter(torch.tensor([1.]))
    def encode_video(self, video):
        grey = video.mean((1, 3, 4)).unsqueeze(-1)
        return EncodedVideo(grey, grey, None)
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
    def __getitem__(self, position):
        return dict(video=torch.full((3, 2, 4, 4), position[1] / 10), sample_id=position[1], failures=[])


PLAIN = override(RankingConfig(), half=False, eval_batch_size=3, text_batch_size=4, match_batch_size=2, k_test=3)

def score_videos(model, videos, ids, config, missing='error'):
    accelerator = start_accelerator()
    return score_gallery(model, index_videos(model, videos, config, accelerator, missing), ids, config, accelerator)

def scored(oracle, videos, texts, **changes):
    ids = [torch.tensor([text] + [0] * (text % 3)) for text in texts]
    return score_videos(oracle, Greys(videos), ids, override(PLAIN, changes))


def test_scores_of_a_network_with_known_answers():
    texts = torch.tensor([4, 0, 2, 3, 1, 2])
    scores = scored(Oracle(), 5, texts.tolist())
    angle = (torch.arange(5)[:, None] - texts) / 10
    assert_close(scores['dual'], angle.cos())
    pairs = torch.stack([torch.arange(6), texts], 1)
    found = gallery_metrics(scores, pairs)
    assert [found[f'{way}_r1'] for way in ('t2v', 'v2t', 'dual_t2v', 'dual_v2t')] == [1, 1, 1, 1]
    assert found['r_mean'] == 1
    kept = scores['t2v'] > -100
    assert kept.sum(1).tolist() == [3] * 6
    assert_close(scores['t2v'][kept], -angle.T.abs()[kept])
    assert kept[1].tolist() == [True, True, True, False, False]
    assert (scores['v2t'] > -100).sum(1).tolist() == [3] * 5


def test_the_matching_head_alone_orders_the_candidates():
    "The right video is nearest by cosine; a head that is off by one grey ranks its neighbour first all the same"
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


class OneBroken(Greys):
    "The third video cannot be decoded"
    def __getitem__(self, position):
        sample = super().__getitem__(position)
        if position[1] != 2: return sample
        return sample | dict(video=torch.zeros(3, 2, 4, 4), failures=[(2, 'broken.mp4', 'no video')])

def test_a_video_that_cannot_be_decoded_is_no_candidate():
    "Scores of the others are those of a gallery without it."
    ids = [torch.tensor([text]) for text in (4, 0, 3, 1)]
    config = override(PLAIN, bad_clip_limit=.5)
    with pytest.raises(DataError, match='1 of 5 clips cannot be decoded.*\n  broken.mp4: no video'):
        score_videos(Oracle(), OneBroken(5), ids, config)
    with pytest.raises(TooManyBadClips, match='more than 10.0%'):
        score_videos(Oracle(), OneBroken(5), ids, override(config, bad_clip_limit=.1), 'drop')
    found = score_videos(Oracle(), OneBroken(5), ids, config, 'drop')
    class Without(Greys):
        def __getitem__(self, position): return super().__getitem__((0, [0, 1, 3, 4][position[1]]))
    expected = score_videos(Oracle(), Without(4), ids, config)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


# Against the reference

@pytest.mark.skipif(not REFERENCE.is_dir(), reason='the reference vectors are not here')
def test_parity_of_scores_and_metrics(capsys):
    io = load_file(REFERENCE/'retrieval_io.safetensors')
    about = json.loads((REFERENCE/'stage2_config.json').read_text())
    model = load_multimodal(REFERENCE/'stage2.pth', image_size=64, num_frames=4, num_heads=2, text_heads=2)
    class Videos(Greys):
        def __getitem__(self, position):
            return dict(video=io['video'][position[1]].transpose(0, 1), sample_id=position[1], failures=[])
    config = override(PLAIN, k_test=about['k_test'])
    scores = score_videos(model, Videos(len(io['video'])), list(io['input_ids']), config)
    for ours, theirs in dict(dual='dual_v2t', v2t='rerank_v2t', t2v='rerank_t2v').items():
        assert_close(scores[ours], io[theirs], rtol=1e-4, atol=1e-5)
    assert_close(scores['dual'].T, io['dual_t2v'], rtol=1e-4, atol=1e-5)
    pairs = torch.stack([torch.arange(len(io['text_to_video'])), io['text_to_video']], 1)
    found = gallery_metrics(scores, pairs)
    for prefix, theirs in dict(dual_='dual_metrics', **{'': 'rerank_metrics'}).items():
        for name, value in about[theirs].items():
            way = {'txt': 'v2t', 'img': 't2v'}.get(name.split('_')[0])
            if way and name.endswith('r_mean'): ours = sum(found[f'{prefix}{way}_r{k}'] for k in (1, 5, 10)) / 3
            else: ours = found[f'{prefix}{way}_{name.split("_")[1]}' if way else f'{prefix}r_mean']
            assert round(100 * ours, 2) == pytest.approx(value, abs=.011), (prefix, name)


# Files, runs and several processes

SIZES = dict(
    student=dict(image_size=64, num_frames=2, embed_dim=32, depth=2, num_heads=2, aligned_layers=0),
    text=dict(vision_dim=32, fusion_layer=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
              intermediate_size=64, lm_head=False))


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
    places = dict(data_root=str(clips), init=str(trained), run_dir=str(run_dir))
    sizes = dict(image_size=64, num_frames=2, k_test=5, eval_batch_size=3, text_batch_size=7, match_batch_size=6)
    return override(PRESETS['nano_emoji'], places | sizes | changes)


def stored(config): return json.loads(Path(config.run_dir, 'evaluation.json').read_text())


WORKER = """import json, sys
from umt.core.config import UsageError
from umt.tasks import ranking, retrieval
held, index_videos, encode_texts = [], ranking.index_videos, ranking.encode_texts
def noting(*args, **options):
    index = index_videos(*args, **options)
    held.append((list(index.places), list(index.tokens.shape), str(index.tokens.dtype)))
    return index
def noting_texts(*args):
    texts = encode_texts(*args)
    held[-1] += (texts.states.untyped_storage().filename is not None,)
    return texts
ranking.index_videos, ranking.encode_texts = noting, noting_texts
for argv in json.loads(sys.argv[1]):
    try: retrieval.main(argv)
    except UsageError as error: sys.stdout.write(f'CODE {error.code}: {error.message}\\n')
sys.stdout.flush() # one write with its own line ends: the other process shares the pipe
sys.stdout.write(f'\\nHELD {json.dumps(held)}\\n')
sys.stdout.flush()"""


def command_line(config): return [f'--{leaf.name}={leaf.value}' for leaf in leaves(config)]


@pytest.fixture(scope='module')
def together(clips, trained, tmp_path_factory):
    "The evaluations that two processes do together, and what was printed"
    folder = tmp_path_factory.mktemp('together')
    captions = json.loads((clips/'captions_test.json').read_text())
    (clips/'one.json').write_text(json.dumps(captions[:1]))
    (clips/'broken.mp4').write_bytes(b'no video')
    (clips/'broken.json').write_text(json.dumps([*captions, dict(video='broken.mp4', caption='nothing')]))
    changed = dict(
        all={}, disk=dict(on_disk=True, half=False), one=dict(captions='one.json'), broken=dict(captions='broken.json'),
        dropped=dict(captions='broken.json', missing='drop', bad_clip_limit=.2))
    configs = {name: small(clips, trained, folder/name, **changes) for name, changes in changed.items()}
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--no-python']
    argv = json.dumps([command_line(c) for c in configs.values()])
    done = subprocess.run([*launch, sys.executable, '-c', WORKER, argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return configs, done.stdout


@pytest.mark.parametrize('name', ['all', 'disk', 'one'])
def test_two_processes_evaluate_as_one(name, together, tmp_path):
    config = together[0][name]
    assert zero_shot(override(config, run_dir=str(tmp_path))) == stored(config)
    alone, shared = (load_file(Path(run)/'scores.safetensors') for run in (tmp_path, config.run_dir))
    assert alone.keys() == shared.keys() == {'dual', 'v2t', 't2v', 'pairs'}
    for key in alone: assert_close(shared[key], alone[key], rtol=1e-4, atol=2e-3 if config.scoring.half else 1e-5)
    assert not [p.name for p in Path(config.run_dir).iterdir() if p.name.startswith('.')]


def test_each_process_holds_its_own_videos_only(together, clips):
    "And the texts are in one mapped file for both"
    n = len(json.loads((clips/'captions_test.json').read_text()))
    held = [json.loads(line[5:]) for line in together[1].splitlines() if line.startswith('HELD ')]
    held.sort(key=lambda runs: runs[0][0])
    assert len(held) == 2 and n > 2
    for (all_, disk, one, *_), share, sole in zip(held, (range(0, n, 2), range(1, n, 2)), ([0], [])):
        assert all_ == [list(share), [len(share), 32, 32], 'torch.float16', True]
        assert disk == [list(share), [len(share), 32, 32], 'torch.float32', True]
        assert one[0] == sole and one[1][0] == len(sole)


def test_a_broken_clip_stops_all_processes(together):
    configs, printed = together
    assert printed.count('CODE 1') == 2 and 'broken.mp4' in printed
    assert not Path(configs['broken'].run_dir, 'evaluation.json').exists()


def test_processes_leave_the_same_clip_out(together):
    whole, rest = (stored(together[0][name]) for name in ('all', 'dropped'))
    assert (rest['left_out'], len(rest['left_out_videos'])) == (1, 1) and 'broken.mp4' in rest['left_out_videos'][0]
    assert (rest['num_videos'], rest['num_texts']) == (whole['num_videos'], whole['num_texts'])
    means = [name for name in whole if 'mean' in name]
    assert [rest[name] for name in means] == pytest.approx([whole[name] for name in means])


def test_an_evaluation_is_not_repeated(clips, trained, tmp_path, monkeypatch):
    config = small(clips, trained, tmp_path)
    found = zero_shot(config)
    assert found['num_videos'] * 4 == found['num_texts'] and found['left_out'] == 0 and found['k_test'] == 5
    assert json.loads((tmp_path/'config.json').read_text())['text']['max_length'] == 16
    monkeypatch.setattr(retrieval, 'rank_gallery', lambda *_: pytest.fail('evaluated again'))
    assert zero_shot(override(config, eval_batch_size=2, on_disk=True)) == found


OTHERS = {
    'protocol.k_test': dict(k_test=2),
    'protocol.num_frames': dict(num_frames=3),
    'protocol.max_length': dict(max_length=9),
    'protocol.precision': dict(precision='bf16'),
    'texts': dict(captions='other.json'),
    'videos': dict(num_videos=3)}

@pytest.fixture(scope='module')
def evaluated(clips, trained, tmp_path_factory):
    captions = json.loads((clips/'captions_test.json').read_text())
    captions[0]['caption'] = ['something else', *captions[0]['caption'][1:]]
    (clips/'other.json').write_text(json.dumps(captions))
    config = small(clips, trained, tmp_path_factory.mktemp('evaluated'))
    return config, zero_shot(config)

@pytest.mark.parametrize('name', OTHERS)
def test_another_evaluation_is_refused_with_what_differs(name, evaluated):
    "Never answered with the old figures, and the old figures stay."
    config, found = evaluated
    with pytest.raises(ValueError, match=f'holds another evaluation.*{name}: '):
        zero_shot(override(config, OTHERS[name]))
    assert stored(config) == found and zero_shot(config) == found


@pytest.mark.parametrize('change', [dict(eps=1e-6), dict(num_heads=4)])
def test_another_network_of_the_same_weights_is_refused(change, evaluated, trained, tmp_path):
    "The fingerprint holds the whole configuration: 4 heads instead of 2 have the same tensors."
    shutil.copytree(trained, tmp_path/'other')
    about = json.loads((tmp_path/'other/model.json').read_text())
    if 'num_heads' in change: about['student']['num_heads'] = change['num_heads']
    else: about['text']['layer_norm_eps'] = change['eps']
    (tmp_path/'other/model.json').write_text(json.dumps(about))
    with pytest.raises(ValueError, match='holds another evaluation.*model'):
        zero_shot(override(evaluated[0], init=str(tmp_path/'other')))


def test_another_copy_of_the_clips_is_refused(evaluated, clips, tmp_path):
    "The same list, another file under one of its names."
    shutil.copytree(clips, tmp_path/'copy')
    captions = json.loads((clips/'captions_test.json').read_text())
    assert zero_shot(override(evaluated[0], data_root=str(tmp_path/'copy'))) == evaluated[1]
    first, second = (captions[i]['video'] for i in (0, 1))
    with open(tmp_path/'copy'/first, 'ab') as file: file.write((clips/second).read_bytes())
    with pytest.raises(ValueError, match='holds another evaluation.*videos: '):
        zero_shot(override(evaluated[0], data_root=str(tmp_path/'copy')))


def test_a_training_runs_config_is_not_overwritten(clips, trained, tmp_path):
    (tmp_path/'config.json').write_text('{"loop": {"epochs": 3}}')
    zero_shot(small(clips, trained, tmp_path))
    assert (tmp_path/'config.json').read_text() == '{"loop": {"epochs": 3}}'


def test_the_network_sees_the_middle_frames_and_the_whole_picture(clips, model):
    gallery = read_gallery('json', clips/'captions_test.json', clips)
    dataset = gallery_dataset(gallery.manifest, 2, 64)
    index = index_videos(model, gallery.manifest)
    shown = normalize_video(torch.stack([dataset[0, i]['video'] for i in (0, 3)]))
    with torch.no_grad(): encoded = model.encode_video(shown)
    assert_close(index.embeddings[[0, 3]], model.embed_video(encoded.pooled).detach(), rtol=1e-4, atol=1e-5)
    assert_close(index.tokens[[0, 3]], encoded.tokens.half(), rtol=1e-3, atol=1e-3)


def test_missing_videos(clips, trained, tmp_path):
    captions = json.loads((clips/'captions_test.json').read_text())
    (clips/'lost.json').write_text(json.dumps([dict(video='lost.mp4', caption='gone'), *captions]))
    config = small(clips, trained, tmp_path, captions='lost.json')
    with pytest.raises(FileNotFoundError, match='lost.mp4'): zero_shot(config)
    found = zero_shot(override(config, missing='drop'))
    assert (found['left_out'], found['num_videos']) == (1, len(captions))
    assert found['r_mean'] == zero_shot(small(clips, trained, tmp_path/'whole'))['r_mean']


def wrong_student(folder):
    sizes = dict(image_size=64, num_frames=2, embed_dim=32, depth=2, num_heads=2)
    save_model(Student(1, 8, **sizes), folder)

def wrong_words(folder): save_model(Multimodal(SIZES['student'], SIZES['text'] | dict(vocab_size=50), 16), folder)

def trained_with(record, folder, inputs=None):
    save_model(Multimodal(**SIZES, embed_dim=16), folder)
    (folder/'config.json').write_text(json.dumps(record))
    if inputs: (folder/'inputs.json').write_text(json.dumps(inputs))

WRONG = {
    'a student': (wrong_student, 'a Student, which knows no texts'),
    'nothing': (lambda folder: None, 'a run directory or a published file'),
    'fewer words': (wrong_words, '30522 tokens, the model .* 50'),
    'sep': (lambda folder: trained_with(dict(text=dict(name='minilm', sep=True)), folder), 'sep False, but'),
    'an old run with sep': (lambda folder: trained_with(dict(text='minilm', sep=True), folder), 'sep False, but'),
    'name': (lambda folder: trained_with(dict(text=dict(name='bert')), folder), "trained with 'bert'"),
    'vocabulary': (lambda folder: trained_with({}, folder, dict(vocabulary='abc')), 'another vocabulary')}

@pytest.mark.parametrize('name', WRONG)
def test_wrong_starts_are_refused_before_anything_is_encoded(name, clips, tmp_path, monkeypatch):
    "In the dry run, too."
    make, complaint = WRONG[name]
    make(tmp_path/'start')
    monkeypatch.setattr(retrieval, 'rank_gallery', lambda *_: pytest.fail('encoded'))
    config = small(clips, tmp_path/'start', tmp_path/'run')
    with pytest.raises((ValueError, FileNotFoundError), match=complaint): zero_shot(config)
    report = retrieval.dry_run(config)
    assert 'The run would be refused' in report and not (tmp_path/'run').exists()


def test_a_protocol_that_differs_from_the_trainings_is_said(clips, trained, tmp_path, caplog):
    config = small(clips, trained, tmp_path, num_frames=3, image_size=96)
    said = f'{trained}: evaluated otherwise than it was trained: num_frames: 2 -> 3; image_size: 64 -> 96'
    assert said in retrieval.dry_run(config)
    zero_shot(config)
    assert said in caplog.text


def test_a_folder_and_a_file_of_one_model_give_the_same_scores(clips, trained, tmp_path):
    "At another image size, too."
    save_published(load_model(trained), tmp_path/'model.pth')
    runs = [small(clips, init, tmp_path/name, image_size=96) for name, init in
            (('folder', trained), ('file', tmp_path/'model.pth'))]
    for config in runs: zero_shot(config)
    folder, file = (load_file(Path(config.run_dir)/'scores.safetensors') for config in runs)
    assert all(torch.equal(folder[name], file[name]) for name in folder)


def test_an_evaluation_has_no_learning_rate(capsys):
    with pytest.raises(UsageError): retrieval.main(['--lr', '1e-3'])
    assert "no option 'lr'" in capsys.readouterr().err


@pytest.mark.parametrize('changes, complaint', [
    (dict(k_test=0), 'k_test'), (dict(trim=0), 'trim'), (dict(num_videos=0), 'num_videos'),
    (dict(max_length=1), 'max_length'),
    (dict(annotations='msrvt'), "did you mean 'msrvtt'"), (dict(missing='keep'), 'missing'),
    (dict(match_batch_size=0), 'match_batch_size'), (dict(num_frames=0), 'num_frames')])
def test_options_out_of_range_are_refused_by_name(changes, complaint):
    with pytest.raises(ValueError, match=complaint): override(PRESETS['nano_emoji'], changes)


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_and_loader_processes(precision, clips, trained, tmp_path):
    kinds = ('half', precision, 2), ('full', 'fp32', 0)
    runs = [small(clips, trained, tmp_path/name, precision=kind, num_workers=workers) for name, kind, workers in kinds]
    for config in runs: zero_shot(config)
    half, full = (load_file(Path(config.run_dir)/'scores.safetensors')['dual'] for config in runs)
    assert_close(half, full, rtol=0, atol=.05)
    assert not torch.equal(half, full)


def test_more_frames_than_in_training(clips, trained, tmp_path):
    found = zero_shot(small(clips, trained, tmp_path, num_frames=3))
    assert found['depends_on']['protocol']['num_frames'] == 3 and found['num_videos'] > 0


def test_search_agrees_with_the_scores(clips, model):
    gallery, tokenizer = read_gallery('json', clips/'captions_test.json', clips), Tokenizer()
    config = override(PLAIN, k_test=4)
    ids = [tokenizer.encode(text, 32) for text in gallery.texts]
    scores, index = score_videos(model, gallery.manifest, ids, config), index_videos(model, gallery.manifest, config)
    for t in (0, 7):
        hits = search(index, model, tokenizer, gallery.texts[t], k=4, num_candidates=4)
        best = scores['t2v'][t].sort(descending=True)
        assert [hit.index for hit in hits] == best.indices[:4].tolist()
        assert_close([hit.score for hit in hits], best.values[:4].tolist(), rtol=1e-4, atol=1e-4)
        by_cosine = search(index, model, tokenizer, gallery.texts[t], k=2, rerank=False)
        assert [hit.index for hit in by_cosine] == scores['dual'][:, t].topk(2).indices.tolist()
        assert hits[0].path == gallery.manifest.name(hits[0].index)


def test_search_never_finds_what_could_not_be_decoded(clips, model):
    captions = json.loads((clips/'captions_test.json').read_text())
    (clips/'damaged.mp4').write_bytes(b'no video')
    (clips/'damaged.json').write_text(json.dumps([dict(video='damaged.mp4', caption='nothing'), *captions]))
    gallery, config = read_gallery('json', clips/'damaged.json', clips), override(PLAIN, bad_clip_limit=.5)
    index = index_videos(model, gallery.manifest, config, missing='drop')
    for rerank in (False, True):
        hits = search(index, model, Tokenizer(), 'nothing', k=100, rerank=rerank)
        assert sorted(hit.index for hit in hits) == [*range(1, len(gallery.manifest))]
