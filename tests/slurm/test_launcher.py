"The SLURM launcher and a real experiment on it: what can happen to a job, row by row of the table in its notebook."
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cluster import wait_until
from umt.core.files import write_json
from umt.experiments import presets, runs
from umt.experiments.jobs import Job, prepare
from umt.experiments.launchers import make_launcher, run_jobs
from umt.experiments.slurm import NoAnswer, cancel, queue, queued_as

pytestmark = pytest.mark.timeout(900)
OPTIONS = dict(minutes=30, seconds=1.)


def launcher(tasks=1, **options): return make_launcher('slurm', tasks_per_node=tasks, **OPTIONS | options)


def steps(folder):
    file = folder/'metrics.jsonl'
    return len(file.read_text().splitlines()) if file.exists() else 0


def starts(folder): return [start['start_step'] for start in json.loads((folder/'environment.json').read_text())]


class Interrupted(Exception): pass


def interrupted_when(condition):
    "For `run_jobs`: ends the notebook's waiting as an interrupt would."
    def report(line):
        if condition(): raise Interrupted
    return report


def run_until(jobs, condition, tasks=1):
    "Do jobs until a condition holds, as a notebook that is then interrupted."
    with pytest.raises(Interrupted):
        run_jobs(jobs, launcher(tasks, seconds=.5), every=.2, report=interrupted_when(condition))


@pytest.fixture
def toy(tmp_path):
    "Prepares a run of `slow_run`, which writes what it meets."
    def make(name, **config): return Job(name, (prepare(tmp_path/'runs'/name, 'slow_run', config),))
    return make


def met(job): return (job.home/'said').read_text() if (job.home/'said').exists() else ''


def same_weights(a, b):
    a, b = load_file(a/'model.safetensors'), load_file(b/'model.safetensors')
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_requeued_experiment_ends_with_the_same_weights(slurm, tmp_path):
    """Two tasks (gloo), requeued from outside, then told that its time is over: the weights of an undisturbed run in
    two local processes."""
    quick = presets.preset_chains('quick', tmp_path, emoji=str(tmp_path/'data'))
    rows = {'semantic': {'action': presets.vary(quick, epochs=20, log_every=1, checkpoint_every=1000)['action']}}
    straight = runs.run(rows, 1, tmp_path/'local', 'local', processes=2)
    straight.check()
    planned = runs.plan(rows, 1, tmp_path/'slurm')
    job, (pretrained, task) = planned.jobs[0], planned.folders['semantic', 'action', 0]
    run_until([job], lambda: steps(pretrained) >= 10, tasks=2)
    name = queued_as(job)
    subprocess.run(['scontrol', 'requeue', name], check=True)
    wait_until(lambda: len(starts(pretrained)) == 2 and steps(pretrained) >= starts(pretrained)[1] + 10, 300)
    subprocess.run(['scancel', '--signal=USR2', name], check=True)
    wait_until(lambda: len(starts(pretrained)) == 3, 300)
    run_jobs([job], launcher(2))
    planned.check()
    assert queued_as(job) == name, 'submitted a second time'
    first, second, third = starts(pretrained)
    assert 0 == first < second < third < 80
    for a, b in zip(straight.folders['semantic', 'action', 0], (pretrained, task)):
        assert a.name == b.name and same_weights(a, b)


def test_a_killed_notebook_finds_its_jobs(slurm, toy):
    jobs = [toy('a', seconds=6), toy('b', seconds=6)]
    run_until(jobs, lambda: all(map(met, jobs)))
    names = [queued_as(job) for job in jobs]
    assert len({name.split('_')[0] for name in names}) == 1, 'one array'
    assert run_jobs(jobs, launcher()) == {}
    assert [queued_as(job) for job in jobs] == names and [met(job) for job in jobs] == ['start\nend\n'] * 2


def test_killed_while_submitting(slurm, toy):
    "The name of the array is noted before it is submitted; the number of the job is not there yet."
    jobs = [toy('a', seconds=6), toy('b', seconds=6)]
    run_until(jobs, lambda: all(map(met, jobs)))
    names = [queued_as(job) for job in jobs]
    for job in jobs:
        noted = json.loads((job.home/'slurm.json').read_text())
        write_json(job.home/'slurm.json', {name: noted[name] for name in ('name', 'index', 'of')})
    assert [queued_as(job, queue()) for job in jobs] == names
    assert run_jobs(jobs, launcher()) == {}
    assert [met(job) for job in jobs] == ['start\nend\n'] * 2


