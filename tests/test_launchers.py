"What several processes may expect of each other in a job of several runs."
import os
from pathlib import Path

from umt.experiments.jobs import Job, prepare
from umt.experiments.launchers import Local, run_jobs


def test_no_process_begins_a_run_before_the_one_below_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent), prepend=os.pathsep)
    first = prepare(tmp_path/'first', 'two_runs', {})
    second = prepare(tmp_path/'second', 'two_runs', {'needs': str(first/'made')})
    assert run_jobs([Job('both', (first, second))], Local(processes=2)) == {}
