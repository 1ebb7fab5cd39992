"The SLURM launcher and a real experiment on it: what can happen to a job, row by row of the table in `nbs/14_launchers.ipynb`."
import json, signal, subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster import state, wait_until
from umt.experiments import runs as experiments
from umt.experiments.jobs import Job, prepare
from umt.experiments.launchers import follow, make_launcher
from umt.experiments.slurm import cancel, queue, queued_as

pytestmark = pytest.mark.timeout(900)
OPTIONS = dict(minutes=30, seconds=1.)


def launcher(tasks=1): return make_launcher('slurm', tasks_per_node=tasks, **OPTIONS)
def steps(folder): return len((folder/'metrics.jsonl').read_text().splitlines()) if (folder/'metrics.jsonl').exists() else 0
def starts(folder): return [start['start_step'] for start in json.loads((folder/'environment.json').read_text())]


class Interrupted(Exception): pass


def interrupted_when(condition):
    "For `follow`: ends the notebook's waiting as an interrupt would."
    def say(line):
        if condition(): raise Interrupted
    return say


@pytest.fixture
def toy(tmp_path):
    "Prepares a run of `slow_run`, which writes what it meets."
    def make(name, **config): return Job(name, (prepare(tmp_path/'runs'/name, 'slow_run', config),))
    return make


def test_requeued_experiment_ends_with_the_same_weights(slurm, tmp_path):
    "Two tasks (gloo), requeued from outside, then told that its time is over: the weights of an undisturbed run in two local processes."
    quick = experiments.preset('quick', tmp_path, emoji=str(tmp_path/'data'))
    rows = {'semantic': {'action': experiments.vary(quick, epochs=20, log_every=1, checkpoint_every=1000)['action']}}
    straight = experiments.run(rows, 1, tmp_path/'local', 'local', processes=2)
    straight.check()
    planned = experiments.plan(rows, 1, tmp_path/'slurm')
    job, (pretrained, task) = planned.jobs[0], planned.folders['semantic', 'action', 0]
    with pytest.raises(Interrupted): follow([job], launcher(2), every=.5, say=interrupted_when(lambda: steps(pretrained) >= 10))
    name = queued_as(job)
    subprocess.run(['scontrol', 'requeue', name], check=True)
    wait_until(lambda: steps(pretrained) >= 10 and len(starts(pretrained)) == 2 and steps(pretrained) >= starts(pretrained)[1] + 10, 120)
    subprocess.run(['scancel', '--signal=USR2', name], check=True)
    wait_until(lambda: len(starts(pretrained)) == 3, 120)
    follow([job], launcher(2))
    planned.check()
    assert queued_as(job) == name, 'submitted a second time'
    first, second, third = starts(pretrained)
    assert 0 == first < second < third < 80
    for a, b in zip(straight.folders['semantic', 'action', 0], (pretrained, task)):
        assert a.name == b.name
        a, b = load_file(a/'model.safetensors'), load_file(b/'model.safetensors')
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_notebook_finds_its_jobs(slurm, toy):
    jobs = [toy('a', seconds=6), toy('b', seconds=6)]
    running = lambda: all((job.home/'said').exists() for job in jobs)
    with pytest.raises(Interrupted): follow(jobs, make_launcher('slurm', seconds=.5), every=.2, say=interrupted_when(running))
    names = [queued_as(job) for job in jobs]
    assert len({name.split('_')[0] for name in names}) == 1, 'one array'
    assert follow(jobs, launcher()) == {}
    assert [queued_as(job) for job in jobs] == names and [(job.home/'said').read_text() for job in jobs] == ['start\nend\n'] * 2


def test_what_another_notebook_left_over_is_submitted(slurm, toy, tmp_path):
    "Two tables share a pre-training, and the job in the queue does not know the second one's task."
    first = toy('shared', seconds=3)
    with pytest.raises(Interrupted): follow([first], make_launcher('slurm', seconds=.5), every=.2, say=interrupted_when(lambda: (first.home/'said').exists()))
    both = Job('both', (first.home, *toy('task', seconds=0).folders))
    assert follow([both], launcher()) == {}
    assert [(folder/'said').read_text() for folder in both.folders] == ['start\nend\n'] * 2


def test_cancelled_jobs_have_saved_and_are_submitted_again(slurm, toy):
    job = toy('c', seconds=60)
    with pytest.raises(Interrupted): follow([job], make_launcher('slurm', seconds=.5), every=.2, say=interrupted_when(lambda: (job.home/'said').exists()))
    first = queued_as(job)
    cancel([job])
    wait_until(lambda: (found := queue()) is not None and first not in found, 60)
    assert (job.home/'said').read_text() == 'start\nsaved\n'
    prepare(job.home, 'slow_run', {'seconds': 0})
    assert follow([job], launcher()) == {} and queued_as(job) != first


def test_a_failed_run_stops_nothing_and_is_shown(slurm, toy):
    said = []
    failed = follow([toy('bad', seconds=0, fail=True), toy('good', seconds=0)], launcher(), say=said.append)
    assert [folder.name for folder in failed] == ['bad'] and 'ValueError: as asked' in failed[next(iter(failed))]
    assert any('bad: NOT DONE' in line for line in said) and (toy('good').home/'done.json').exists()
