"""Run the library's notebooks with nbdev_test, and count them: nbdev_test succeeds, too, where it finds none."""
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbdev_test = Path(sys.executable).parent/'nbdev_test'


def main(options: list[str]):
    expected = Counter(p.name for p in root.glob('nbs/*/[0-9][0-9]_*.ipynb'))
    command = [nbdev_test, '--file_re', r'^\d\d_', '--timing', *options]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    ran = Counter()
    for line in process.stdout:
        print(line, end='', flush=True)
        ran.update(re.findall(r'^(\d\d_\w+\.ipynb): \d+ secs', line))
    if process.wait():
        sys.exit(process.returncode)
    if ran != expected:
        missing, other = sorted((expected - ran).elements()), sorted((ran - expected).elements())
        sys.exit(f'nbdev_test ran {ran.total()} of {expected.total()} notebooks; missing {missing}, unexpected {other}')
    print(f'{ran.total()} notebooks ran')


if __name__ == '__main__':
    main(sys.argv[1:])
