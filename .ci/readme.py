"""Write README.md from nbs/index.ipynb (`nbdev_readme` needs the Quarto program; this does not). `--check` only compares."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import hide_, rm_export, strip_ansi
from execnb.nbio import nb2str

root = Path(__file__).resolve().parent.parent


def printed(output) -> str:
    "The text of an output; nothing for warnings and pictures."
    if output.output_type == 'stream': return output.text if output.name == 'stdout' else ''
    return output.get('data', {}).get('text/plain', '') if 'image/png' not in output.get('data', {}) else ''


def with_fenced_outputs(nb):
    "Outputs as fenced blocks, apart from the code, which is marked as Python."
    cells = []
    for cell in nb.cells:
        cells.append(cell)
        text = ''.join(map(printed, cell.pop('outputs', []))).rstrip()
        if cell.cell_type == 'code': cell.outputs = []
        if text: cells.append(nbformat.v4.new_markdown_cell(f'```text\n{text}\n```'))
    nb.cells, nb.metadata.language_info = cells, {'name': 'python'}
    return nb


def readme() -> str:
    "The Markdown of index.ipynb: hidden cells dropped, printed text kept, links to notebooks as seen from the root."
    proc = NBProcessor(root/'nbs/index.ipynb', procs=[rm_export, hide_, strip_ansi])
    proc.process()
    text, _ = MarkdownExporter().from_notebook_node(with_fenced_outputs(nbformat.reads(nb2str(proc.nb), as_version=4)))
    text = re.sub(r'\]\((\w+\.ipynb)\)', r'](nbs/\1)', re.sub(r'\n{3,}', '\n\n', text))
    return '<!-- Written from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n' + text.strip() + '\n'


if __name__ == '__main__':
    path, text = root/'README.md', readme()
    if '--check' in sys.argv[1:]:
        sys.exit(0 if path.exists() and path.read_text() == text else 'README.md differs from nbs/index.ipynb: run `make docs-sync`')
    path.write_text(text)
