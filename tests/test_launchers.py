"What several processes may expect of each other in a job of several runs."
import os
from pathlib import Path

import pytest

from umt.experiments.jobs import Job, prepare
from umt.experiments.launchers import Local, check_launcher, run_jobs
from umt.experiments.slurm import Slurm, slurm_options


def test_no_process_begins_a_run_before_the_one_below_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent), prepend=os.pathsep)
    first = prepare(tmp_path/'first', 'two_runs', {})
    second = prepare(tmp_path/'second', 'two_runs', {'needs': str(first/'made')})
    assert run_jobs([Job('both', (first, second))], Local(processes=2)) == {}


# ---- what becomes a line of a batch script

COUNTS = ['nodes', 'gpus_per_node', 'tasks_per_node', 'cpus_per_task', 'minutes', 'mem_gb', 'at_once', 'signal_seconds']
SHELL = ['a\nb', 'a\r#SBATCH --uid=0', '$(id)', '`id`', 'a;b', 'a\\', 'a"b', "a'b", 'a>b', 'a<b', 'a{b}', 'a~', 'a#b',
         'a%b', 'a\0b', 'a\u2028b', 'a\tb', 'a^b', '', b'a', ['a'], {}, float('nan'), float('inf'), False]


@pytest.mark.parametrize('value', ['1\n', '1; rm -r .', '$(id)', 1.5, float('nan'), -1, True, [1], 2**70, b'1'])
@pytest.mark.parametrize('option', COUNTS)
def test_numbers_of_slurm_are_numbers(option, value):
    "A number becomes a line of the shell script, so a text that begins like one is refused"
    with pytest.raises(ValueError, match=option): slurm_options(**{option: value})
    with pytest.raises(ValueError, match=option): Slurm(**{option: value})


@pytest.mark.parametrize('value', SHELL)
@pytest.mark.parametrize('option', ['partition', 'account', 'comment', 'constraint', 'mail_user', 'nodelist'])
def test_words_of_slurm_are_words(option, value):
    of_ours = option in ('partition', 'account')
    options = {option: value} if of_ours else {'sbatch': {option: value}}
    for check in (lambda: slurm_options(**options), lambda: check_launcher('slurm', options)):
        with pytest.raises(ValueError, match=option.replace('_', '.')): check()


@pytest.mark.parametrize('name', ['com\nment', 'comment --uid', '--uid', 'wrap', 'output', 'export', 5, None, ''])
def test_names_of_sbatch_are_known(name):
    with pytest.raises(ValueError, match='sbatch'): slurm_options(sbatch={name: 'a'})


def test_options_are_lines_that_no_shell_reads(tmp_path):
    "Signs that SLURM's own language needs are allowed, and quoted"
    slurm = pytest.importorskip('submitit.slurm.slurm')
    options = slurm_options(4, partition='a100', mem_gb=3, sbatch={
        'constraint': '[rack1|rack2]*2&gpu', 'dependency': 'afterok:1?afterany:2', 'nice': -5, 'hold': True})
    text = slurm._make_sbatch_string(command='run', folder=tmp_path, **options)
    lines = [line for line in text.splitlines() if line.startswith('#SBATCH')]
    assert "#SBATCH --constraint='[rack1|rack2]*2&gpu'" in lines and '#SBATCH --nice=-5' in lines
    assert '#SBATCH --hold' in lines and len(lines) == len({line.split('=')[0] for line in lines})
