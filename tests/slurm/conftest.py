import os, subprocess
from pathlib import Path

import pytest

from cluster import cluster, missing

@pytest.fixture(scope='session')
def running_cluster(tmp_path_factory):
    if reason := missing(): pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp('cluster')) as variables: yield variables

@pytest.fixture
def slurm(running_cluster, monkeypatch):
    "SLURM's commands and submitit talk to the test cluster; jobs find this folder's modules; left ones are cancelled."
    for name, value in running_cluster.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent), prepend=os.pathsep)
    yield running_cluster
    subprocess.run(['scancel', '--user=root'], check=True)
