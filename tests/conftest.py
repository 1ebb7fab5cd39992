"Tests run on one thread each: two OpenMP threads beside any other load run many times slower than one."
import os
import warnings

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest


@pytest.fixture(scope='session')
def media(tmp_path_factory, worker_id):
    """The folder of the videos of every kind (tests/media_matrix.py), made once for all workers of this run, and the
    frame numbers that ffmpeg shows of each"""
    from media_matrix import missing, shared
    if reason := missing():
        if os.environ.get('CI'): warnings.warn(f'the tests of made videos are skipped: {reason}')
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == 'master' else base.parent)/'media'
    return folder, shared(folder)


@pytest.fixture
def write(tmp_path):
    "Writes a small file, and says where it is."
    def write(name, content):
        (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path/name
    return write
