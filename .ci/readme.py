"""Write README.md from nbs/index.ipynb (`nbdev_readme` needs the Quarto program; this does not). `--check` only compares."""
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import hide_, rm_export, strip_ansi
from execnb.nbio import nb2str

root = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The Markdown of index.ipynb: hidden cells dropped, outputs kept, no pictures embedded."
    proc = NBProcessor(root/'nbs/index.ipynb', procs=[rm_export, hide_, strip_ansi])
    proc.process()
    text, _ = MarkdownExporter().from_notebook_node(nbformat.reads(nb2str(proc.nb), as_version=4))
    return '<!-- Written from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n' + text.strip() + '\n'


if __name__ == '__main__':
    path, text = root/'README.md', readme()
    if '--check' in sys.argv[1:]:
        sys.exit(0 if path.exists() and path.read_text() == text else 'README.md differs from nbs/index.ipynb: run `make docs-sync`')
    path.write_text(text)
