"""A tiny training job. Tests call `run` themselves, or start this file (plainly or with torchrun) with a JSON list of
calls: `python training_worker.py '[{"folder": "/tmp/x", "kill_at": 7}, ...]'`. Each writes `outcome-<rank>.json`."""
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from umt.core import files
from umt.core.config import override
from umt.core.seeds import sample_key
from umt.core.signals import Preempted
from umt.data.media import TooManyBadClips
from umt.training.loop import train
from umt.training.session import TrainConfig
from umt.training.step import NonfiniteError

CONFIG = override(
    TrainConfig(), epochs=3, batch_size=16, micro_batch_size=8, lr=.16, min_lr=.01, warmup_epochs=1, clip_grad=1.,
    log_every=4, checkpoint_every=3)

class Toy(Dataset):
    "80 noisy samples: 5 steps an epoch, 15 in all. Those in `poison` are NaN, those in `broken` reported as failures."
    def __init__(self, poison=(), broken=()):
        self.poison, self.broken = poison, broken

    def __len__(self): return 80

    def __getitem__(self, position):
        epoch, index = position
        x = torch.randn(8, generator=torch.Generator().manual_seed(sample_key(0, epoch, index, 'frames')))
        if index in self.poison: x[:] = torch.nan
        failures = [(index, f'{index}.mp4', 'broken')] if index in self.broken else []
        return {'x': x, 'y': x.sum(), 'sample_id': index, 'failures': failures}

class Net(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(dropout)) for _ in range(2))
        self.head = nn.Linear(8, 1)
    def forward(self, x):
        for block in self.blocks: x = x + block(x)
        return self.head(x)[:, 0]

def run(folder, dropout=.1, kill_at=None, kill_on_sync=None, term_at=None, term_rank=0, term_group=False, raise_at=None,
        poison=(), broken=(), **changes):
    """One call of `train`; `*_at` counts micro-batches of this process from 0: in the middle of a step where it is odd.
    At `kill_at` the process waits until there is a checkpoint, and dies."""
    calls = iter(range(10**6))
    def loss_fn(model, batch):
        call, rank = next(calls), int(os.environ.get('RANK', 0))
        if call == kill_at:
            while not any(Path(folder, 'checkpoints').glob('step-*')): time.sleep(.01)  # written in the background
            os.kill(os.getpid(), signal.SIGKILL)
        if call == term_at and rank == term_rank: os.kill(0 if term_group else os.getpid(), signal.SIGTERM)
        if call == raise_at: raise InterruptedError
        error = model(batch['x']).float() - batch['y']
        return error.square().mean(), {'bias': error.mean()}
    def deadly_sync(path, sync=files.sync_to_disk):
        if path.name == kill_on_sync: os.kill(os.getpid(), signal.SIGKILL)
        sync(path)
    torch.manual_seed(0)
    model, keep = Net(dropout), files.sync_to_disk
    files.sync_to_disk = deadly_sync
    try: result = train(override(CONFIG, run_dir=str(folder), **changes), model, Toy(poison, broken), loss_fn)
    finally: files.sync_to_disk = keep
    return model, result

def outcome(call):
    "What a call comes to: its result, the message of an error that all processes share, or the code of a stop."
    try: return run(**call)[1]
    except (NonfiniteError, TooManyBadClips) as error: return str(error).split(' (all of them in')[0].split(':\n')[0]
    except Preempted as stop: return stop.code

if __name__ == '__main__':
    for call in json.loads(sys.argv[1]):
        again = call.pop('again', None)  # changes for a second call after a stop
        outcomes = [outcome(call)]
        if outcomes == [75]:
            if again is None: sys.exit(75)
            outcomes.append(outcome({**call, 'term_at': None, **again}))
        Path(call['folder'], f'outcome-{os.environ.get("RANK", 0)}.json').write_text(json.dumps(outcomes))
