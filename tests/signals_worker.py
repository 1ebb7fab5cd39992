"""A loop over a loader with two workers, as a training run has one. Tests start it in a process of its own:
`python signals_worker.py CASE`. It prints the process ids of its workers, then does what the case says, or waits for a
signal. The workers never run out of samples."""
import sys
import time

from torch.utils.data import DataLoader, Dataset

from umt.core.signals import Preempted, ending_workers, stop_signals, worker_init

CASE = sys.argv[1]
ERRORS = ('error', 'error without the context', 'stuck workers', 'persistent workers', 'lock left by an interrupt',
          'lock of a dead worker')

class Samples(Dataset):
    def __len__(self): return 10**6
    def __getitem__(self, index):
        if CASE == 'error in a worker' and index == 20: raise LookupError('sample 20 is bad')
        if CASE in ('stuck workers', 'workers never answer') and index > 20: time.sleep(600)
        time.sleep(.002)
        return index

def loop(batches, stop):
    for step, _ in enumerate(batches):
        if step == 3:
            print('workers', *(worker.pid for worker in batches._workers), flush=True)
            if CASE == 'lock left by an interrupt': batches._index_queues[1]._notempty.acquire()
            if CASE == 'lock of a dead worker': batches._workers_done_event._cond.acquire()
            if CASE in ERRORS: 1 / 0
            if CASE == 'sys.exit': sys.exit(3)
            if CASE == 'slow step': time.sleep(600)
        if step > 3 and stop:
            for _ in range(10): next(batches)  # the step that was under way is finished: the workers still deliver
            print('saved', flush=True)
            raise Preempted(stop)

loader = DataLoader(Samples(), batch_size=4, num_workers=2, worker_init_fn=worker_init,
                    persistent_workers=CASE == 'persistent workers')
with stop_signals() as stop:
    batches = iter(loader)
    if CASE == 'error without the context':
        loop(batches, stop)
    elif CASE == 'persistent workers':
        with ending_workers(loader): loop(batches, stop)
    else:
        with ending_workers(batches): loop(batches, stop)
