"What the tests' jobs run: submitit finds these functions by name, the module lies on PYTHONPATH."
import os, signal, time
from pathlib import Path

def place(addend):
    return int(os.environ['SLURM_PROCID']) + addend, os.environ['SLURM_JOB_ID']

def all_ranks():
    "Every process's rank, gathered with gloo."
    import submitit, torch
    import torch.distributed as dist
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    dist.init_process_group('gloo')
    ranks = [torch.empty(1) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, torch.tensor([float(os.environ['RANK'])]))
    dist.destroy_process_group()
    return [int(rank) for rank in ranks]

def save_slowly(folder):
    "The first run waits for SIGTERM and needs three more seconds, the second one returns at once; both keep a log."
    def log(event):
        with Path(folder, f'rank-{os.environ["SLURM_PROCID"]}').open('a') as file: file.write(event + '\n')
    received = []
    signal.signal(signal.SIGTERM, lambda *_: (received.append(1), log('SIGTERM')))
    run = int(os.environ.get('SLURM_RESTART_COUNT', 0))
    log(f'run {run}')
    if run: return run
    while not received: time.sleep(.05)
    time.sleep(3)
    log('saved')
    raise SystemExit(75)
