"""Losses and gradients of a tiny multimodal model. Tests call `compute` themselves, or start this file with torchrun
and a JSON list of its arguments: every process takes its share of the batch, and process 0 writes `<name>.safetensors`
into `folder`.
`torchrun --nproc-per-node=2 multimodal_worker.py folder '[{"name": "ddp", ...}, ...]'`"""
import json, sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from umt.models.masking import random_mask
from umt.models.multimodal import Multimodal, freeze_unused
from umt.models.objectives import mask_captions
from umt.training.distributed import shard

STUDENT = dict(
    image_size=32, patch_size=16, num_frames=2, embed_dim=16, depth=3, num_heads=2, aligned_layers=2, target_dim=12)
TEXT = dict(
    vision_dim=16, fusion_layer=2, vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
WEIGHTS = dict(uta=1., vtc=1., vtm=1., mlm=1.)

def global_batch(frames, sample_id):
    "The batch of all processes: eight pairs, their masks and targets."
    generator = torch.Generator().manual_seed(1)
    key = torch.randint(2**62, (8,), generator=generator)
    length = torch.tensor([9, 3, 2, 4, 9, 8, 9, 7])  # the halves differ in how many words there are to mask
    attention_mask = (torch.arange(9) < length[:, None]).long()
    input_ids = torch.randint(5, 50, (8, 9), generator=generator)
    input_ids[:, 0] = 1
    visible = random_mask(frames, 4, .5, key)
    target = F.normalize(torch.randn(2, 8, 2 * frames, 12, generator=generator), dim=-1)
    video, sample_id = torch.randn(8, 3, frames, 32, 32, generator=generator), torch.tensor(sample_id)
    batch = dict(video=video, input_ids=input_ids * attention_mask, attention_mask=attention_mask)
    batch |= dict(sample_id=sample_id, key=key)
    return batch, visible, target

def shares(frames, sample_id, number):
    "That batch in `number` parts, each with its words masked as its collate function would: (batch, visible, target)."
    batch, visible, target = global_batch(frames, sample_id)
    parts = [{name: values.chunk(number)[i] for name, values in batch.items()} for i in range(number)]
    parts = [mask_captions(part, TEXT['vocab_size'], cls_id=1, mask_id=3) for part in parts]
    split = [type(visible)(*pair) for pair in zip(*(x.chunk(number) for x in visible))]
    return [*zip(parts, split, target.chunk(number, 1))]

def compute(wrap=lambda model: model, rank=0, world=1, frames=2, sample_id=(0, 1, 2, 1, 4, 5, 0, 7), weights=WEIGHTS,
            gradient='exact', group_size=4, masked=True, bf16=False):
    "Loss values and gradients on one share of the batch; gradients are what an optimizer would see."
    torch.manual_seed(0)
    plain = Multimodal(STUDENT, TEXT, embed_dim=8, temperature=.2).train()
    freeze_unused(plain, weights)
    batch, visible, target = shares(frames, sample_id, world)[rank]
    model = wrap(plain)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        group_size = group_size if world == 1 else None
        losses = model(batch, weights, visible if masked else None, target, gradient, group_size)
    sum(weights[name] * loss for name, loss in losses.items()).backward()
    full = lambda g: g.full_tensor() if hasattr(g, 'full_tensor') else g
    gradients = {name: full(p.grad) for name, p in plain.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients

if __name__ == '__main__':
    folder, calls = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group('gloo')
    wraps = dict(
        ddp=lambda model: DistributedDataParallel(model, broadcast_buffers=False),
        fsdp=lambda model: shard(model, torch.float32),
        fsdp_bf16=lambda model: shard(model, torch.bfloat16))
    for call in calls:
        name, wrap = call.pop('name'), wraps[call.pop('wrap', 'ddp')]
        losses, gradients = compute(wrap, dist.get_rank(), dist.get_world_size(), **call)
        for loss in losses.values():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        if dist.get_rank() == 0:
            result = {f'loss.{k}': v for k, v in losses.items()}
            result |= {f'grad.{k}': v.contiguous() for k, v in gradients.items()}
            save_file(result, folder / f'{name}.safetensors')
    dist.destroy_process_group()
