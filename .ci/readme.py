"""Write README.md from nbs/index.ipynb, without Quarto, which `nbdev_readme` needs. `--check` only compares."""
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
    if output.output_type == 'stream':
        return output.text if output.name == 'stdout' else ''
    data = output.get('data', {})
    return '' if 'image/png' in data else data.get('text/plain', '')


def with_fenced_outputs(nb):
    "Outputs as fenced blocks, apart from the code, which is marked as Python."
    cells = []
    for cell in nb.cells:
        cells.append(cell)
        text = ''.join(map(printed, cell.pop('outputs', []))).rstrip()
        if cell.cell_type == 'code':
            cell.outputs = []
        if text:
            cells.append(nbformat.v4.new_markdown_cell(f'```text\n{text}\n```'))
    nb.cells, nb.metadata.language_info = cells, {'name': 'python'}
    return nb


def from_the_root(text: str) -> str:
    "Links to notebooks, folders and pictures beside the index, and to files above it, as seen from the root."
    text = re.sub(r'\]\(\.\./', '](', text)
    return re.sub(r'\]\(((?:\w+/)*(?:\w+\.(?:ipynb|png))?)\)', r'](nbs/\1)', text)


def readme() -> str:
    "The Markdown of index.ipynb: hidden cells dropped, printed text kept."
    proc = NBProcessor(root/'nbs/index.ipynb', procs=[rm_export, hide_, strip_ansi])
    proc.process()
    text, _ = MarkdownExporter().from_notebook_node(with_fenced_outputs(nbformat.reads(nb2str(proc.nb), as_version=4)))
    text = from_the_root(re.sub(r'[ \t]+\n', '\n', re.sub(r'\n{3,}', '\n\n', text)))
    return '<!-- Written from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n' + text.strip() + '\n'


if __name__ == '__main__':
    path, text = root/'README.md', readme()
    if '--check' in sys.argv[1:]:
        same = path.exists() and path.read_text() == text
        sys.exit(0 if same else 'README.md differs from nbs/index.ipynb: run `make docs-sync`')
    path.write_text(text)
