"Edge cases of the fine-tuning augmentation (the recipe itself is tested in nbs/data/08_augmentation.ipynb)"
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from umt.data import emoji_motion, emoji_scenes
from umt.data.augmentation import Mixup, RandAugment, RandomErasing, crop_views, finetune_transform
from umt.core.seeds import seeded
from umt.data.media import MediaDataset, collate
from umt.data.transforms import pair_transform
from umt.data.tables import read_manifest
from umt.data.transforms import (
    CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, denormalize, eval_transform, normalize_video, pretrain_transform)


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def states(): return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:]


@pytest.mark.parametrize('seed', range(8))
def test_every_frame_is_timms_result(seed):
    "Frames differ, so that per-frame statistics matter; the seed is the one that `RandAugment` draws"
    clip = noise(3, 3, 20, 30)
    with seeded(seed): ours = RandAugment()(clip)
    with seeded(seed): drawn = torch.randint(2**32, ()).item()
    timm = rand_augment_transform('rand-m7-n4-mstd0.5-inc1', dict(interpolation=Image.Resampling.BICUBIC))
    before = random.getstate(), np.random.get_state()
    try:
        for frame, out in zip(clip, ours):
            random.seed(drawn), np.random.seed(drawn)
            assert torch.equal(v2.functional.pil_to_tensor(timm(v2.functional.to_pil_image(frame))), out)
    finally: random.setstate(before[0]), np.random.set_state(before[1])


def test_global_state_survives_an_error():
    augment, before = RandAugment(), states()
    def fail(image):
        random.random(), np.random.rand()
        raise OSError('no such operation')
    augment.augment = fail
    with pytest.raises(OSError): augment(noise(2, 3, 8, 8))
    assert states() == before
    too_large = torch.tensor([0, 5])
    with pytest.raises(RuntimeError): Mixup(2)(torch.zeros(2, 3, 1, 4, 4), too_large)
    assert states() == before


@pytest.mark.parametrize('transform', [finetune_transform(16), crop_views(16)])
def test_pickles(transform):
    "As spawned workers need it"
    clip = noise(2, 3, 20, 30)
    with seeded(3): expected = transform(clip)
    with seeded(3): assert torch.equal(pickle.loads(pickle.dumps(transform))(clip), expected)


@pytest.mark.parametrize('shape', [(1, 3, 24, 24), (2, 3, 9, 40), (2, 3, 40, 9), (3, 3, 1, 7)])
def test_odd_shapes(shape):
    for seed in range(6):
        with seeded(seed): out = finetune_transform(16)(noise(*shape))
        assert out.shape == (3, shape[0], 16, 16) and out.isfinite().all()
    assert crop_views(16, 2)(noise(*shape)).shape == (2, 3, shape[0], 16, 16)


@pytest.mark.parametrize('num_crops', [2, 3, 4, 5, 8])
def test_crops_start_where_the_reference_has_them(num_crops):
    for long in (16, 17, 29, 61, 251):
        columns = torch.arange(long, dtype=torch.uint8).expand(1, 3, 16, long)
        expected = [int(k*(long - 16)/(num_crops - 1)) for k in range(num_crops)]
        for clip in (columns, columns.mT):
            views = denormalize(crop_views(16, num_crops)(clip))*255
            assert views[:, 0, 0, 0, 0].round().tolist() == expected
            assert views[:, 0, 0, -1, -1].round().tolist() == [start + 15 for start in expected]


