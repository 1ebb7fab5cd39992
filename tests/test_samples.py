"""Sample order and keys are those of the five data sets that `MediaDataset` has replaced: `vectors/samples.json` was
recorded with them. A change here changes what every seed trains on."""
import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from umt.data.captions import read_captions
from umt.data.galleries import gallery_dataset, read_gallery
from umt.data.media import MediaDataset, StepSampler, evaluation_order
from umt.data.tables import read_manifest

RECORDED = json.loads((Path(__file__).parent/'vectors/samples.json').read_text())
WORDS = [['one', 'two words'], 'three words here', ['four']]
BROKEN_CLIPS, BROKEN_STILL = (2, 7), 3


def write_clip(path: Path, frames: np.ndarray):
    "Lossless, so that no version of a codec changes a pixel."
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('ffv1', rate=10, width=frames.shape[2], height=frames.shape[1], pix_fmt='bgr0')
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, 'rgb24').reformat(format='bgr0')))
        out.mux(stream.encode(None))


@pytest.fixture(scope='module')
def media(tmp_path_factory):
    "Twelve clips of 10 to 21 frames and eight stills of seeded noise; two clips and a still are cut off."
    root, draw = tmp_path_factory.mktemp('media'), np.random.default_rng(5)
    clips, stills = [f'v/clip{i:02d}.mkv' for i in range(12)], [f'i/still{i}.png' for i in range(8)]
    for folder in 'vi': (root/folder).mkdir()
    for i, name in enumerate(clips):
        write_clip(root/name, draw.integers(0, 256, (10 + i, 48, 64, 3), np.uint8))
        if i in BROKEN_CLIPS: (root/name).write_bytes((root/name).read_bytes()[:300])
    for name in stills: Image.fromarray(draw.integers(0, 256, (40, 56, 3), np.uint8)).save(root/name)
    (root/stills[BROKEN_STILL]).write_bytes(b'no picture')
    def write(name, rows): (root/name).write_text(json.dumps(rows))
    (root/'list.csv').write_text(''.join(f'{name},{i % 3}\n' for i, name in enumerate(clips)))
    write('clips.json', [dict(video=clips[i], caption=WORDS[i % 3]) for i in (*range(12), 4, 4)])
    write('stills.json', [dict(image=name, caption=WORDS[i % 3]) for i, name in enumerate(stills)])
    write('gallery.json', [dict(video=clips[i], caption=f'clip {i}') for i in range(5)])
    return root


def crop(frames: Tensor) -> Tensor: # uint8 [3, T, 32, 32]
    "Draws from the global generator, and copies pixels as they are."
    return v2.RandomCrop(32)(frames).transpose(0, 1)


def encode(text): return torch.tensor([len(word) for word in text.split()])


def record(sample: dict | list) -> dict | list:
    "What identifies a sample: ids, keys, words, the names of what could not be read, every pixel."
    if isinstance(sample, list): return [record(each) for each in sample]
    pixels = hashlib.sha256(sample['video'].contiguous().numpy().tobytes()).hexdigest()[:16]
    failed = [[sample_id, path] for sample_id, path, _ in sample['failures']]
    return dict(
        sample_id=sample['sample_id'], label=sample.get('label'), key=sample['key'], caption=sample.get('caption'),
        failed=failed, video=pixels)


def records(data, epochs=1): return [record(data[epoch, i]) for epoch in range(epochs) for i in range(len(data))]


def labelled(media): return read_manifest(media/'list.csv', first_id=100)


def test_labelled_clips(media):
    data = MediaDataset(labelled(media), 4, 'sparse', crop, 3)
    assert records(data, 2) == RECORDED['labelled']


def test_repeated_augmentation(media):
    data = MediaDataset(labelled(media), 4, 'dense', crop, 4, num_sample=2)
    assert records(data) == RECORDED['repeated']


def test_evaluated_clips(media):
    data = MediaDataset(labelled(media), 4, 'kinetics_sparse_val', crop, 3, shape=(3, 4, 32, 32))
    assert records(data) == RECORDED['evaluated']


def test_pairs_of_images_and_videos(media):
    corpora = {'video': [read_captions(media/'clips.json')], 'image': [read_captions(media/'stills.json')]}
    data = MediaDataset(corpora, 4, 'rand', crop, 6, encode=encode)
    assert {medium: [r.start, r.stop] for medium, r in data.media.items()} == RECORDED['media']
    assert records(data, 2) == RECORDED['pairs']


@pytest.mark.parametrize('trim, recorded', [(None, 'gallery'), (.5, 'trimmed')])
def test_gallery(media, trim, recorded):
    data = gallery_dataset(read_gallery('json', media/'gallery.json', media).manifest, 3, 32, trim)
    data.transform = lambda frames: frames[:, :, :32, :32].transpose(0, 1)
    found = [{k: r[k] for k in ('sample_id', 'failed', 'video')} for r in records(data)]
    assert found == RECORDED[recorded]


def test_order_of_a_run():
    def listed(*samplers): return [[list(pair) for pair in batch] for sampler in samplers for batch in sampler]
    assert listed(*(StepSampler(27, 8, 5, r, 2, 2, 1, epochs=2) for r in (0, 1))) == RECORDED['steps']
    assert listed(StepSampler(12, 4, 5, total_steps=4, shuffle=False)) == RECORDED['in_order']
    mixed = (StepSampler([range(0, 8), range(8, 22)], 4, 9, r, 2, 1, 3, epochs=2) for r in (0, 1))
    assert listed(*mixed) == RECORDED['mixed']
    assert listed(*(evaluation_order(7, 2, r, 2) for r in (0, 1))) == RECORDED['evaluation']
