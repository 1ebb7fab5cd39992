"""Write the map of the house into the notebooks that show it, from the first cells of the numbered notebooks."""
import re
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
FLOORS = { # folder: what its rooms know
    'core': 'files, options, logs, run directories',
    'data': 'files, pixels, words, labels',
    'models': 'one network or one rule each',
    'training': 'steps, precision, processes, resume',
    'tasks': 'one task each: its data, model, loss, evaluation, recipes',
    'experiments': 'tables, clusters, people',
}


def read(path: Path):
    return nbformat.v4.reads(path.read_text())


def rooms(floor: str) -> list[tuple[str, str, str]]:
    "Path below nbs, name and one-line summary of a floor's notebooks, in order."
    found = []
    for path in sorted((root/'nbs'/floor).glob('[0-9][0-9]_*.ipynb')):
        summary = re.search(r'^> (.+)$', read(path).cells[0].source, re.M)
        found.append((f'{floor}/{path.name}', path.stem[3:], summary[1].strip() if summary else ''))
    return found


def short_map() -> str:
    "One line per floor: for the README."
    lines = ['| floor | knows | rooms |', '| --- | --- | --- |']
    for floor, knows in FLOORS.items():
        links = ', '.join(f'[{name}]({path})' for path, name, _ in rooms(floor))
        lines.append(f'| `umt.{floor}` | {knows} | {links} |')
    return '\n'.join(lines)


def long_map() -> str:
    "One line per room: for the guide."
    parts = []
    for floor, knows in FLOORS.items():
        lines = [f'- [{name}](../{path}): {summary}' for path, name, summary in rooms(floor)]
        parts.append('\n'.join([f'**{floor}**: {knows}', '', *lines]))
    return '\n\n'.join(parts)


def write(path: Path, text: str):
    "Put a map into the cell with the id `map`."
    nb = read(path)
    cell, = [c for c in nb.cells if c.id == 'map']
    if cell.source != text:
        cell.source = text
        path.write_text(nbformat.v4.writes(nb) + '\n')


if __name__ == '__main__':
    write(root/'nbs/index.ipynb', short_map())
    write(root/'nbs/guides/house.ipynb', long_map())
