"The test cluster itself: what the launcher's tests build on. Start-up takes two seconds, a requeue about ten."
import os, signal, subprocess, sys
from pathlib import Path

import pytest
import submitit

from cluster import cluster, missing, state, wait_until
from slurm_tasks import all_ranks, place, save_slowly

pytestmark = pytest.mark.timeout(180)

@pytest.fixture
def executor(slurm, tmp_path):
    executor = submitit.AutoExecutor(tmp_path / 'jobs', cluster='slurm')
    executor.update_parameters(tasks_per_node=2, nodes=1, cpus_per_task=1, timeout_min=5)
    return executor

def results(job):
    "The results of a job that ends well; `job.results()` alone would wait forever for one that does not."
    ends = 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT'
    end = wait_until(lambda: state(job.job_id).startswith(ends) and state(job.job_id))
    assert end.startswith('COMPLETED'), f'{end}\n{job.stderr()}'
    return job.results()

def test_srun(slurm):
    command = ['srun', '--ntasks=2', 'printenv', 'SLURM_PROCID']
    ranks = subprocess.run(command, check=True, capture_output=True, text=True)
    assert sorted(ranks.stdout.split()) == ['0', '1']

def test_submitit(executor):
    job = executor.submit(place, 40)
    assert results(job) == [(40, job.job_id), (41, job.job_id)]
    assert Path(job.task(1).paths.stdout).name == f'{job.job_id}_1_log.out'
    assert 'completed successfully' in job.task(1).stdout()

def test_distributed(executor):
    assert results(executor.submit(all_ranks)) == [[0, 1], [0, 1]]

def test_array(executor):
    executor.update_parameters(tasks_per_node=1)
    with executor.batch(): jobs = [executor.submit(place, addend) for addend in (1, 2)]
    assert [job.job_id.split('_')[1] for job in jobs] == ['0', '1']
    assert [results(job)[0][0] for job in jobs] == [1, 2]

def test_failed_job(executor):
    "Without accounting submitit does not see the end of a job that leaves no result; squeue does."
    job = executor.submit(sys.exit, 3)
    wait_until(lambda: state(job.job_id) == 'FAILED NonZeroExitCode')
    shown = subprocess.run(['scontrol', 'show', 'job', job.job_id], capture_output=True, text=True)
    assert 'ExitCode=3:0' in shown.stdout
    assert not job.done() and job.state == 'UNKNOWN'

def test_requeue(executor, tmp_path):
    "Each task gets SIGTERM, has time to save, and runs again by itself."
    job = executor.submit(save_slowly, str(tmp_path))
    files = [tmp_path / f'rank-{rank}' for rank in (0, 1)]
    wait_until(lambda: all(file.exists() and 'run 0\n' in file.read_text() for file in files))
    subprocess.run(['scontrol', 'requeue', job.job_id], check=True)
    wait_until(lambda: state(job.job_id).startswith('COMPLETING'), 3)
    wait_until(lambda: state(job.job_id) == 'PENDING BeginTime', 20)
    assert [file.read_text().split('\n') for file in files] == [['run 0', 'SIGTERM', 'saved', '']] * 2
    wait_until(lambda: not state(job.job_id).startswith('PENDING'), 20)
    assert results(job) == [1, 1]
    assert [file.read_text().split('\n')[3:] for file in files] == [['run 1', '']] * 2

def running_under(folder):
    "Processes whose environment names a cluster's folder."
    found = []
    for file in Path('/proc').glob('[0-9]*/environ'):
        try:
            if f'SLURM_CONF={folder}/'.encode() in file.read_bytes(): found.append(file.parent.name)
        except OSError: pass
    return found

ENDS = {'interrupted': 'raise KeyboardInterrupt', 'killed': 'os.kill(os.getpid(), signal.SIGKILL)'}

@pytest.mark.parametrize('end', ENDS.values(), ids=ENDS)
def test_nothing_is_left(tmp_path, end):
    "A cluster of its own, with a task that ignores signals, under a process that ends badly."
    if reason := missing(): pytest.skip(reason)
    task = f'trap "" TERM; touch {tmp_path}/started; sleep 1000'
    program = f'''if True:
        import os, signal, subprocess
        from cluster import cluster, wait_until
        with cluster({str(tmp_path)!r}) as variables:
            os.environ.update(variables)
            subprocess.run(['sbatch', '--output=/dev/null', '--wrap', {f"srun setsid sh -c '{task}'"!r}], check=True)
            wait_until(lambda: os.path.exists('{tmp_path}/started'))
            {end}'''
    done = subprocess.run([sys.executable, '-c', program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == -(signal.SIGINT if 'raise' in end else signal.SIGKILL), done.stderr
    assert (tmp_path / 'started').exists()
    if 'raise' in end: assert not running_under(tmp_path)
    else: wait_until(lambda: not running_under(tmp_path), 20)