def test_what_another_notebook_left_over_is_submitted(slurm, toy):
    "Two tables share a pre-training, and the job in the queue does not know the second one's task."
    first = toy('shared', seconds=3)
    run_until([first], lambda: met(first))
    both = Job('both', (first.home, *toy('task', seconds=0).folders))
    assert run_jobs([both], launcher()) == {}
    assert [(folder/'said').read_text() for folder in both.folders] == ['start\nend\n'] * 2


def test_cancelled_jobs_have_saved_and_are_submitted_again(slurm, toy):
    job = toy('c', seconds=60)
    run_until([job], lambda: met(job))
    first = queued_as(job)
    cancel([job])
    wait_until(lambda: first not in queue(), 60)
    assert met(job) == 'start\nsaved\n'
    write_json(job.home/'config.json', {'seconds': 0})
    assert run_jobs([job], launcher()) == {} and queued_as(job) != first


def test_a_failed_run_stops_nothing_and_is_shown(slurm, toy):
    lines = []
    jobs = [toy('bad', seconds=0, fail=True), toy('good', seconds=0)]
    failed = run_jobs(jobs, launcher(), report=lines.append)
    assert [folder.name for folder in failed] == ['bad'] and 'ValueError: as asked' in failed[next(iter(failed))]
    assert any('bad: NOT DONE' in line for line in lines) and (jobs[1].home/'done.json').exists()


OF_A_NOTEBOOK = dict(
    SLURM_JOB_ID='1', SLURM_MEM_PER_CPU='200', SLURM_CPU_BIND='quiet,mask_cpu:1', SLURM_CPU_BIND_TYPE='mask_cpu:',
    SLURM_NTASKS='7', SLURM_NTASKS_PER_NODE='7', SLURM_GPUS='3', SLURM_TRES_PER_TASK='cpu:9', SLURM_CPUS_PER_TASK='9',
    SLURM_DISTRIBUTION='plane=4', SBATCH_TIMELIMIT='0', SBATCH_MEM_PER_CPU='1', SBATCH_EXPORT='NONE',
    SQUEUE_STATES='SUSPENDED', SQUEUE_FORMAT='%i', CUDA_VISIBLE_DEVICES='5', RANK='3')


def test_what_a_notebook_inherits_from_its_allocation_does_not_reach_the_job(slurm, toy, monkeypatch):
    for name, value in OF_A_NOTEBOOK.items(): monkeypatch.setenv(name, value)
    job = toy('inherits', seconds=0, environment=True)
    assert run_jobs([job], launcher(mem_gb=1)) == {}
    seen = json.loads((job.home/'environment').read_text())
    of_any_job = 'JOB_ID', 'NTASKS', 'NTASKS_PER_NODE', 'CPUS_PER_TASK', 'DISTRIBUTION', 'CPU_BIND', 'CPU_BIND_TYPE'
    set_by_slurm = {f'SLURM_{name}' for name in of_any_job}
    assert not (set(OF_A_NOTEBOOK) - set_by_slurm) & set(seen), 'a variable of the notebook'
    assert not [name for name in OF_A_NOTEBOOK if seen.get(name) == OF_A_NOTEBOOK[name]]
    assert seen['SLURM_NTASKS'] == '1' and seen['SLURM_CPUS_PER_TASK'] == '1'
    assert os.environ['SLURM_MEM_PER_CPU'] == '200', 'the notebook keeps its own'


def test_the_launcher_inside_a_job(slurm, toy, tmp_path):
    "A notebook that runs in an allocation with memory per core submits jobs with memory per node."
    job = toy('inner', seconds=0)
    program = f'''if True:
        from pathlib import Path
        from umt.experiments.jobs import Job
        from umt.experiments.launchers import make_launcher, run_jobs
        job = Job('inner', (Path({str(job.home)!r}),))
        run_jobs([job], make_launcher('slurm', mem_gb=1, seconds=1.))'''
    (tmp_path/'notebook.py').write_text(program)
    command = ['sbatch', '--mem-per-cpu=200', '--wait', f'--output={tmp_path}/outer.log', '--wrap',
               f'srun {sys.executable} {tmp_path}/notebook.py']
    subprocess.run(command, check=False)
    assert (job.home/'done.json').exists(), (tmp_path/'outer.log').read_text()
    assert met(job) == 'start\nend\n'


