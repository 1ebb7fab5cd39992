"""A real SLURM cluster of one node for tests: munged, slurmctld and slurmd as child processes, everything they write
in one folder.

    with cluster(folder) as variables: subprocess.run(['srun', '-n2', 'hostname'], env={**os.environ, **variables})

Every process of the cluster and of its jobs ends with the context, also where the test fails or its process is
killed: a supervisor (this file started as a program) adopts what they leave behind and kills it. Call `cluster`
from the main thread: the kernel ends the supervisor with the thread that started it. The node is called localhost,
so nothing depends on how the host's own name resolves.

What this cluster does (measured: SLURM 22.05.8, Debian 12, submitit 1.5.4). T is the moment of the command, times
in seconds.

`scontrol requeue JOB`. Every task gets SIGCONT and one SIGTERM at T; srun and the batch script get them too (bash
without a trap ends, lines after srun are not run). Tasks still there at T + KillWait (10 here, 30 by default) get
SIGKILL. squeue: RUNNING, COMPLETING (until the last task has ended), PENDING with reason BeginTime for cred_expire
+ 1 seconds (cred_expire=5 here, the least that SLURM takes; 120 by default), RUNNING. A task that needs 1.5 to save
runs again at T + 8, one that has to be killed at T + 16. The job keeps its id; SLURM_RESTART_COUNT is unset at
first, then 1, 2... The exit codes of the stopped run (0, 75, killed) do not matter, so a task may call `scontrol
requeue $SLURM_JOB_ID` itself, and gets SIGTERM as above. No exit code alone brings a job back: a task that just
exits (75, say) makes it FAILED, unless the cluster sets RequeueExit. SIGTERM before the task has set its handler
ends it at once; the job runs again all the same.

Time limit with `--signal=USR1@N`. All tasks get SIGUSR1 (then SIGCONT) N seconds before the limit or earlier; the
batch script and srun do not. Limits are looked at every 30 s: with `--time=1 --signal=USR1@20` SIGUSR1 came at 26
s, the end at 86 s. At the end SIGTERM comes twice within 10 ms, SIGKILL KillWait later; squeue: COMPLETING, then
TIMEOUT (reason TimeLimit, ExitCode=0:15). Such a job is not requeued. With `--signal=B:USR1@N` only bash gets it,
dies of it, and the job is FAILED (JobLaunchFailure, ExitCode=0:10), its tasks get SIGTERM.

`scancel JOB` does what requeue does, without the return: COMPLETING, CANCELLED. `scancel --signal=USR1 JOB` signals
the tasks only.

Failed jobs. squeue shows finished jobs with `--states=all` only: FAILED, reason NonZeroExitCode; `scontrol show
job`: JobState=FAILED ExitCode=CODE:SIGNAL of the batch script: 3:0 for exit(3), 1:0 for an exception, 137:0 for
SIGKILL (srun turns the signal into 128 + 9). One task that dies does not end the others (KillOnBadExit=0) unless
srun has --kill-on-bad-exit=1: then they get SIGTERM, and SIGKILL after KillWait. sacct fails: 'Slurm accounting
storage is disabled'. A finished job is forgotten 300 to 310 seconds after its end (MinJobAge); then squeue and
scontrol exit with 1 and 'Invalid job id specified'.

submitit. `--signal=USR2@90` stands in every batch script (slurm_signal_delay_s); SUBMITIT_PREEMPT_SIGNAL=USR1, set
before submitit is imported, makes it USR1. Logs are FOLDER/JOB_TASK_log.out and .err, appended to by later runs;
srun's own messages are in JOB_0_log.err. `with executor.batch()` makes one array: job ids 7_0, 7_1... (each with a
SLURM_JOB_ID of its own; squeue shows 7_[0-2%3] while all wait), logs 7_1_0_log.out. Without sacct `job.state` is
always UNKNOWN and `job.done()` only asks whether every task has written its result: never so if a task was killed
or left through SystemExit or os._exit, and `job.result()` then waits forever. It is too early for a job that
returns normally after SIGTERM and runs again. In a task submitit replaces the handlers of SIGTERM and SIGCONT (both
ignored with a log line) and of USR1 or USR2; handlers that the function sets win. Functions of a module travel by
name: the module must be importable in the task, from the working directory of the submission or PYTHONPATH.
TorchDistributedEnvironment().export() sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR (first
node's name), MASTER_PORT (20000 to 60000, a function of the job id, the same after a requeue) and
CUDA_VISIBLE_DEVICES, and gloo works with it, also where the host's name does not resolve (gloo then warns and takes
the loopback interface).
"""
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

CONF = '''
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=5
# submitit derives MASTER_PORT from the job id: clusters side by side should not count alike
FirstJobId={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobRequeue=1
KillWait=10
MinJobAge=300
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
'''
PROGRAMS = ('munged', 'mungekey', 'slurmctld', 'slurmd', 'srun', 'sbatch', 'scontrol', 'scancel', 'squeue', 'sinfo')
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
libc = ctypes.CDLL(None)

