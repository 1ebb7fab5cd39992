"""Small videos of every container and codec that show their frame numbers, made with Debian's `ffmpeg`.

Every picture is a grid of 4 x 4 dark and bright blocks: the upper half spells the frame's number in binary, the lower
half its complement. Codecs may blur it, a wrong frame cannot pass for the right one. `python tests/media_matrix.py
--table` reads all of them with every backend and prints what became of it, as Markdown."""
import argparse, fcntl, json, shutil, struct, subprocess, tempfile, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

COUNT, FPS, WIDTH, HEIGHT = 100, 25, 96, 64
BLOCKS = 4 # along each side
# Debian's FFmpeg 5.1 shows what PyAV's newer FFmpeg does not (broken pictures in front of the first key frame of HEVC,
# a picture that ends where the edit list begins). There the truth is what PyAV decodes from the start.
NEWER_IS_RIGHT = 'hevc_between.ts', 'mjpeg_cut.mp4'


# ---- pictures that show their number

def bits(number):
    "bool [4,4]: eight bits of the number, most significant first, then their complement"
    ones = np.array([number >> shift & 1 for shift in range(7, -1, -1)], bool)
    return np.concatenate([ones, ~ones]).reshape(BLOCKS, BLOCKS)

def picture(number, height=HEIGHT, width=WIDTH):
    "uint8 [H,W,3]: the blocks, tinted by a smooth gradient"
    blocks = np.kron(bits(number), np.ones((height//BLOCKS, width//BLOCKS)))[..., None]*160 + 30
    y, x = np.mgrid[:height, :width]
    tint = np.stack([x/width, y/height, 1 - x/width], -1)*50
    return (blocks + tint).astype(np.uint8)

def read_numbers(frames):
    "int [T]: the number in each picture of [T,H,W] or [T,H,W,3], -1 where bits and complement disagree"
    frames = np.asarray(frames)
    gray = frames.mean(-1) if frames.ndim == 4 else frames.astype(float)
    _, height, width = gray.shape
    rows = [slice(height*(4*i + 1)//16, height*(4*i + 3)//16) for i in range(BLOCKS)] # the middles of the blocks
    columns = [slice(width*(4*i + 1)//16, width*(4*i + 3)//16) for i in range(BLOCKS)]
    ones = np.stack([gray[:, r, c].mean((1, 2)) > 128 for r in rows for c in columns], 1)
    numbers = ones[:, :8] @ (1 << np.arange(7, -1, -1))
    return np.where((ones[:, :8] != ones[:, 8:]).all(1), numbers, -1)


def requests(length, keys):
    "Lists of indices: ends, scattered, around key frames, at random, repeated and in any order"
    rng, last = np.random.default_rng(length), length - 1
    around = sorted({i for key in keys[:6] for i in (key - 1, key, key + 1) if 0 <= i <= last})
    lists = [[0, last], [last], np.linspace(0, last, 8).astype(int), around, rng.integers(0, length, 1),
             np.sort(rng.integers(0, length, 4)), [last, 3, 0, 3, last//2, 3]]
    return [np.array(indices).tolist() for indices in lists if len(indices)]


# ---- cases

class Case(NamedTuple):
    name: str
    extension: str
    arguments: str # for ffmpeg's output
    then: tuple = () # (kind, value) of what is done to the file afterwards: a key of `AFTERWARDS`
    clock: object = FPS # seconds of frame n: n/clock, clock(n), or unknown (None)
    sizes: bool = False # the picture's size changes: such frames need not be read together
    rare: bool = False # of a kind that a backend may also refuse

    @property
    def file(self): return f'{self.name}.{self.extension}'

def again(options): return 'again', options # through ffmpeg again, with these options in front of its input
def tail(share): return 'tail', share # only the last share of the file's 188-byte packets
def twice(other): return 'twice', other # followed by a second file, made with these arguments, byte by byte
def joined(other): return 'joined', other # followed by a second file in the same container, joined by ffmpeg
def edits(*parts): return 'edits', parts # an edit list of these (from second, to second)
def replaced(old, new): return 'replaced', (old, new) # these bytes, everywhere

X264 = '-c:v libx264 -preset veryfast -sc_threshold 0 '
X265 = '-c:v libx265 -preset ultrafast -x265-params log-level=none:scenecut=0:'
MPEG4, XVID = '-c:v mpeg4 -q:v 4 ', '-c:v libxvid -q:v 4 '
MPEG1, MPEG2 = '-c:v mpeg1video -q:v 4 ', '-c:v mpeg2video -q:v 4 '
VP8 = '-c:v libvpx -deadline realtime -cpu-used 8 -b:v 400k '
VP9 = '-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 400k '
AV1 = '-c:v libsvtav1 -preset 12 -crf 40 -svtav1-params scd=0 '
SOUND = '-map 0 -map 1 -shortest '
SPEEDS = lambda n: np.where(n < 50, n/25, n/5 - 8) # frame n's second in VFR, PAUSE and JITTER
PAUSED = lambda n: n/25 + (n >= 30)*60
JITTERED = lambda n: n/25 + n%3/100
IN_MS = '-enc_time_base 1:1000 -fps_mode passthrough -vf settb=1/1000,setpts='
VFR = IN_MS + r'if(lt(N\,50)\,N*40\,N*200-8000) '
PAUSE = IN_MS + r'N*40+gte(N\,30)*60000 '
JITTER = IN_MS + r'N*40+mod(N\,3)*10 '

CASES = [
    # H.264
    Case('h264', 'mp4', X264 + '-g 25'),
    Case('h264_250', 'mp4', X264 + '-g 250'),
    Case('h264_open', 'mp4', X264 + '-g 25 -bf 3 -x264-params open-gop=1:b-pyramid=normal'),
    Case('h264_intra', 'mp4', X264 + '-g 1'),
    Case('h264_no_b', 'mp4', X264 + '-g 30 -bf 0'),
    Case('h264_refresh', 'mp4', X264 + '-g 30 -x264-params intra-refresh=1'),
    Case('h264_refresh', 'ts', X264 + '-g 30 -x264-params intra-refresh=1'),
    Case('h264_interlaced', 'mp4', X264 + '-g 25 -x264-params interlaced=1:tff=1'),
    Case('h264_interlaced', 'ts', X264 + '-g 25 -x264-params interlaced=1:tff=1'),
    Case('h264_10bit', 'mp4', X264 + '-g 25 -pix_fmt yuv420p10le'),
    Case('h264_444', 'mp4', X264 + '-g 25 -pix_fmt yuv444p -s 97x65'),
    Case('h264_full', 'mp4', X264 + '-g 25 -vf scale=out_range=pc -color_range pc'),
    Case('h264_709', 'mp4', X264 + '-g 25 -vf scale=out_color_matrix=bt709 -colorspace bt709 -color_primaries bt709 '
         '-color_trc bt709'),
    Case('h264_fragmented', 'mp4', X264 + '-g 25 -movflags frag_keyframe+empty_moov'),
    Case('h264_fragments_open', 'mp4',
         X264 + '-g 20 -x264-params open-gop=1 -movflags frag_keyframe+default_base_moof'),
    Case('h264_front', 'mp4', X264 + '-g 25 -movflags faststart'),
    Case('h264_sound', 'mp4', X264 + '-g 25 ' + SOUND),
    Case('h264_vfr', 'mp4', X264 + '-g 25 ' + VFR, clock=SPEEDS),
    Case('h264_gap', 'mp4', X264 + '-g 25 ' + PAUSE, clock=PAUSED),
    Case('h264_shaky', 'mp4', X264 + '-g 25 ' + JITTER, clock=JITTERED),
    Case('h264_90', 'mp4', X264 + '-g 25 -vf transpose=clock', again('-metadata:s:v rotate=90')),
    Case('h264_180', 'mov', X264 + '-g 25 -vf hflip,vflip', again('-metadata:s:v rotate=180')),
    Case('h264_270', 'mp4', X264 + '-g 25 -vf transpose=cclock', again('-metadata:s:v rotate=270')),
    Case('h264_cut', 'mp4', X264 + '-g 25', again('-ss 1.3')),
    Case('h264_cut_open', 'mp4', X264 + '-g 25 -x264-params open-gop=1', again('-ss 1.3')),
    Case('h264_cut_end', 'mp4', X264 + '-g 25', again('-ss 0.5 -to 3.1')),
    Case('h264_edit_key', 'mp4', X264 + '-g 25', again('-itsoffset -2')),
    Case('h264_edit_after', 'mp4', X264 + '-g 25', again('-itsoffset -1.2')),
    Case('h264_edit_after', 'mov', X264 + '-g 25 -bf 0', again('-itsoffset -1.2')),
    Case('h264_two_edits', 'mp4', X264 + '-g 25', edits((.4, 1.2), (2.2, 3.6)), clock=None),
    Case('h264_edit_back', 'mp4', X264 + '-g 25', edits((2.2, 3.2), (.2, 1.2)), clock=None),
    Case('h264_no_edits', 'mp4', X264 + '-g 25 -use_editlist 0'),
    Case('h264_negative', 'mp4', X264 + '-g 25 -movflags negative_cts_offsets'),
    Case('h264_late', 'mp4', X264 + '-g 25', again('-itsoffset 5')),
    Case('h264_edit_fragmented', 'mp4', X264 + '-g 25', again('-itsoffset -1.2 -movflags frag_keyframe+empty_moov')),
    Case('h264_joined', 'mp4', X264 + '-g 25', joined(X264 + '-g 40'), clock=None),
    Case('h264', 'mov', X264 + '-g 25'),
    Case('h264', 'mkv', X264 + '-g 25'),
    Case('h264_open', 'mkv', X264 + '-g 25 -x264-params open-gop=1'),
    Case('h264_cut', 'mkv', X264 + '-g 25', again('-ss 1.3')),
    Case('h264_cut_open', 'mkv', X264 + '-g 25 -x264-params open-gop=1', again('-ss 1.3')),
    Case('h264_live', 'mkv', X264 + '-g 25 -live 1'),
    Case('h264_sound_first', 'mkv', X264 + '-g 25 -map 1 -map 0 -shortest'),
    Case('h264_huge', 'mkv', X264 + '-g 25 -output_ts_offset 3000000'),
    Case('h264_vfr', 'mkv', X264 + '-g 25 ' + VFR, clock=SPEEDS),
    Case('h264_sizes', 'mkv', X264 + '-g 25', joined(X264 + '-g 25 -s 128x96'), clock=None, sizes=True),
    Case('h264_twice', 'mkv', X264 + '-g 25', twice(X264 + '-g 25'), clock=None),
    Case('h264', 'avi', X264 + '-g 25'),
    Case('h264_250', 'avi', X264 + '-g 250 ' + SOUND),
    Case('h264_no_b', 'avi', X264 + '-g 30 -bf 0'),
    Case('h264', 'ts', X264 + '-g 25'),
    Case('h264_open', 'ts', X264 + '-g 25 -x264-params open-gop=1 ' + SOUND),
    Case('h264_31', 'ts', X264 + '-g 25 -output_ts_offset 30000'),
    Case('h264_33', 'ts', X264 + '-g 25 -output_ts_offset 95441.5'),
    Case('h264_zero', 'ts', X264 + '-g 25 -muxdelay 0 -muxpreload 0 -output_ts_offset -0.04'),
    Case('h264_between', 'ts', X264 + '-g 25', tail(.93)),
    Case('h264_between_open', 'ts', X264 + '-g 25 -x264-params open-gop=1', tail(.93)),
    Case('h264_cut', 'ts', X264 + '-g 25', again('-ss 1.3')),
    Case('h264_twice', 'ts', X264 + '-g 25', twice(X264 + '-g 25'), clock=None),
    Case('h264_sizes', 'ts', X264 + '-g 25', twice(X264 + '-g 25 -s 128x96'), clock=None, sizes=True),
    Case('h264', 'm2ts', X264 + '-g 25'),
    Case('h264', 'flv', X264 + '-g 25'),
    Case('h264_sound', 'flv', X264 + '-g 25 ' + SOUND),
    Case('h264', '3gp', X264 + '-g 25'),
    Case('h264', 'mpg', X264 + '-g 25'),
    Case('h264', 'asf', X264 + '-g 25'),
    Case('h264_no_duration', 'flv', X264 + '-g 25 -flvflags no_duration_filesize'),
    Case('h264', 'nut', X264 + '-g 25', rare=True),
    Case('h264', 'h264', X264 + '-g 25', clock=None, rare=True),
    # HEVC
    Case('hevc_open', 'mp4', X265 + 'keyint=25:open-gop=1:bframes=3 -tag:v hvc1'),
    Case('hevc_closed', 'mp4', X265 + 'keyint=25:open-gop=0:bframes=3'),
    Case('hevc_cut', 'mp4', X265 + 'keyint=25:open-gop=1:bframes=3', again('-ss 1.3')),
    Case('hevc_edit', 'mp4', X265 + 'keyint=25:open-gop=1:bframes=3', again('-itsoffset -1.2')),
    Case('hevc_10bit', 'mp4', X265 + 'keyint=25 -pix_fmt yuv420p10le'),
    Case('hevc_open', 'mkv', X265 + 'keyint=25:open-gop=1:bframes=3'),
    Case('hevc_cut', 'mkv', X265 + 'keyint=25:open-gop=1:bframes=3', again('-ss 1.3')),
    Case('hevc_open', 'mov', X265 + 'keyint=25:open-gop=1:bframes=3'),
    Case('hevc_open', 'ts', X265 + 'keyint=25:open-gop=1:bframes=3'),
    Case('hevc_between', 'ts', X265 + 'keyint=25:open-gop=1:bframes=3', tail(.93)),
    # MPEG-4 part 2 and its relatives
    Case('mpeg4', 'avi', MPEG4 + '-g 25'),
    Case('mpeg4_b', 'avi', MPEG4 + '-g 25 -bf 2'),
    Case('mpeg4_sound', 'avi', MPEG4 + '-g 25 ' + SOUND, clock=None), # an empty chunk behind the first frame
    Case('xvid', 'avi', XVID + '-g 25'),
    Case('xvid_packed', 'avi', XVID + '-g 25 -bf 2', clock=None),
    Case('mpeg4_no_index', 'avi', MPEG4 + '-g 25', replaced(b'idx1', b'JUNK')),
    Case('mpeg4_dropped', 'avi', MPEG4 + r'-g 25 -fps_mode passthrough -vf select=mod(n\,5)', clock=None),
    Case('mpeg4_b', 'mp4', MPEG4 + '-g 25 -bf 2'),
    Case('mpeg4_b', 'mov', MPEG4 + '-g 25 -bf 2'),
    Case('mpeg4_b', 'mkv', MPEG4 + '-g 25 -bf 2'),
    Case('mpeg4', '3gp', MPEG4 + '-g 25'),
    Case('mpeg4', 'ts', MPEG4 + '-g 25 -bf 2'),
    Case('msmpeg4', 'avi', '-c:v msmpeg4 -q:v 4 -g 25'),
    Case('msmpeg4v2', 'avi', '-c:v msmpeg4v2 -q:v 4 -g 25'),
    Case('h263', '3gp', '-c:v h263 -q:v 4 -g 25 -s 128x96'),
    Case('wmv1', 'asf', '-c:v wmv1 -q:v 4 -g 25'),
    Case('wmv2', 'wmv', '-c:v wmv2 -q:v 4 -g 25 ' + SOUND),
    Case('rv20', 'rm', '-c:v rv20 -q:v 4 -g 25', clock=None, rare=True),
    Case('flv1', 'flv', '-c:v flv -q:v 4 -g 25'),
    # MPEG-1 and -2
    Case('mpeg2', 'mpg', MPEG2 + '-g 15 -bf 2'),
    Case('mpeg2_closed', 'mpg', MPEG2 + '-g 15 -bf 2 -flags +cgop -sc_threshold 1000000000'),
    Case('mpeg2_interlaced', 'mpg', MPEG2 + '-g 15 -bf 2 -flags +ildct+ilme -top 1'),
    Case('mpeg2_sound', 'vob', MPEG2 + '-f vob -g 15 -bf 2 ' + SOUND),
    Case('mpeg2_twice', 'mpg', MPEG2 + '-g 15 -bf 2', twice(MPEG2 + '-g 15 -bf 2'), clock=None),
    Case('mpeg2', 'ts', MPEG2 + '-g 15 -bf 2'),
    Case('mpeg2_between', 'ts', MPEG2 + '-g 15 -bf 2', tail(.95)),
    Case('mpeg2', 'mkv', MPEG2 + '-g 15 -bf 2'),
    Case('mpeg2', 'mp4', MPEG2 + '-g 15 -bf 2'),
    Case('mpeg2', 'mxf', MPEG2 + '-g 15 -bf 2', rare=True),
    Case('mpeg1', 'mpg', MPEG1 + '-g 15 -bf 2'),
    Case('mpeg1', 'mkv', MPEG1 + '-g 15 -bf 2'),
    # VP8, VP9, AV1, Theora
    Case('vp8', 'webm', VP8 + '-g 25'),
    Case('vp8_alpha', 'webm', VP8 + '-g 25 -pix_fmt yuva420p -auto-alt-ref 0'),
    Case('vp8_hidden', 'webm', '-c:v libvpx -cpu-used 5 -b:v 100k -auto-alt-ref 1 -lag-in-frames 16'),
    Case('vp9_hidden', 'webm', '-c:v libvpx-vp9 -cpu-used 8 -b:v 100k -auto-alt-ref 1 -lag-in-frames 16'),
    Case('vp9', 'webm', VP9 + '-g 25'),
    Case('vp9_odd', 'webm', VP9 + '-g 250 -s 97x65'),
    Case('vp9_10bit', 'webm', VP9 + '-g 25 -pix_fmt yuv420p10le'),
    Case('vp9_alpha', 'webm', VP9 + '-g 25 -pix_fmt yuva420p'),
    Case('vp9_sizes', 'webm', VP9 + '-g 25', joined(VP9 + '-g 25 -s 128x96'), clock=None, sizes=True),
    Case('vp9_vfr', 'webm', VP9 + '-g 25 ' + VFR, clock=SPEEDS),
    Case('vp9', 'mp4', VP9 + '-g 25'),
    Case('vp9_cut', 'mkv', VP9 + '-g 25', again('-ss 1.3')),
    Case('av1', 'mp4', AV1 + '-g 25'),
    Case('av1_aom', 'mp4', '-c:v libaom-av1 -usage realtime -cpu-used 8 -b:v 400k -g 25'),
    Case('av1_250', 'mkv', AV1 + '-g 250'),
    Case('av1_10bit', 'webm', AV1 + '-g 25 -pix_fmt yuv420p10le'),
    Case('av1_sizes', 'mkv', AV1 + '-g 25', joined(AV1 + '-g 25 -s 128x96'), clock=None, sizes=True),
    Case('theora', 'ogv', '-c:v libtheora -q:v 6 -g 25'),
    Case('theora_sound', 'ogv', '-c:v libtheora -q:v 6 -g 64 -c:a libvorbis ' + SOUND),
    # every frame by itself, and animations
    Case('mjpeg', 'avi', '-c:v mjpeg -q:v 3'),
    Case('mjpeg_odd', 'mov', '-c:v mjpeg -q:v 3 -s 97x65'),
    Case('mjpeg_cut', 'mp4', '-c:v mjpeg -q:v 3', again('-ss 1.3')),
    Case('prores', 'mov', '-c:v prores_ks -profile:v 1'),
    Case('prores_alpha', 'mov', '-c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le'),
    Case('prores_interlaced', 'mov', '-c:v prores_ks -profile:v 1 -flags +ildct'),
    Case('dnxhr', 'mov', '-c:v dnxhd -profile:v dnxhr_lb -pix_fmt yuv422p -s 256x128'),
    Case('dnxhr', 'mxf', '-c:v dnxhd -profile:v dnxhr_lb -pix_fmt yuv422p -s 256x128', rare=True),
    Case('dv', 'dv', '-c:v dvvideo -s 720x576 -frames:v 12', rare=True),
    Case('ffv1', 'mkv', '-c:v ffv1 -level 3 -g 10 -pix_fmt bgr0 -s 97x65'),
    Case('ffv1_10bit', 'avi', '-c:v ffv1 -level 3 -g 1 -pix_fmt yuv422p10le'),
    Case('png_alpha', 'mov', '-c:v png -pix_fmt rgba'),
    Case('qtrle', 'mov', '-c:v qtrle -pix_fmt rgb24 -g 25'),
    Case('huffyuv', 'avi', '-c:v huffyuv -pix_fmt yuv422p'),
    Case('raw', 'avi', '-c:v rawvideo -pix_fmt bgr24'),
    Case('gif', 'gif', ''),
    Case('gif_vfr', 'gif', VFR, clock=SPEEDS),
    Case('apng', 'apng', '-pix_fmt rgb24'),
]


# ---- making them

def missing():
    "Why the files cannot be made here: a sentence, or None"
    if not shutil.which('ffmpeg'): return 'not installed: ffmpeg (.ci/ffmpeg.sh installs the Debian package)'

def run(*arguments):
    "ffmpeg with these arguments; its standard output. RuntimeError with its words if it fails."
    command = ['ffmpeg', '-nostdin', '-v', 'error', '-y', '-threads', '1', *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode: raise RuntimeError(f'{" ".join(command)}: {done.stderr.decode(errors="replace")}')
    return done.stdout

def inputs(folder):
    "ffmpeg's options that read the pictures (and a tone) in front of everything that is made from them"
    path = folder/'pictures.rgb'
    if not path.exists():
        path.write_bytes(np.stack([picture(n) for n in range(COUNT)]).tobytes())
    pictures = f'-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i {path}'
    return pictures.split() + f'-f lavfi -i sine=duration={COUNT/FPS}'.split()

def encode(folder, arguments, path):
    maps = [] if '-map' in arguments else ['-map', '0']
    pixels = [] if '-pix_fmt' in arguments or path.suffix == '.gif' else ['-pix_fmt', 'yuv420p']
    run(*inputs(folder), *maps, *pixels, *arguments.split(), '-threads', '1', path)
    return path

def passed_again(folder, path, options):
    "Stream copy; options that belong to the output stand behind the input"
    front, behind = options.split(), []
    while '-metadata:s:v' in front or '-movflags' in front:
        at = next(i for i, option in enumerate(front) if option in ('-metadata:s:v', '-movflags'))
        behind += front[at:at + 2]
        del front[at:at + 2]
    out = path.with_name(f'again_{path.name}')
    run(*front, '-i', path, '-c', 'copy', *behind, out)
    out.replace(path)

def cut_front(folder, path, share):
    content = path.read_bytes()
    path.write_bytes(content[188*round(len(content)*(1 - share)/188):])

def byte_joined(folder, path, arguments):
    other = encode(folder, arguments, path.with_name(f'second_{path.name}'))
    path.write_bytes(path.read_bytes() + other.read_bytes())
    other.unlink()

def ffmpeg_joined(folder, path, arguments):
    first, second = path.with_name(f'first_{path.name}'), path.with_name(f'second_{path.name}')
    path.replace(first)
    encode(folder, arguments, second)
    names = path.with_name(f'{path.name}.txt')
    names.write_text(f"ffconcat version 1.0\nfile '{first.name}'\nfile '{second.name}'\n")
    run('-f', 'concat', '-i', names, '-c', 'copy', path)
    for file in (first, second, names): file.unlink()

def boxes(content, names, start, end):
    "Where the box lies that the path of names leads to: the (start, end) of it and of all boxes around it"
    while start < end:
        size, kind = struct.unpack_from('>I4s', content, start)
        if kind == names[0]:
            inner = boxes(content, names[1:], start + 8, start + size) if names[1:] else []
            return [(start, start + size), *inner]
        start += size
    raise ValueError(f'no box {names[0]}')

def with_edits(folder, path, parts):
    "Another edit list in the MP4's only track; its index lies behind the frames, so that these stay where they are"
    content = path.read_bytes()
    *around, (start, end) = boxes(content, [b'moov', b'trak', b'edts', b'elst'], 0, len(content))
    (*_, (header, _)), media_rate = boxes(content, [b'moov', b'mvhd'], 0, len(content)), 1 << 16
    (*_, (media, _)) = boxes(content, [b'moov', b'trak', b'mdia', b'mdhd'], 0, len(content))
    movie_scale, media_scale = (struct.unpack_from('>I', content, at + 20)[0] for at in (header, media))
    first = struct.unpack_from('>i', content, end - 8)[0] # the media time of the first picture shown
    entries = b''.join(struct.pack('>IiI', round((b - a)*movie_scale), first + round(a*media_scale), media_rate)
                       for a, b in parts)
    table = struct.pack('>I4sII', 16 + len(entries), b'elst', 0, len(parts)) + entries
    longer, content = len(table) - (end - start), bytearray(content)
    for box, box_end in around: struct.pack_into('>I', content, box, box_end - box + longer)
    path.write_bytes(content[:start] + table + content[end:])

def with_bytes(folder, path, pair):
    path.write_bytes(path.read_bytes().replace(*pair))

AFTERWARDS = dict(again=passed_again, tail=cut_front, twice=byte_joined, joined=ffmpeg_joined, edits=with_edits,
                  replaced=with_bytes)

def make(folder, case):
    path = encode(folder, case.arguments, folder/case.file)
    if case.then: AFTERWARDS[case.then[0]](folder, path, case.then[1])
    return path

def shown(path):
    "The frame numbers that ffmpeg shows, in order"
    raw = run('-i', path, '-map', '0:v:0', '-fps_mode', 'passthrough', '-s', f'{WIDTH}x{HEIGHT}', '-f', 'rawvideo',
              '-pix_fmt', 'gray', '-')
    return read_numbers(np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH)).tolist()

def in_order(path):
    "What PyAV decodes from the start: the upright frames, each uint8 [H,W,3], and which of them are key frames"
    frames, keys = [], []
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            turns = 0 if frame.rotation%90 else frame.rotation//90
            frames.append(np.rot90(frame.to_ndarray(format='rgb24'), turns))
            if frame.key_frame: keys.append(i)
    return frames, keys

def numbers_in_order(path): return [int(read_numbers(frame[None])[0]) for frame in in_order(path)[0]]

def make_all(folder):
    "Every file, two at a time, and the numbers that ffmpeg shows: a dictionary from file name to list"
    folder.mkdir(parents=True, exist_ok=True)
    inputs(folder)
    with ThreadPoolExecutor(2) as pool:
        numbers = list(pool.map(lambda case: shown(make(folder, case)), CASES))
    truth = {case.file: each for case, each in zip(CASES, numbers)}
    return truth | {file: numbers_in_order(folder/file) for file in NEWER_IS_RIGHT}

def shared(folder):
    "The files, made by the first process that asks, and what ffmpeg shows of each"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{folder}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        truth = folder/'truth.json'
        if not truth.exists():
            numbers = make_all(folder)
            truth.write_text(json.dumps(numbers))
    return json.loads(truth.read_text())


# ---- the table

def cpu_ms(function):
    "CPU time of a call: the least of three"
    def once():
        start = time.process_time()
        function()
        return 1000*(time.process_time() - start)
    return min(once() for _ in range(3))

def scattered_in_order(path, numbers):
    "What the times of the backends are compared with: PyAV from the start, only the wanted frames converted to RGB"
    wanted = set(np.linspace(0, len(numbers) - 1, 8).astype(int).tolist())
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format='rgb24') for i, frame in enumerate(container.decode(video=0)) if i in wanted]

def judge(path, case, numbers, backend):
    "How many requests came out right, were refused, or were wrong; CPU ms for eight frames all over the file, or None"
    from umt.data.video import VideoError, read_frames
    counts = Counter()
    lists = requests(COUNT if case.sizes else len(numbers), in_order(path)[1])
    for indices in lists:
        try: frames = read_frames(path, indices, backend).permute(0, 2, 3, 1).numpy()
        except VideoError: counts['refused'] += 1
        else: counts['right' if read_numbers(frames).tolist() == [numbers[i] for i in indices] else 'wrong'] += 1
    if counts['refused']: return counts, None
    return counts, cpu_ms(lambda: read_frames(path, lists[2], backend))

def cell(results, backend, files):
    "Of the files of one kind: `right`, or how many were what, and CPU time against PyAV from the start"
    counts = {key: sum(key in results[file, backend][0] for file in files) for key in ('wrong', 'refused')}
    counts['right'] = sum(results[file, backend][0].keys() == {'right'} for file in files)
    words = [f'{key} {count}' for key, count in counts.items() if count]
    if counts['right'] == len(files): words = ['right']
    times = [results[file, backend][1]/results[file, 'in order'] for file in files if results[file, backend][1]]
    return ', '.join(words) + (f' ({np.median(times):.1f}x)' if times else '')

def table(folder, backends):
    "Markdown: container x codec x backend"
    truth = shared(folder)
    results = {}
    for case in CASES:
        path, file = folder/case.file, case.file
        results[file, 'in order'] = cpu_ms(lambda: scattered_in_order(path, truth[file]))
        for backend in backends: results[file, backend] = judge(path, case, truth[file], backend)
    groups = {}
    for case in CASES: groups.setdefault((case.extension, case.name.split('_')[0]), []).append(case.file)
    lines = ['| container | codec | files | ' + ' | '.join(backends) + ' |', '|---'*(3 + len(backends)) + '|']
    for (container, codec), files in sorted(groups.items()):
        cells = [cell(results, backend, files) for backend in backends]
        lines.append(f'| {container} | {codec} | {len(files)} | ' + ' | '.join(cells) + ' |')
    totals = [sum((results[case.file, backend][0] for case in CASES), Counter()) for backend in backends]
    lines.append(f'| all | requests | {len(CASES)} | '
                 + ' | '.join(', '.join(f'{count} {key}' for key, count in total.items()) for total in totals) + ' |')
    return '\n'.join(lines)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', action='store_true', help='read the files and print the table')
    parser.add_argument('--folder', type=Path, help='where the files are made and kept; default: a temporary folder')
    parser.add_argument('--backends', nargs='+', default=['auto', 'pyav', 'decord'], help='also: torchcodec')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)/'media'
        if options.table: print(table(folder, options.backends))
        else: print('\n'.join(f'{file} {len(numbers)}' for file, numbers in shared(folder).items()))