def silent_squeue(folder, monkeypatch, silent):
    "A `squeue` that gives no answer the first times, then the cluster's."
    real = subprocess.run(['which', 'squeue'], capture_output=True, text=True, check=True).stdout.strip()
    (folder/'bin').mkdir()
    asked = folder/'asked'
    (folder/'bin/squeue').write_text(f'''#!/bin/sh
        echo asked >> {asked}
        [ $(wc -l < {asked}) -gt {silent} ] && exec {real} "$@"
        echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2
        exit 1''')
    (folder/'bin/squeue').chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}/bin', prepend=os.pathsep)


def test_no_answer_is_not_an_empty_queue(slurm, toy, tmp_path, monkeypatch):
    job = toy('once', seconds=4)
    run_until([job], lambda: met(job))
    name = queued_as(job)
    silent_squeue(tmp_path, monkeypatch, 3)
    assert run_jobs([job], launcher()) == {}
    assert queued_as(job) == name and met(job) == 'start\nend\n', 'submitted a second time'


def test_never_an_answer(slurm, toy, tmp_path, monkeypatch):
    job = toy('never', seconds=0)
    silent_squeue(tmp_path, monkeypatch, 1000)
    with pytest.raises(NoAnswer, match='no answer 6 times .*Socket timed out.*nothing was submitted'):
        run_jobs([job], launcher(seconds=.1))
    assert queued_as(job) is None and not (job.home/'slurm.json').exists()


@pytest.mark.parametrize('options, reason', [
    (dict(cpus_per_task=1000), 'PartitionConfig|PartitionNodeLimit|BadConstraints'), # more than any node has
    (dict(sbatch={'hold': True}), 'JobHeldUser'),
])
def test_a_job_that_cannot_start_says_why(slurm, toy, options, reason):
    job, lines = toy('never', seconds=0), []
    def report(line):
        lines.append(line)
        if 'never: ' in line: raise Interrupted
    with pytest.raises(Interrupted): run_jobs([job], launcher(**options), every=.5, report=report)
    cancel([job])
    assert re.search(f'never: stuck: ({reason})', lines[-1]), lines


def test_a_waiting_job_says_for_what(slurm, toy):
    "One job has all cores, the other one waits for them."
    cores = max(2, os.cpu_count())
    jobs, lines = [toy('first', seconds=8), toy('second', seconds=0)], []
    assert run_jobs(jobs, launcher(cpus_per_task=cores), every=1., report=lines.append) == {}
    assert any('1 jobs waiting: ' in line for line in lines), lines


def test_a_percent_sign_in_a_path_is_refused(slurm, tmp_path):
    before = set(queue())
    job = Job('percent', (prepare(tmp_path/'50%j'/'run', 'slow_run', {'seconds': 0}),))
    with pytest.raises(ValueError, match="50%j.*'%' means something else to SLURM"): run_jobs([job], launcher())
    assert set(queue()) <= before


def test_a_space_in_a_path(slurm, tmp_path):
    job = Job('space', (prepare(tmp_path/'my runs'/'run', 'slow_run', {'seconds': 0}),))
    assert run_jobs([job], launcher()) == {}


@pytest.mark.parametrize('options, complaint', [
    (dict(partiton='test'), "no option 'partiton'; did you mean 'partition'"),
    (dict(nodes='1e0'), "launcher option nodes: '1e0' is not int"),
    (dict(minutes=0), 'launcher option minutes 0: expected 1 or more'),
    (dict(sbatch={'reservatoin': 'a'}), "did you mean 'reservation'"),
    (dict(sbatch={'output': 'x'}), "no option 'output'"),
    (dict(sbatch=['qos=high']), 'launcher option sbatch'),
    (dict(account='a\n#SBATCH --uid=0'), 'account'),
    (dict(partition='$(id)'), 'partition'),
    (dict(sbatch={'comment': 'a`id`'}), 'sbatch option comment'),
])
def test_options_are_refused_by_name_before_anything_is_submitted(slurm, options, complaint):
    before = set(queue())
    with pytest.raises(ValueError, match=complaint): make_launcher('slurm', **options)
    assert set(queue()) <= before
