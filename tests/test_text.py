"The language side: recorded vectors of the reference, its tokenisation, and what a training run needs of both"
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference import CLOSE, folders, read_config, read_io
from torch.testing import assert_close
from torch.utils.data import DataLoader

from umt.models.weights import read_state_dict
from umt.data.captions import clean_text
from umt.models.text import TextModel, Tokenizer, load_text

STAGE2 = 'stage2_config.json', 'stage2.pth', 'stage2_io.safetensors'


@pytest.fixture(scope='module', params=folders(*STAGE2), ids=lambda folder: f'{folder.parent.name}-{folder.name}')
def recorded(request):
    "The text model of the reference's Stage 2, loaded under its own names, the file and the recorded tensors"
    folder = request.param
    config, state = read_config(folder, 'stage2_config.json'), read_state_dict(folder/'stage2.pth')
    text = config['text']
    sizes = {name: text[name] for name in ('hidden_size', 'vocab_size', 'max_position_embeddings')}
    sizes |= dict(num_hidden_layers=text['layers'], num_attention_heads=text['heads'])
    sizes |= dict(intermediate_size=4 * text['hidden_size'])
    model = TextModel(config['vision']['width'], text['fusion_layer'], **sizes).eval()
    plain = lambda name: name.removeprefix('text_encoder.').removeprefix('bert.')
    weights = {plain(name): tensor for name, tensor in state.items() if name.startswith('text_encoder.')}
    weights.pop('embeddings.position_ids')
    model.load_state_dict(weights)
    return model.requires_grad_(False), state, read_io(folder, 'stage2')


def test_text_encoder(recorded):
    model, _, io = recorded
    hidden = model.encode(io['input_ids'], io['attention_mask'])
    assert_close(hidden, io['text_tokens'], **CLOSE)
    assert_close(hidden[:, 0], io['text_pooled'], **CLOSE)
    assert (io['attention_mask'] == 0).any(), 'the vectors hold padding'


def test_matching(recorded):
    "Every text beside every masked video, in groups that share a video and as single pairs"
    model, state, io = recorded
    videos, n = io['video_visible_tokens'], len(io['input_ids'])
    texts, mask = io['text_tokens'].repeat(n, 1, 1), io['attention_mask'].repeat(n, 1)
    for tokens in (videos, videos.repeat_interleave(n, 0)):
        logits = F.linear(model.fuse(texts, mask, tokens)[:, 0], state['itm_head.weight'], state['itm_head.bias'])
        assert_close(logits.view(n, n, 2), io['match_logits'], **CLOSE)


def test_masked_words(recorded):
    model, _, io = recorded
    mask, videos = io['attention_mask'], io['video_visible_tokens']
    hidden = model.fuse(model.encode(io['mlm_input_ids'], mask), mask, videos)
    assert_close(model.predict_words(hidden.flatten(0, 1)).view_as(io['mlm_logits']), io['mlm_logits'], **CLOSE)
    chosen = io['mlm_labels'] != -100
    loss = F.cross_entropy(model.predict_words(hidden[chosen]), io['mlm_labels'][chosen])
    assert_close(loss[None], io['mlm_loss'], **CLOSE)


def test_every_tensor_of_the_reference_has_its_place(recorded):
    model, state, _ = recorded
    prefix = lambda name: 'text_encoder.' if name.startswith('cls.') else 'text_encoder.bert.'
    ours = {prefix(name) + name: tensor.shape for name, tensor in model.state_dict().items()}
    theirs = {k: v.shape for k, v in state.items() if k.startswith('text_encoder.') and not k.endswith('position_ids')}
    assert ours == theirs


@pytest.mark.parametrize('text, sep, max_length, words', [
    ('cat', False, 5, '[CLS] cat'),
    ('one two three four five six', False, 5, '[CLS] one two three four'),
    ('cat [SEP]', False, 5, '[CLS] cat [SEP]'),
    ('CAT!', True, 5, '[CLS] cat [SEP]'),
    ('one two three four five six', True, 5, '[CLS] one two three [SEP]'),
    ('A <person> hangs-gliding/flying', False, 32, '[CLS] a person hangs gliding flying'),
    ('...', False, 32, '[CLS]')])