def test_repeated_augmentation(tmp_path):
    spec = emoji_scenes.clip_spec('train', 0, num_objects=16, image_size=48)
    emoji_motion.write_mp4(tmp_path/'a.mp4', emoji_scenes.render(spec), fps=12)
    (tmp_path/'list.csv').write_text('a.mp4,3\n')
    manifest = read_manifest(tmp_path/'list.csv')
    def batch(**options): return collate([MediaDataset(manifest, 4, num_sample=2, **options)[0, 0]])['video']
    transform, python, numpy = finetune_transform(32), random.getstate(), np.random.get_state()
    first = batch(transform=transform)
    assert first.shape == (2, 3, 4, 32, 32) and not torch.equal(*first)
    random.seed(5), np.random.seed(5)
    assert torch.equal(batch(transform=transform), first)
    assert not torch.equal(batch(transform=transform, seed=1), first)
    random.setstate(python), np.random.set_state(numpy)


@pytest.mark.parametrize('shape', [(4, 3, 64, 64), (2, 3, 50, 91), (1, 3, 97, 40)])
def test_clips_normalised_later_are_the_same_to_the_bit(shape):
    "uint8 until the device: every transform that allows it, one clip at a time and in a batch"
    makes = (pretrain_transform, eval_transform, pair_transform, partial(pair_transform, train=False), crop_views)
    for seed, make in enumerate(makes):
        for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD)):
            with seeded(seed): floats = make(32, mean=mean, std=std)(noise(*shape))
            with seeded(seed): small = make(32, mean=mean, std=std, normalize=False)(noise(*shape))
            assert small.dtype == torch.uint8 and floats.dtype == torch.float32
            assert torch.equal(normalize_video(small, mean, std), floats)
            assert torch.equal(normalize_video(torch.stack([small]*3), mean, std)[2], floats)
    with torch.inference_mode(): inside = normalize_video(small, (.1, .2, .3), (.4, .5, .6))
    scale = torch.ones((), requires_grad=True) # constants made in inference mode would not do here
    normalize_video(small, (.1, .2, .3), (.4, .5, .6)).mul(scale).sum().backward()
    assert torch.equal(inside, normalize_video(small, (.1, .2, .3), (.4, .5, .6))) and scale.grad.isfinite()


def test_what_works_on_floats_refuses_uint8():
    with pytest.raises(ValueError, match='normalize=True'): finetune_transform(16, normalize=False)
    with pytest.raises(TypeError, match='expected uint8'): normalize_video(torch.zeros(3, 1, 4, 4, dtype=torch.int64))
    floats = torch.rand(2, 3, 1, 4, 4, dtype=torch.bfloat16)
    assert normalize_video(floats) is floats


@pytest.mark.parametrize('config', ['', 'auto', 'rand-m', 'rand-mstd.5', 'rand-m7-n4-x', 'rand-tall',
                                    'original-mstd0.5'])
def test_unknown_config(config):
    with pytest.raises(ValueError, match='config'): RandAugment(config)


def test_bad_arguments():
    with pytest.raises(ValueError, match='interpolation'): RandAugment(interpolation='lanczos')
    with pytest.raises(ValueError, match='num_crops'): crop_views(num_crops=0)
    with pytest.raises(ValueError, match='cutmix'): Mixup(3, cutmix=-1)
    with pytest.raises(ValueError, match='label_smoothing'): Mixup(3, label_smoothing=10)
    for clip in (noise(3, 20, 30), noise(2, 1, 20, 30), torch.zeros(2, 3, 20, 30)):
        with pytest.raises(ValueError, match='expected uint8'): finetune_transform(16)(clip)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_memory_layout_and_dtype(dtype):
    video = noise(4, 2, 3, 8, 10).transpose(1, 2).to(dtype)
    assert not video.is_contiguous()
    label, copy = torch.arange(4), video.clone()
    for seed in range(6):
        with seeded(seed): out, target = Mixup(4)(video, label)
        with seeded(seed): same, _ = Mixup(4)(video.contiguous(), label)
        assert out.dtype == dtype and target.dtype == torch.float32
        assert torch.equal(out, same) and torch.equal(video, copy)
    with seeded(0): erased = RandomErasing(1.)(video[0].float())
    with seeded(0): assert torch.equal(erased, RandomErasing(1.)(video[0].float().contiguous()))
