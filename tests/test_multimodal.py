"Stage 2's losses and gradients in several processes against one, and through the training loop."
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent))
from multimodal_worker import STUDENT, TEXT, WEIGHTS, compute, shares
from umt.models.masking import visible_from_mask
from umt.models.multimodal import Multimodal
from umt.models.objectives import mask_captions
from umt.training.loop import TrainConfig, train

WORKER = Path(__file__).with_name('multimodal_worker.py')
ONLY = lambda *names: {name: float(name in names) for name in WEIGHTS}
SAME = [0, 1, 2, 1, 5, 5, 5, 5]  # the second half of the batch has no negatives at all
CALLS = dict(
    ddp={},
    fsdp=dict(wrap='fsdp'),
    image=dict(frames=1),
    same=dict(sample_id=SAME),
    downstream=dict(weights=ONLY('vtc', 'vtm'), masked=False),
    vtc=dict(weights=ONLY('vtc')),
    local=dict(weights=ONLY('vtc'), gradient='local'),
    weighted=dict(weights=dict(uta=.5, vtc=2., vtm=1., mlm=.25)),
    uta=dict(weights=ONLY('uta')),
    mlm=dict(weights=ONLY('mlm')),
    own_means=dict(weights=ONLY('vtm', 'mlm'), gradient='local', sample_id=SAME),
    bf16=dict(bf16=True),
    fsdp_bf16=dict(bf16=True, wrap='fsdp_bf16'),
)

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "All calls, in one launch of two gloo processes."
    folder = tmp_path_factory.mktemp('two')
    calls = [{'name': name, **call} for name, call in CALLS.items()]
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    done = subprocess.run(
        [*launch, str(WORKER), str(folder), json.dumps(calls)], env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True,
        timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    assert done.returncode == 0, done.stdout
    return {name: load_file(folder / f'{name}.safetensors') for name in CALLS}

def one_process(name):
    losses, gradients = compute(**{k: v for k, v in CALLS[name].items() if k != 'wrap'})
    return {f'loss.{k}': v for k, v in losses.items()} | {f'grad.{k}': v for k, v in gradients.items()}

@pytest.mark.parametrize('name', [name for name in CALLS if name not in ('local', 'own_means', 'bf16', 'fsdp_bf16')])
def test_two_processes_are_one(two_processes, name):
    "Every loss, and the gradient of every parameter, as with the whole batch in one process."
    one, two = one_process(name), two_processes[name]
    assert one.keys() == two.keys()
    losses = {k.removeprefix('loss.') for k in one if k.startswith('loss.')}
    assert losses == {k for k, w in CALLS[name].get('weights', WEIGHTS).items() if w}
    for key in one: torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=2e-6, msg=lambda m: f'{key}: {m}')
    nonzero = sum(one[k].norm() > 1e-4 for k in one if k.startswith('grad.'))
    if name == 'ddp': assert nonzero > 100  # nothing is equal because it is zero

@pytest.mark.parametrize('name', ['bf16', 'fsdp_bf16'])
def test_half_precision(two_processes, name):
    "Losses and gradients arrive in float32, and near those of float32 all the way."
    full, half = two_processes['ddp'], two_processes[name]
    assert full.keys() == half.keys() and {v.dtype for v in half.values()} == {torch.float32}
    for loss in WEIGHTS:
        key = f'loss.{loss}'
        torch.testing.assert_close(half[key], full[key], rtol=.03, atol=0, msg=lambda m: f'{loss}: {m}')
    for name in ('video_proj.weight', 'text_proj.weight', 'temperature', 'student.encoder.blocks.0.mlp.fc1.weight'):
        key = f'grad.{name}'
        atol = .1 * full[key].abs().max().item()
        torch.testing.assert_close(half[key], full[key], rtol=0, atol=atol, msg=lambda m: f'{key}: {m}')

def test_local_gradient_is_the_references(two_processes):
    "The same loss; 1/W of the gradient for the encoders, all of it for the temperature."
    exact, local = two_processes['vtc'], two_processes['local']
    torch.testing.assert_close(local['loss.vtc'], exact['loss.vtc'])
    for key in exact.keys() - {'loss.vtc'}:
        expected = exact[key] * (1. if key == 'grad.temperature' else .5)
        torch.testing.assert_close(local[key], expected, rtol=1e-4, atol=1e-7, msg=lambda m: f'{key}: {m}')

def test_local_means_are_each_processs_own(two_processes):
    "In 'local' mode a process averages over its own words and pairs: the mean of means is not the mean."
    one, two = one_process('own_means'), two_processes['own_means']
    torch.manual_seed(0)
    model = Multimodal(STUDENT, TEXT, embed_dim=8, temperature=.2).train()
    halves = [model(batch, ONLY('vtm', 'mlm'), visible) for batch, visible, _ in shares(2, SAME, 2)]
    for name in ('vtm', 'mlm'):
        torch.testing.assert_close(two[f'loss.{name}'], (halves[0][name] + halves[1][name]).detach() / 2)
        assert (two[f'loss.{name}'] - one[f'loss.{name}']).abs() > 1e-3
    assert halves[1]['vtm'] == 0

def test_nothing_to_guess_or_to_match():
    "A batch without a masked word, or without a negative, gives zeros that still have a gradient."
    torch.manual_seed(0)
    model = Multimodal(STUDENT, TEXT, embed_dim=8)
    batch, visible, _ = shares(2, [3] * 8, 1)[0]
    batch |= {name: batch[name][:0] for name in ('mlm_positions', 'mlm_labels')}
    batch['mlm_ids'] = batch['input_ids']
    losses = model(batch, ONLY('vtm', 'mlm'), visible)
    sum(losses.values()).backward()
    assert losses['vtm'] == losses['mlm'] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.match_head.weight.grad is not None

class Pairs(Dataset):
    "The eight pairs, twice, each with its own words masked."
    def __len__(self): return 16
    def __getitem__(self, position):
        batch, visible, target = shares(2, list(range(8)), 8)[position[1] % 8]
        batch = {name: batch[name][0] for name in ('video', 'input_ids', 'attention_mask', 'sample_id', 'key')}
        return batch | dict(mask=visible.mask[0], target=target[:, 0])

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_training_loop(tmp_path, precision):
    "The project's one loop trains, finishes and gives back this model, its tied weights still tied."
    def loss_fn(model, batch):
        visible, target = visible_from_mask(batch['mask'], 4), batch['target'].transpose(0, 1)
        losses = model(mask_captions(batch, TEXT['vocab_size'], cls_id=1, mask_id=3), WEIGHTS, visible, target)
        return sum(losses.values()), losses
    def fresh():
        torch.manual_seed(0)
        return Multimodal(STUDENT, TEXT, embed_dim=8)
    config = TrainConfig(
        run_dir=str(tmp_path), loop=dict(batch_size=8, epochs=4, log_every=1, clip_grad=1.), optimizer=dict(lr=.1),
        device=dict(precision=precision))
    model, again = fresh(), fresh()
    result = train(config, model, Pairs(), loss_fn)
    records = [json.loads(line) for line in open(tmp_path / 'metrics.jsonl')]
    assert [r['loss'] for r in records][-1] < records[0]['loss'] - .5
    assert abs(result['loss'] - sum(result[name] for name in WEIGHTS)) < 1e-3
    assert train(config, again, Pairs(), loss_fn) == result
    for m in (model, again): assert m.text.cls.predictions.decoder.weight is m.text.embeddings.word_embeddings.weight
    for name, p in again.named_parameters(): torch.testing.assert_close(p, model.get_parameter(name), rtol=0, atol=0)