def test_tokenizer_goldens(text, sep, max_length, words):
    tokenizer = Tokenizer(sep=sep)
    ids = tokenizer.encode(text, max_length)
    vocabulary = {i: w for w, i in tokenizer.backend.get_vocab().items()}
    assert ' '.join(vocabulary[i] for i in ids.tolist()).replace(' ##', '') == words
    padded, mask = tokenizer([text, 'one two three four five six seven'], max_length)
    assert padded.shape == mask.shape == (2, min(max_length, 8 + sep))
    assert torch.equal(padded[0], torch.cat([ids, ids.new_zeros(padded.shape[1] - len(ids))]))
    assert mask.tolist()[0] == [1]*len(ids) + [0]*(padded.shape[1] - len(ids))


@pytest.mark.parametrize('text, clean', [
    ("A <person>, it's well-known/known: 'Hi' there!", 'a person its well known known hi there'),
    ('  Two\n\n lines #tag ; ~5 * (3)  ', 'two lines tag 5 3'),
    ('café & crème', 'café & crème'), ('', '')])
def test_clean_text_goldens(text, clean): assert clean_text(text) == clean


def test_answers_are_not_cleaned():
    tokenizer = Tokenizer()
    raw, clean = (tokenizer.encode("t-shirt [SEP]", 9, clean=clean) for clean in (False, True))
    assert len(raw) == len(clean) + 1  # the hyphen


class Captions(list):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        super().__init__(['a cat', 'two dogs run'])
    def __getitem__(self, i): return self.tokenizer.encode(super().__getitem__(i), 8)


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_tokenizer_in_workers(method, capfd):
    "However a worker starts, and after the tokenizer was used for batches in the parent; no warning about threads"
    captions = Captions(Tokenizer())
    captions.tokenizer(['a cat']*50, 8)
    got = list(DataLoader(captions, batch_size=None, num_workers=1, multiprocessing_context=method))
    assert [g.tolist() for g in got] == [captions[i].tolist() for i in range(2)]
    assert 'parallelism' not in capfd.readouterr().err


def test_training_reaches_every_parameter():
    "The sum of the three uses moves all weights; in bfloat16 autocast, with recomputed layers and dropout"
    torch.manual_seed(0)
    model = load_text(vision_dim=16, checkpoint_layers=True).train()
    ids, mask = Tokenizer()(['a cat', 'two dogs run in the sand'], 8)
    with torch.autocast('cpu', torch.bfloat16):
        hidden = model.encode(ids, mask)
        fused = model.fuse(hidden, mask, torch.randn(2, 5, 16))
        words = F.cross_entropy(model.predict_words(fused[mask.bool()]).float(), ids[mask.bool()])
        loss = hidden[:, 0].float().square().mean() + fused[:, 0].float().square().mean() + words
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    unmoved = [name for name, gradient in gradients.items() if not gradient.any()]
    assert [name for name in unmoved if not name.endswith('key.bias')] == []  # a key's bias cancels in the softmax


def test_start_of_masked_words():
    "The fresh head on MiniLM's embeddings starts near a uniform guess, ln(30522) = 10.3"
    torch.manual_seed(0)
    model, tokenizer = load_text(vision_dim=16).eval(), Tokenizer()
    ids, mask = tokenizer(['a cat moves to the left', 'a pizza spins clockwise'], 8)
    with torch.no_grad():
        fused = model.fuse(model.encode(ids, mask), mask, torch.randn(2, 5, 16))
        assert abs(F.cross_entropy(model.predict_words(fused[mask.bool()]), ids[mask.bool()]) - 10.3) < .7


def test_pickled_size(): assert len(pickle.dumps(Tokenizer())) < 2_000_000
