"A module that can be run: the first process is slow to write what the next run of the job needs."
import json
import os
import time
from pathlib import Path

from umt.training.distributed import start_accelerator


def main(argv):
    config = json.loads(Path(argv[1]).read_text())
    needs = config.get('needs')
    assert not needs or Path(needs).exists(), f'process {os.environ["RANK"]} began before {needs} was there'
    start_accelerator().wait_for_everyone()
    if os.environ['RANK'] == '0':
        time.sleep(1)
        Path(argv[1]).with_name('made').write_text('')