def missing():
    "What is missing to start a cluster here: a sentence, or None."
    if os.geteuid(): return 'a SLURM cluster for tests is started as root'
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if not absent: return None
    return f'not installed: {", ".join(absent)} (.ci/slurm.sh installs the Debian packages slurm-wlm and munge)'

@contextmanager
def cluster(folder, seconds=60):
    """Run a cluster that keeps its files in the existing `folder`; yields the environment variables that make SLURM's
    commands use it. Raises RuntimeError with the daemons' messages if the node is not idle after `seconds`."""
    folder = Path(folder).resolve()
    munge = tempfile.mkdtemp(prefix='munge-') # apart: the user munge cannot enter pytest's folders
    shutil.chown(munge, 'munge', 'munge')
    os.chmod(munge, 0o755)
    write_config(folder, munge)
    variables = {'SLURM_CONF': str(folder / 'slurm.conf')}
    env = {**os.environ, **variables}
    supervisor = subprocess.Popen(
        [sys.executable, __file__, folder, munge, str(os.getpid())], env=env, stdin=subprocess.DEVNULL,
        stdout=(folder / 'daemons.log').open('w'), stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while subprocess.run(['sinfo', '-ho', '%T'], env=env, capture_output=True, text=True).stdout.strip() != 'idle':
            if supervisor.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f'the SLURM node is not idle after {seconds} s; {folder}/daemons.log ends with:\n'
                                   + (folder / 'daemons.log').read_text()[-3000:])
            time.sleep(.1)
        yield variables
    finally:
        supervisor.terminate()
        supervisor.wait(30)

def write_config(folder, munge):
    "slurm.conf for this machine: its CPUs (two at least, so that two tasks always fit), its memory, free ports."
    with socket.create_server(('127.0.0.1', 0)) as a, socket.create_server(('127.0.0.1', 0)) as b:
        ports = [server.getsockname()[1] for server in (a, b)]
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 20
    for name in ('state', 'spool'): (folder / name).mkdir(exist_ok=True)
    (folder / 'slurm.conf').write_text(CONF.format(
        folder=folder, munge=munge, controller_port=ports[0], node_port=ports[1], host=socket.gethostname(),
        cpus=max(2, os.cpu_count()), memory=memory))
    version = subprocess.run(['slurmd', '-V'], capture_output=True, text=True, check=True).stdout.split()[1]
    # older ones know no "disabled"; their v1 plugin touches nothing until a task or process plugin asks for it
    plugin = 'disabled' if tuple(map(int, version.split('.')[:2])) >= (23, 2) else 'cgroup/v1'
    (folder / 'cgroup.conf').write_text(f'CgroupPlugin={plugin}\n')

def state(job):
    "What squeue says about a job, state and reason: 'PENDING BeginTime', or '' if SLURM does not know it (any more)."
    command = ['squeue', '--noheader', '--states=all', f'--jobs={job}', '--format=%T %r']
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()

def wait_until(condition, seconds=60):
    "Poll until `condition()` is true and return what it gave; TimeoutError with the queue if it stays false."
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            shown = subprocess.run(['scontrol', 'show', 'job'], capture_output=True, text=True)
            raise TimeoutError(f'not in {seconds} s:\n{shown.stdout}')
        time.sleep(.1)
    return value

def children():
    "The child processes of this one, adopted orphans among them."
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):
            if int(stat.read_text().rpartition(')')[2].split()[1]) == os.getpid(): yield int(stat.parent.name)

def start(*command, **options):
    return subprocess.Popen(command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), **options)

def supervise(munge, parent):
    "Run the daemons until SIGTERM, the end of the parent or of a daemon; then kill every descendant."
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        if os.getppid() != parent: return
        as_munge = {'user': 'munge', 'group': 'munge', 'extra_groups': []}
        subprocess.run(['mungekey', '--create', '--keyfile', f'{munge}/key'], check=True, **as_munge)
        names = 'key-file', 'socket', 'pid-file', 'log-file', 'seed-file'
        files = [f'--{name}={munge}/{name.split("-")[0]}' for name in names]
        daemons = [start('munged', '--foreground', *files, **as_munge)]
        while not Path(munge, 'socket').exists() and daemons[0].poll() is None: time.sleep(.02)
        daemons += [start('slurmctld', '-D'), start('slurmd', '-D')]
        while os.wait()[0] not in [daemon.pid for daemon in daemons]: pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(ChildProcessError):
            while True:
                for pid in children():
                    with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
                os.wait()
        shutil.rmtree(munge)

if __name__ == '__main__': supervise(sys.argv[2], int(sys.argv[3]))
