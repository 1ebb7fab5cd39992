"A module that can be run (as `umt.tasks.stage1` can), which waits and writes down what it meets."
import json
import os
import time
from pathlib import Path

from umt.core.signals import Preempted, stop_signals


def main(argv):
    config = json.loads(Path(argv[1]).read_text())
    with open(Path(argv[1]).with_name('said'), 'a', buffering=1) as said, stop_signals() as stop:
        said.write('start\n')
        if config.get('environment'): Path(argv[1]).with_name('environment').write_text(json.dumps(dict(os.environ)))
        end = time.monotonic() + config['seconds']
        while time.monotonic() < end:
            time.sleep(.05)
            if stop:
                said.write('saved\n')
                raise Preempted(stop)
        if config.get('fail'): raise ValueError('as asked')
        said.write('end\n')
