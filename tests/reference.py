"""Where the recorded vectors of the reference are: tests/vectors, and a larger set beside the repository.

UMT_REFERENCE_DIR says where the larger set is.

Sizes are read from the vectors' own configuration, so any folder of the same layout is judged.
"""
import filecmp
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

VECTORS = Path(__file__).parent/'vectors'
BESIDE = Path(os.environ.get('UMT_REFERENCE_DIR', Path(__file__).parents[2]/'shared'/'reference'))
CLOSE = dict(rtol=1e-4, atol=1e-5)  # the tolerance that the vectors are given with


def folders(*files):
    "Folders that hold all of the files; one beside the repository that is a copy of one in it is left out."
    found = []
    for root in (VECTORS, BESIDE):
        for folder in sorted(path for path in root.glob('*') if path.is_dir()):
            if not all((folder/name).exists() for name in files): continue
            same = lambda other: not filecmp.cmpfiles(folder, other, files, shallow=False)[1]
            if not any(other.name == folder.name and same(other) for other in found): found.append(folder)
    return found


def vectors(*files):
    "Run a test for each folder with these files, as its argument `folder`; skip it where there is none."
    found = folders(*files)
    names = [f'{folder.parent.name}-{folder.name}' for folder in found]
    return pytest.mark.parametrize('folder', found, ids=names)


def read_config(folder, name='config.json', part=None):
    config = json.loads((folder/name).read_text())
    return config if part is None else config[part]


def read_io(folder, name): return load_file(folder/f'{name}_io.safetensors')


def student_sizes(config):
    "Arguments of a loader, from `student` or `vision` in a configuration."
    return dict(image_size=config['image_size'], num_frames=config['frames'], num_heads=config['heads'])


def stage1_sizes(folder): return student_sizes(read_config(folder)['student'])


def teacher_options(config):
    "What a file of a teacher does not say about itself."
    return dict(num_heads=config['teacher']['heads'], activation=config['teacher']['activation'])


def multimodal_sizes(config): return student_sizes(config['vision']) | dict(text_heads=config['text']['heads'])


def gradients(io, prefix='grad.'):
    "The recorded gradients by their published names."
    found = {name.removeprefix(prefix): tensor for name, tensor in io.items() if name.startswith(prefix)}
    assert found
    return found
