"""Sound and motion in: load_audio, log-mel features, data sets of windows and their preparation,
the audio encoder, the toy talker; and what the scripts' command lines have in common.

    python data.py --videos=DIR --data_dir=data/mine --weights=pretrained_weights

makes a training set of talking videos.
Letters: N samples at 16 kHz, T frames at 25 fps (640 samples each), L x A audio layers x channels.
"""
import csv
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import weakref
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from glob import glob
from itertools import islice
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from imageio_ffmpeg import get_ffmpeg_exe
from numpy.fft import irfft, rfft, rfftfreq
from numpy.lib.format import header_data_from_array_1_0, open_memmap, write_array_header_1_0
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from moda import EMOTIONS, NO_EMOTION, M, draw, explained, load_strictly, read_checkpoint
from renderer import FACE, LivePortrait, to_motion

RATE = 16000                     # samples per second
FRAME = 640                      # samples per video frame
HOP = 160                        # samples from spectrum to spectrum, 10 ms
BLOCK = 5                        # frames of sound that are read and analysed at once
RANK = int(os.environ.get("RANK", 0))              # torchrun's number of this process,
WORLD = int(os.environ.get("WORLD_SIZE", 1))       # and how many there are


def report(line):
    """A line on stderr that leaves progress bars whole."""
    tqdm.write(line, sys.stderr)


def table(text):
    """Columns under their names -> structured array; # begins a comment."""
    return np.genfromtxt(text.splitlines(), names=True, dtype=None, encoding="utf-8")


# --------------------------------------------------------------------------------- sound and video
CHILDREN = weakref.WeakSet()     # every ffmpeg that was started
# a user's file may be one of these, but no playlist, which would have ffmpeg read other files
FORMATS = ("3gp,aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,ircam,m4v,matroska,"
           "mov,mp3,mpc,mpc8,mpeg,mpegts,mpegvideo,mxf,nut,ogg,oma,rm,tak,tta,voc,w64,wav,wtv,wv")
# what starts late or has gaps is filled with silence, to stay in step
FILTERS = "aresample=async=1:first_pts=0,aformat=channel_layouts=mono|stereo"
# Of nine channels, say, nobody knows which is where: every second one goes to the left. "<" makes
# a mean of those that are there.
MANY = ("aresample=async=1:first_pts=0,pan=stereo"
        "|c0<c0+c2+c4+c6+c8+c10+c12+c14+c16+c18+c20+c22+c24+c26+c28+c30"
        "|c1<c1+c3+c5+c7+c9+c11+c13+c15+c17+c19+c21+c23+c25+c27+c29+c31")
# a path; with #t=2,5 behind it, these seconds of the file
SPAN = re.compile(r"(?s)(.*?)(?:#t=([\d.:]+),([\d.:]+))?")
# H.264 and AAC; colours as players take them to be, and tagged
CODING = ("-c:a aac -ar 48000 -c:v libx264 -preset veryfast -crf 18 -pix_fmt yuv420p -vf "
          "scale=out_color_matrix=bt709:out_range=tv,setparams=range=tv:colorspace=bt709:"
          "color_primaries=bt709:color_trc=bt709 -colorspace bt709 -color_primaries bt709 "
          "-color_trc bt709 -color_range tv")


@contextmanager
def ffmpeg(complaint, *args, **pipes):
    """A running ffmpeg; if it fails, ValueError: the complaint and what ffmpeg said."""
    # a file, for a pipe that is full would stop it
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [get_ffmpeg_exe(), "-v", "error", *args]
        # a pipe breaks when ffmpeg has ended; below, its exit code and its log say why
        with suppress(BrokenPipeError), Popen(command, stderr=log, **pipes) as child:
            CHILDREN.add(child)
            try:
                yield child
            except BaseException:
                child.kill()                       # or it waits for input forever
                raise
        log.seek(0)
        # without ffmpeg's prefixes, such as [mov @ 0x55d0]
        said = [line.split("] ")[-1].strip() for line in log]
    if child.returncode:
        # 300 letters of the first two things it said, or of its exit code: a crash says nothing
        raise ValueError(f"{complaint} ({'; '.join(said[:2]) or f'exit {child.returncode}':.300})")


def source(path, live=f"-f s16le -ar {RATE} -ac 1 -i -"):
    """ffmpeg's options to read a user's file, and no other; for the path "-" they are `live`."""
    if path == "-":
        return live.split()
    file, start, end = SPAN.fullmatch(str(path)).groups()
    options = f"-nostdin -protocol_whitelist file,pipe -format_whitelist {FORMATS}".split()
    if start:
        options += "-ss", start, "-to", end
    return [*options, "-i", f"file:{file}"]


def decoded(path, what, options, size):
    """ffmpeg's output for a file, in pieces of `size` bytes, of which the last may be shorter;
    ValueError if there is none."""
    options = f"-abort_on empty_output {options} -"
    with ffmpeg(f"{path}: no {what} could be read", *source(path), *options.split(),
                stdout=PIPE) as decoder:
        while piece := decoder.stdout.read(size):
            yield piece


class Sound:
    """Any sound that ffmpeg reads, or a video's: iterate for blocks of float32 (BLOCK * FRAME,), 16
    kHz, mono.

    Of several tracks it is the default one. A file is read once before, for its length in `frames`
    and to see whether two channels cancel in their mean: then the louder one is taken. "-" is
    stdin, 16-bit mono of 16 kHz, of unknown length. ValueError: there is no sound."""

    frames, column, filters = None, 0, FILTERS

    def __init__(self, path):
        self.path = path
        if path == "-":
            return
        try:
            # Read to its end. Of blocks(), only the first would be needed, but then Python frees an
            # unfinished generator, and drops a Ctrl-C that comes meanwhile.
            list(decoded(path, "sound", f"-t 0.1 -af {FILTERS} -f s16le", RATE))
        except ValueError:                         # too many channels; or no sound, fails below
            self.filters = MANY
        n, power = 0, np.zeros(3)                  # of the mean, the left and the right channel
        for block in self.blocks():
            if not np.isfinite(block).all():
                raise ValueError(f"{path}: the sound holds NaN or infinite samples")
            n += len(block)
            power += np.square(block, dtype=float).sum(0)
        self.frames = math.ceil(n / FRAME)
        if max(power) < 1e-6 * n:                  # -60 dBFS
            report(f"{path}: all but silent; if it has another track, take that one out")
        if 16 * power[0] < max(power):             # 12 dB
            self.column = power.argmax()
            report(f"{path}: its channels cancel; the louder one is taken")

    def blocks(self):
        """Columns (n, 3): the channels' mean, the left one, the right one."""
        # mono has no right channel, and so silence there; 12 bytes: 3 columns
        options = f"-af {self.filters},pan=3c|c0<c0+c1|c1=c0|c2=c1 -ar {RATE} -f f32le"
        for piece in decoded(self.path, "sound", options, 12 * BLOCK * FRAME):
            yield np.frombuffer(piece, np.float32).reshape(-1, 3)

    def __iter__(self):
        for block in self.blocks():
            yield block[:, self.column]


def load_audio(path):
    """Any sound, or a video's -> float32 (N,), 16 kHz mono, about -1..1; ValueError if none."""
    return np.concatenate(list(Sound(path)))


@contextmanager
def appearing(path):
    """A place to write to; what is there moves to `path` when all has succeeded, and only then.
    "-", which is stdout, and "" are left alone."""
    path = Path(path)
    if str(path) in ("-", "."):
        yield path
        return
    part = path.with_name(f".part-{path.name}")
    part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_video(path, frames, sound, pipe=None):
    """Encode a generator of frames (H, W, 3) as they come, with their Sound, at 25 fps.

    "-" is stdout. ffmpeg reads a sound's file by itself. Only stdin, which the caller has read, is
    handed on, as float32: `pipe` is the reading end of an os.pipe."""
    target = [f"file:{path}"]
    if path.name == "-":
        target = "-tune zerolatency -f mpegts -".split()
    pipes = [pipe] if pipe else []
    # the second argument counts for "-" alone
    voice = source(sound.path, f"-f f32le -ar {RATE} -ac 1 -i pipe:{pipe}")
    options = f"-f ppm_pipe -framerate 25 -i - -af {sound.filters} {CODING}"
    with ffmpeg(f"{path.name}: could not be written", "-vn", "-sn", "-dn", *voice,
                *options.split(), *target, stdin=PIPE, pass_fds=pipes) as encoder:
        for pipe in pipes:
            os.close(pipe)                         # ffmpeg has its own
        for frame in frames:
            # a PPM picture by hand: no signal could end Pillow's loop in C while a pipe is full
            header = b"P6 %d %d 255\n" % frame.shape[1::-1]
            encoder.stdin.write(header + frame.tobytes())


def regroup(pieces, size):
    """Cut a stream of arrays (n,) into float64 arrays (size,), of which the last may be shorter."""
    waiting = np.empty(0)
    for piece in pieces:
        waiting = np.concatenate([waiting, piece])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


HERTZ = rfftfreq(512, 1 / RATE)    # the 257 frequencies of a spectrum
# BANDS: where each of them lies among 40 triangles; their middles are 1 .. 40,
# equally spaced on the mel scale, log(700 + Hz); 0 and 41 are its ends, 60 and 7600 Hz.
BANDS = np.interp(np.log(700 + HERTZ), np.log([760, 8300]), [0, 41])
# the triangles themselves, (257, 40)
MEL = (1 - np.abs(BANDS[:, None] - np.arange(1, 41))).clip(0)
# (257,): how much of a power is heard; within 1.5 dB of A-weighting (IEC 61672) above 50 Hz
HEARD = (HERTZ / np.hypot(HERTZ, 300)) ** 4
SILENCE = 1e-7                   # -70 dBFS, as heard: what is softer is not made louder


def log_mel_blocks(pieces):
    """Sound in pieces of any length -> log-mel features of BLOCK frames, (n, 1, 160), at once.

    Four 40-band spectra of 25 ms per frame; 0 is silence. A spectrum looks back, never ahead, and
    blocks have one size: the features of a sound are the same to the bit however it was cut.

    A block's power is divided by one level, the greatest of four: the mean of what was heard in the
    last five seconds, this block included; a fifth of what is heard in this block; the level
    before, less 0.2 dB; SILENCE. So the gain of a recording does not matter, and its rumble only in
    the lowest bands; pauses of some seconds stay silent."""
    taper = np.hanning(400) / 200                  # 25 ms; its sum is nearly 1
    wav = np.zeros(400)
    last, level = [], SILENCE
    for block in regroup(pieces, BLOCK * FRAME):
        silence = np.zeros(BLOCK * FRAME - len(block))
        wav = np.concatenate([wav[HOP - 400:], block, silence])        # 240 samples from before
        spans = np.lib.stride_tricks.sliding_window_view(wav, 400)[::HOP]
        power = np.abs(rfft(spans * taper, 512)) ** 2
        last = [*last[-24:], np.mean(power @ HEARD)]                   # 25 blocks are 5 s
        # 10 ** -0.02 are -0.2 dB, 1 dB a second
        level = max(np.mean(last), last[-1] / 5, level * 10 ** -0.02, SILENCE)
        # logarithmic above a 60th of the level; of speech, mostly 0 to 1; toy_voice undoes this
        features = np.log1p(60 * power @ MEL / level) / 3
        frames = math.ceil(len(block) / FRAME)
        yield torch.tensor(features).float().view(BLOCK, 1, -1)[:frames]


def log_mel(wav, n_frames=None):
    """wav (N,) -> (T, 1, 160), T = ceil(N / 640), or n_frames, to which the sound is cut, or filled
    up with silence; see log_mel_blocks."""
    if n_frames:
        wav = np.pad(wav, (0, n_frames * FRAME))[:n_frames * FRAME]
    return torch.cat(list(log_mel_blocks([wav])))


def feature_blocks(encoder, device):
    """The function from pieces of sound to pieces of features: an encoder's, or log-mel."""
    if encoder:
        return AudioEncoder.from_pretrained(encoder).to(device).blocks
    return log_mel_blocks


# --------------------------------------------------------------------------- windows and data sets
# A data set is a folder: clips/VIDEO/motion.npy (T, 70), audio.npy (T, L, A) in float16,
# identity.npy (63,), loudness.npy (T,), which tests/tools/check.py compares with the mouth; and
# manifest.json, which alone knows labels and is asked for lengths. A clip that was left out is a
# file in place of a folder, which says why.

def opened(folder, *names):
    """Arrays of a clip, memory-mapped. ValueError if it is damaged or was left out."""
    try:
        return [open_memmap(folder / f"{name}.npy", mode="r") for name in names]
    except Exception as error:
        why = folder.read_text() if folder.is_file() else error
        raise ValueError(f"{folder}: cannot be used ({why}); delete it and prepare the data "
                         "again")


def read_frames(path, frames, start, T):
    """Fill an array with the frames from `start` on, of T in a clip's .npy file; ValueError or
    OSError: it is damaged."""
    header = 128                                   # bytes, as np.save writes it
    frame = frames[0].nbytes
    with open(path, "rb") as file:
        file.seek(header + start * frame)
        file.readinto(frames)
    # NaN and infinity survive in a row's sum, which is quicker than a look at each number
    finite = torch.from_numpy(frames).sum(-1).isfinite().all()
    if path.stat().st_size != header + T * frame or not finite:
        raise ValueError(f"{path.stem} is of another size, or not finite")


class Clips:
    """Windows of 1 + 80 consecutive frames (Sec. 4.1.2) of the clips that data.py prepared.

    An item: motion (80, 70) and prev (70,), the frame before, in LivePortrait units; audio
    (80, L, A) in float16; emotion; identity (63,). ValueError names a clip that cannot be read."""

    frames, audio_type = 80, "f2"

    def __init__(self, folder, split="train"):
        """The "train" or "val" clips of a data set, or "" for both; ValueError if it is damaged."""
        path = Path(folder, "manifest.json")
        with explained(f"{path}: no {split} clips there; prepare a data set: data.py --videos=DIR"):
            manifest = json.loads(path.read_text())
            rows = [row for row in manifest["clips"] if split in ("", row["split"])]
            self.names = [path.parent / "clips" / row["clip"] for row in rows]
            self.index(rows, manifest["audio_shape"], manifest["moments"], manifest["x_c_moments"])

    def index(self, rows, audio_shape, moments, x_c_moments):
        """What every kind of data set knows of its clips, without opening them."""
        self.lengths = np.array([row["frames"] for row in rows])
        self.emotion = [row["emotion"] for row in rows]
        self.voices = [row.get("voice") for row in rows]               # files
        L, A = self.audio_shape = tuple(map(int, audio_shape))         # fails if they are not two
        self.moments = torch.tensor(moments).view(2, M)                # mean and std of the motion,
        self.x_c_moments = torch.tensor(x_c_moments).view(2, 63)       # and of the faces
        windows = np.maximum(self.lengths - self.frames, 0)            # each with a frame before
        self.first = np.cumsum([0, *windows])                          # each clip's first window
        if not len(self):
            raise ValueError("none is listed that is as long as a window")

    def read(self, k, start, motion, audio, identity):
        """Fill motion (1 + n, 70), audio (n, L, A), the first frame's left out, identity (63,)."""
        folder, T = self.names[k], self.lengths[k]
        read_frames(folder / "motion.npy", motion, start, T)
        read_frames(folder / "audio.npy", audio, start + 1, T)
        read_frames(folder / "identity.npy", identity, 0, 63)     # frames of one number

    def windows(self, candidates, damaged, frames=frames):             # 80, from above
        """A batch of windows. `candidates` has a row of numbers for each of them: alternatives, of
        which the first that can be read is used; lines about those before it go to the list
        `damaged`. ValueError: none of a row can be read. `frames`: 80, or for evaluation, which
        knows that the clips are long enough, up to 184 (two chunks of 100 that share 16)."""
        n = len(candidates)
        motion = np.empty((n, 1 + frames, M), "f4")
        audio = np.empty((n, frames, *self.audio_shape), self.audio_type)
        identity = np.empty((n, 63), "f4")
        emotion = []
        # clips are read straight into the batch: to copy them there would take the time twice
        for row, *window in zip(candidates, motion, audio, identity):
            for i in row:
                k = np.searchsorted(self.first, i, side="right") - 1
                try:
                    self.read(k, i - self.first[k], *window)
                    emotion.append(self.emotion[k])
                    break
                except (ValueError, OSError) as error:
                    damaged.append(f"{self.names[k]}: cannot be used ({error}); delete it and "
                                   "prepare the data again")
        if len(emotion) < n:
            raise ValueError(damaged[-1])
        batch = dict(
            motion=motion[:, 1:],
            prev=motion[:, 0],
            audio=audio,
            identity=identity,
            emotion=np.array(emotion))
        return {name: torch.from_numpy(x) for name, x in batch.items()}

    def __len__(self):
        return self.first[-1]

    def __getitem__(self, i):
        return {name: x[0] for name, x in self.windows([[i]], []).items()}


def draw_batch(step, data, cfg, settings):
    """This process's part of the batch of a step, and lines about windows that cannot be read.

    Windows, times, noise and dropped conditions are drawn for all processes alike; ten candidates
    for each window, of which the first that can be read is used."""
    generator = torch.Generator().manual_seed((settings.seed * 10**9 + step) % 2**63)
    index = torch.randint(len(data), (settings.batch_size, 10), generator=generator)
    drawn = draw(cfg, settings.batch_size, data.frames, generator)
    damaged = []
    batch = data.windows(index.chunk(WORLD)[RANK].tolist(), damaged)
    for name, x in drawn.items():
        batch[name] = x.chunk(WORLD)[RANK]
    return batch, damaged


def read_ahead(data, model, settings, steps):
    """Batches of some steps, each read while earlier ones are used, by threads: reading and summing
    release Python's lock, and a batch need not be sent from process to process.

    Other windows stand in for those that cannot be read. ValueError: these are more than 1 % of all
    windows that this process reads in a whole training; validations have the same limit."""
    steps = iter(steps)
    coming = []
    damaged = 0
    with ThreadPoolExecutor(settings.workers) as pool:
        while True:
            # one batch to wait for, and as many behind it as there are workers
            more = islice(steps, 1 + settings.workers - len(coming))
            coming += [pool.submit(draw_batch, step, data, model.cfg, settings) for step in more]
            if not coming:
                return
            batch, reports = coming.pop(0).result()                    # or what the thread raised
            for line in reports:
                report(f"passed over: {line}")
            damaged += len(reports)
            if damaged > 0.01 * settings.steps * settings.batch_size / WORLD:
                raise ValueError(f"over 1 % of the windows cannot be read: {reports[-1]}")
            yield {name: x.to(model.mean.device) for name, x in batch.items()}


def moments_of(motions):
    """Mean and standard deviation of many (T, n), in one pass: (2, n)."""
    sums = 0
    for motion in motions:
        motion = np.asarray(motion, float)
        # numbers of frames, sums, sums of squares: (3, n)
        sums += np.stack([motion ** k for k in range(3)]).sum(1)
    mean, square = sums[1:] / sums[0]
    return np.stack([mean, (square - mean ** 2).clip(0) ** 0.5])


# ------------------------------------------------------------------------------------- preparation
VIDEOS = "3gp|avi|flv|m4v|mkv|mov|mp4|mpeg|mpg|mts|ts|webm|wmv"
VIDEO = re.compile(rf"(?i)\.({VIDEOS})$")
# our names, and MEAD's folders where they differ
LABELS = {name: k for k, name in enumerate(EMOTIONS)}
LABELS |= dict(angry=0, disgusted=2, happy=4, sad=6, surprised=7)


def read_rows(path):
    """csv file, whose first line names the columns -> [{column: text}, ...]; ValueError if it is
    none."""
    with explained(f"{path}: cannot be used; should be CSV, in UTF-8"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, restval="", skipinitialspace=True))


def plain(name):
    """A clip as labels name it: in lower case, without ./ and without a video's suffix."""
    return VIDEO.sub("", name.strip().lower()).removeprefix("./")


def read_labels(path):
    """csv file -> {clip: number}; a clip is a path below --videos, a name or a folder."""
    rows = read_rows(path) if path else []
    with explained(f"{path}: cannot be used; expected lines clip,emotion of {' '.join(LABELS)}"):
        return {plain(row["clip"]): LABELS[plain(row["emotion"])] for row in rows}


def find_clips(settings):
    """{clip: its row of the table}; without a table, of every video in the folder. Paths are below
    --videos.

    For M003/angry/level_3/001.mp4 the labels are asked for this path, without its .mp4, then for
    001, level_3, angry and M003 (all in lower case). What they do not know says the row's own
    emotion or, third, the nearest folder that is called like one, here angry. The speaker, if the
    row has none, is the first folder, here m003, or without folders the video."""
    labels = read_labels(settings.labels)
    if settings.clips:
        rows = read_rows(settings.clips)
    else:                                          # also in linked folders, each once
        paths = filter(VIDEO.search, glob("**", root_dir=settings.videos, recursive=True))
        # of several paths to one video the shortest comes last, and so replaces the others
        videos = {os.path.realpath(Path(settings.videos, path)): dict(video=path)
                  for path in sorted(paths, key=len, reverse=True)}
        rows = videos.values()
    clips = {}
    for row in rows:
        row = defaultdict(str, row)
        if row["start"] + row["end"]:              # texts; either may be empty
            row["span"] = f"#t={row['start'] or 0},{row['end'] or 99999}"
        name = f"{row['video']}{row['span']}@{row['crop']}"
        # it names a folder below clips/: no ../ in it, no / before it, no @ without a crop
        name = name.replace("../", "up/").strip("@./")
        video = Path(plain(row["video"]))
        # its path, its name, its folders from the nearest on
        names = [str(video), *video.parts[::-1]]
        found = [labels[key] for key in names if key in labels]
        found += [LABELS[key] for key in (plain(row["emotion"]), *names[2:]) if key in LABELS]
        row["emotion"] = [*found, NO_EMOTION][0]
        row["speaker"] = row["speaker"] or names[-1]
        voice = Path(settings.videos, row["audio"] or row["video"]).absolute()
        row["voice"] = f"{voice}{row['span']}"
        if row["video"]:
            clips[name] = row
    if not clips:
        raise ValueError(f"{settings.clips or settings.videos}: no videos there; "
                         f"looked for {VIDEOS}")
    return clips


def pictures(path, crop, batch=16):
    """The square around the face at 25 fps, from time 0: uint8 tensors (batch, 256, 256, 3)."""
    x, y, size = "(iw-min(iw,ih))/2", "(ih-min(iw,ih))/2", "min(iw,ih)"
    if crop:
        x, y, size = crop.split(",")
    # a square that leaves the picture gets size 0, which fails; ffmpeg would move it inside
    inside = f"gte({x},0)*gte({y},0)*lte({x}+{size},iw)*lte({y}+{size},ih)"
    square = f"crop='if({inside},{size},0)':'{size}':'{x}':'{y}':exact=1"
    # sar: pixels need not be square
    filters = f"fps=25:start_time=0,scale=iw*sar:ih,{square},scale=256:256:flags=area"
    options = f"-map 0:V:0 -vf {filters} -pix_fmt rgb24 -f rawvideo -xerror"
    for piece in decoded(path, f"picture with crop {crop}", options, batch * 256 * 256 * 3):
        yield torch.tensor(np.frombuffer(piece, np.uint8)).view(-1, 256, 256, 3)


@torch.inference_mode()
def extract(row, settings, face, features):
    """The arrays of a clip, in blocks; ValueError if it cannot be used."""
    path = Path(settings.videos, row["video"])
    wav = load_audio(row["voice"])
    # one array for all, since many small ones, kept between large ones that are freed, would
    # fragment memory
    frames = torch.empty(len(wav) // FRAME, M + 63)
    T = 0
    for images in pictures(f"{path}{row['span']}", row["crop"] or settings.crop):
        heads = face.M(images.to(face.device).movedim(-1, 1) / 255)
        part = torch.cat([to_motion(heads), heads["kp"]], 1)[:len(frames) - T]
        frames[T:T + len(part)] = part
        T += len(part)
    motion, x_c = frames[:T].split([M, 63], 1)
    if T <= Clips.frames:
        raise ValueError(f"{path}: {T} frames of picture and sound; a window is {Clips.frames + 1}")
    wav = wav[:T * FRAME]
    # the sound in one piece, for an encoder's features depend on where it is cut (it cuts minutes
    # by itself); identity is the mean of all frames
    return dict(
        motion=[motion.contiguous()],
        audio=(block.half() for block in features([wav])),
        identity=[x_c.mean(0)],
        loudness=[log_mel(wav).mean((1, 2))])


def save(path, state, write=torch.save):
    """Write a file so that neither crash nor full disk harms the one that it replaces."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as part:
            write(state, part)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:       # torch.save's
        raise OSError(f"{path}: could not be saved ({error}); an earlier one stays")


def write_npy(blocks, path):
    """Frames that come in blocks, of which one is in memory; ValueError if they are not finite."""
    n = 0
    with open(path, "wb") as file:
        file.seek(128)                             # the header, which is known at last
        for block in blocks:
            if not block.isfinite().all():
                raise ValueError(f"{path}: holds NaN or infinity")
            file.write(block.numpy())
            n += len(block)
        header = header_data_from_array_1_0(block.numpy())
        header["shape"] = n, *block.shape[1:]
        file.seek(0)
        write_array_header_1_0(file, header)


def write_json(x, path):
    path.write_text(json.dumps(x))


def write_clip(folder, *work):
    """A folder of .npy files that appears when it is complete, or a file that says why there is
    none; work: what `extract` takes."""
    part = folder.with_name(f"{folder.name}.part")
    try:
        for name, blocks in extract(*work).items():
            save(part / f"{name}.npy", blocks, write=write_npy)
        part.rename(folder)
    except ValueError as error:
        shutil.rmtree(part, ignore_errors=True)
        save(folder, str(error), write=write_json)


def prepare(settings):
    """Talking videos -> a data set, or more of one. Processes share the clips; a run that was cut
    off goes on; bad videos are listed."""
    clips = find_clips(settings)
    face = LivePortrait(settings.weights, settings.device)
    features = feature_blocks(settings.audio_encoder, settings.device)
    folder = Path(settings.data_dir)
    if RANK == 0:
        manifest = begin(folder / "manifest.json", settings)
    if WORLD > 1:                                  # all wait for the first one
        torch.distributed.init_process_group("gloo", timeout=timedelta(weeks=9))
    for name, row in tqdm([*clips.items()][RANK::WORLD], "preparing", disable=RANK > 0):
        clip = folder / "clips" / name
        if not clip.exists():
            write_clip(clip, row, settings, face, features)
    if WORLD > 1:
        torch.distributed.barrier()
    if RANK == 0:
        complete(folder, manifest, clips)


def begin(path, settings):
    """Begin a manifest, or go on with one; ValueError if it was begun with other settings: another
    crop or networks, known by checksums of their files."""
    files = (f"{settings.weights}/base_models/motion_extractor.pth",
             f"{settings.weights}/liveportrait/base_models/motion_extractor.pth",
             settings.audio_encoder, f"{settings.audio_encoder}/pytorch_model.bin")
    begun = dict(crop=settings.crop, networks=[
        zlib.crc32(Path(file).read_bytes()) for file in files if os.path.isfile(file)])
    if not path.exists():
        manifest = dict(settings=begun, splits={}, clips=[], left_out={})
        save(path, manifest, write=write_json)
    manifest = json.loads(path.read_text())
    if manifest.get("settings") != begun:
        raise ValueError(f"{path}: begun with other settings ({manifest.get('settings')}); "
                         "use another --data_dir")
    return manifest


def complete(folder, manifest, clips):
    """Write the manifest of all clips, prepared now or before, and report.

    The first speaker trains, the second validates; of the others one in 20 validates, by a hash of
    the name. Who has a split keeps it."""
    clips = {row["clip"]: row for row in manifest["clips"]} | clips
    splits, left_out, rows = manifest["splits"], manifest["left_out"], []
    for name, row in sorted(clips.items()):
        clip = folder / "clips" / name
        try:
            motion, audio = opened(clip, "motion", "audio")
        except ValueError as error:
            left_out[name] = str(error)
            continue
        left_out.pop(name, None)
        speaker = row["speaker"]
        lot = zlib.crc32(os.fsencode(speaker)) % 20
        # a new speaker: the first trains, the second (`splits` holds one) validates; then by lot
        splits.setdefault(speaker, "val" if len(splits) == 1 or splits and lot == 0 else "train")
        rows.append(row | dict(clip=name, frames=len(motion), split=splits[speaker]))
    print(f"{folder}: {len(rows)} clips; {len(left_out)} left out", *left_out.values(), sep="\n")
    if not rows:
        raise ValueError(f"{folder}: none of its {len(clips)} videos can be used")
    training = [row for row in rows if row["split"] == "train"] or rows
    training = [folder / "clips" / row["clip"] for row in training]
    manifest |= dict(
        audio_shape=audio.shape[1:],               # the last clip's; all have the same
        moments=moments_of(opened(clip, "motion")[0] for clip in training).tolist(),
        # no [0]: an identity (63,) in a list of one is like a motion of one frame, (1, 63)
        x_c_moments=moments_of(opened(clip, "identity") for clip in training).tolist(),
        clips=rows)
    save(folder / "manifest.json", manifest, write=write_json)


# ------------------------------------------------------------------------------- the audio encoder
class AudioEncoder(nn.Module):
    """A public base-size wav2vec 2.0 or HuBERT, at 25 frames per second as in the released MoDA.

    GroupNorm and attention see all of the sound that they are given, a minute at most: features
    depend on where it is cut, so encode first, cut then."""

    def __init__(self, channels=512, width=768, hidden=3072, depth=12, groups=16, heads=12):
        super().__init__()
        first = nn.Conv1d(1, channels, 10, stride=5, bias=False)
        group_norm = nn.GroupNorm(channels, channels)
        self.convs = nn.ModuleList([nn.Sequential(first, group_norm)])
        for kernel in 3, 3, 3, 3, 2, 2:
            self.convs.append(nn.Conv1d(channels, channels, kernel, stride=2, bias=False))
        self.projection = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        position = nn.Conv1d(width, width, 128, padding=64, groups=groups)
        self.position = weight_norm(position, dim=2)
        self.norm = nn.LayerNorm(width)
        post_norm = nn.TransformerEncoderLayer(
            width, heads, hidden, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(post_norm, depth).layers
        self.eval()

    def forward(self, wav):
        """Sound (640 T,) -> the outputs of all L layers, (T, L, A)."""
        x = wav[None, None]
        # 80 samples more make 2 T frames; mirrored by 20 at each end, and again by 20, as released
        for _ in range(2):
            x = F.pad(x, (20, 20), mode="reflect")
        for conv in self.convs:
            x = F.gelu(conv(x))                                        # (1, channels, 2 T) at last
        x = F.interpolate(x, x.size(-1) // 2, mode="linear", align_corners=True)       # to 25 Hz
        x = self.projection(x.mT)                                      # (1, T, A)
        near = F.gelu(self.position(x.mT)[..., :-1])                   # an even kernel: T + 1
        x = self.norm(x + near.mT)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x[0])
        return torch.stack(outputs, 1)

    @torch.inference_mode()
    def blocks(self, pieces):
        """Sound in pieces of any length -> features (n, L, A) of a minute at a time."""
        for wav in regroup(pieces, 60 * RATE):
            x = self.norm.weight.new_tensor(wav)                       # with its type and device
            x = F.layer_norm(x, x.shape, eps=1e-7)                     # loudness does not matter
            x = F.pad(x, (0, -len(x) % FRAME))                         # silence to a whole frame
            yield self(x).cpu()

    @classmethod
    def from_pretrained(cls, path):
        """A public base-size file or its folder; ValueError if it is another network or broken."""
        model = cls()
        path = Path(path)
        if path.is_dir():
            path /= "pytorch_model.bin"
        with explained(f"{path}: not a base-size wav2vec 2.0 or HuBERT, or incomplete; get "
                       "facebook/wav2vec2-base-960h or TencentGameMate/chinese-hubert-base"):
            # into the model's own tensors, which state_dict holds
            load_strictly(model.state_dict(), encoder_tensors(read_checkpoint(path)))
        return model


# Left: parts of names in public files. Right: what takes their place, in this order, to make names
# of AudioEncoder, of PyTorch's layer and of its weight_norm.
RENAMED = table("""
    public                                      ours
    feature_extractor.conv_layers.0.conv        convs.0.0
    feature_extractor.conv_layers.0.layer_norm  convs.0.1
    feature_extractor.conv_layers               convs
    feature_projection.layer_norm               projection.0
    feature_projection.projection               projection.1
    encoder.pos_conv_embed.conv                 position
    weight_g                                    parametrizations.weight.original0
    weight_v                                    parametrizations.weight.original1
    encoder.layers                              layers
    encoder.layer_norm                          norm
    attention.out_proj                          self_attn.out_proj
    feed_forward.intermediate_dense             linear1
    feed_forward.output_dense                   linear2
    final_layer_norm                            norm2
    .layer_norm                                 .norm1  # what is left: a layer's first one
    .conv.                                      .       # convs.1.conv.weight: convs.1.weight""")


def encoder_tensors(file):
    """A public file's tensors by our names."""
    tensors = {}
    for key, value in file.items():
        # the rest served its training
        if public := re.search(r"\b(feature_extractor|feature_projection|encoder)\..*", key):
            key = public[0]
            for theirs, ours in RENAMED:
                key = key.replace(theirs, ours)
            tensors[key] = value
    for key in [key for key in tensors if "q_proj" in key]:            # q, k, v -> in_proj
        qkv = [tensors.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        tensors[key.replace("attention.q_proj.", "self_attn.in_proj_")] = torch.cat(qkv)
    return tensors


# ---------------------------------------------------------------------------------- the toy talker
# A made-up talker in LivePortrait's own 70 numbers: syllables of a formant synthesiser, and the
# motion of mouth, head, brows and lids that belongs to them. The emotion acts on the face and, in
# over half of the clips, on the voice; identity on the lips.

# Controls are like LivePortrait's sliders for expressions: aaa opens the mouth, eee widens and woo
# rounds it, brow raises; below 0 blink shuts the lids and frown knits the brows. A row: by how many
# thousandths one of the 63 channels, 3 point + axis, moves per unit of each control; point and axis
# stand behind it.
MOVES = table("""
    channel  aaa  eee  woo  smile  brow  frown  blink  sneer  smirk
    58       1    0    0    0      0     0      0      0      0        # 19 y
    59       .1   0    0    0      0     0      0      0      0        # 19 z
    61       0    -1   0    -10    0     0      0      0      -1       # 20 y
    62       0    -1   0    0      0     0      0      0      0        # 20 z
    43       0    -1   1    -20    0     0      0      0      0        # 14 y
    52       -.1  0    0    6.5    0     0      0      -1     0        # 17 y
    53       0    0    -.5  3      0     0      0      0      0        # 17 z
    10       0    0    -.5  -3.5   0     0      0      -.4    0        # 3 y
    22       0    0    -.5  -3.5   0     0      0      -.4    -.4      # 7 y
    3        0    0    0    0      0     -1     0      0      0        # 1 x
    6        0    0    0    0      0     1      0      0      0        # 2 x
    4        0    0    0    0      1     .3     0      0      0        # 1 y
    7        0    0    0    0      -1    -.3    0      0      -1       # 2 y
    34       0    0    0    0      0     0      -1     0      0        # 11 y
    46       0    0    0    0      0     0      -1     0      0        # 15 y
    40       0    0    0    -2.75  0     0      .3     -.4    0        # 13 y
    49       0    0    0    -2.75  0     0      .3     -.4    0        # 16 y""")
CONTROLS = {}
for name in MOVES.dtype.names[1:]:
    # adds the number of each row at its channel: (63,)
    CONTROLS[name] = np.bincount(MOVES["channel"], MOVES[name] / 1000, 63)


def expression(**controls):
    """Sum of the controls; each a number or (T,) -> (63,) or (T, 63)."""
    return sum(np.multiply.outer(x, CONTROLS[name]) for name, x in controls.items())


# three formants in kHz; how much voice and hiss; the hiss's centre in kHz; lips, as controls, but
# of aaa only what does not depend on loudness: toy_clip adds the larger part
PHONES = table("""
    phone  kind       f1   f2    f3    voice  hiss  centre  seconds  aaa  eee  woo
    a      vowel      .75  1.25  2.55  1      .05   3       .17      13   1    0
    e      vowel      .52  1.85  2.55  1      .05   3       .15      6    6    0
    i      vowel      .3   2.25  2.9   .8     .05   3       .14      3    10   0
    o      vowel      .48  .9    2.45  1      .05   3       .16      7    0    10
    u      vowel      .32  .8    2.3   .8     .05   3       .15      2    0    12
    @      vowel      .52  1.45  2.55  .8     .05   3       .1       5    1    1
    m      consonant  .26  1     2.55  .3     0     3       .09      -4   0    1
    b      consonant  .22  .9    2.55  .06    .01   2       .08      -3   0    0
    n      consonant  .28  1.6   2.55  .3     0     3       .07      .5   2    0
    t      consonant  .3   1.8   2.55  0      .15   5       .07      .5   2    0
    s      consonant  .3   1.7   2.55  0      .35   6       .1       .25  5    0
    S      consonant  .3   1.8   2.55  0      .35   3       .1       .5   0    7
    f      consonant  .3   1.2   2.55  0      .12   7       .09      -1.5 1    0
    l      consonant  .38  1.3   2.7   .5     .03   3       .07      1.5  1    0
    w      consonant  .3   .65   2.4   .5     .03   3       .08      1    0    12
    pause  pause      .48  1.45  2.55  0      0     3       .5       0    0    0""")
# a syllable's sounds, in their order: how often there is one, and factors on its length
SYLLABLE = table("""
    kind       chance  shortest  longest
    consonant  .9      .8        1.25
    vowel      1       .8        1.25
    consonant  .25     .8        1.25
    pause      .17     .3        1.8""")
# of each emotion: controls that it holds, and factors on the voice
MANNERS = table("""
    emotion    aaa  eee  woo  smile  brow  frown  blink  sneer  smirk  pitch  range  rate
    anger      3    0    0    -.2    -2    -9     1.5    0      0      1.15   1.3    1.15
    contempt   -3   0    0    .05    0     0      -4     0      8      .9     .7     .9
    disgust    -2   0    0    -.15   0     -6     -2.5   6      0      .85    .9     .85
    fear       2    5    0    -.25   11    -7     4      0      0      1.3    1      1.2
    happiness  3    0    0    .9     3     0      -2     0      0      1.2    1.5    1.1
    neutral    0    0    0    0      0     0      0      0      0      1      1      1
    sadness    -3   0    0    -.3    6     -5     -5     0      0      .9     .6     .8
    surprise   9    0    5    0      14    0      5      0      0      1.3    1.6    1""")
# a head's rest, mean and standard deviation over clips; how far it drifts, trembles, and nods with
# the voice
HEAD = table("""
    channel  mean  spread  drift  tremor  nod
    scale    1.3   .05     .006   .001    0
    t_x      0     .02     .012   .0008   0
    t_y      .1    .02     .006   .0008   0
    t_z      0     0       0      0       0
    pitch    -1    2       2.5    .2      3
    yaw      0     4       5      .2      0
    roll     0     1.5     2      .15     0""")


def smooth(track, width):
    """Gaussian average of (n,), mirrored at its ends; width (standard deviation) in samples."""
    kernel = torch.signal.windows.gaussian(6 * width + 1, std=width).numpy()
    mirrored = np.pad(track, 3 * width, mode="reflect")
    return np.convolve(mirrored, kernel / kernel.sum(), "valid")


def wander(rng, width, n):
    """Smooth noise of unit variance, (n,); width in samples."""
    # a Gaussian's squares sum to (4 pi)^-0.5 / width; 1.88 is (4 pi)^0.25
    return 1.88 * width ** 0.5 * smooth(rng.standard_normal(n), width)


def toy_clip(seed, T):
    """One clip of the toy talker: wav (T * 640,), motion (T, 70), emotion, identity (63,). Below 29
    frames it may be one pause, and wav then NaN."""
    rng = np.random.default_rng(seed)
    emotion = rng.integers(8)
    manner = MANNERS[emotion]
    voice = rng.choice([manner, rng.choice(MANNERS)])                  # the face's tone, or any
    phones = articulation(rng, 4 * T + 1, voice["rate"])               # at 100 Hz, ends included
    mouth = rng.uniform(0.8, 1.2)                                      # how wide this one is
    face = FACE * rng.uniform(0.9, 1.1, 3)
    face[[14, 20], 0] *= mouth
    wav, level = toy_voice(rng, voice, phones)
    # mouths open mostly with loudness; the clip's end, the last row, has no spectrum
    phones["aaa"][:-1] += 2.2 * level
    delta = toy_expression(rng, manner, phones, mouth ** 2)            # wide ones further
    motion = np.hstack([delta, toy_head(rng, phones)])
    # motion in the middle of each frame
    return wav, np.float32(motion[2::4]), emotion, np.float32(face.ravel())


def articulation(rng, n, rate):
    """Random syllables and pauses: rows of PHONES (n,), every 10 ms."""
    # seconds: the first pause ends before the clip, which has n / 100, or, in one of five, within
    # its first 60 %
    end = 0.006 * n * rng.random() ** 12 - rng.random()
    phones, ends = [PHONES[-1]], [end]
    while end < n / 100:
        stress = rng.uniform(0.3, 1.3)
        for kind, chance, shortest, longest in SYLLABLE:
            if rng.random() > chance:
                continue
            phone = rng.choice(PHONES[PHONES["kind"] == kind])         # a copy
            end += phone["seconds"] * rng.uniform(shortest, longest) / rate
            phone["voice"] *= stress               # not its hiss
            phones.append(phone)
            ends.append(end)
    return np.array(phones)[np.searchsorted(ends, np.arange(n) / 100)]


def toy_expression(rng, manner, phones, reach):
    """Lips follow the voice; the emotion's own offsets, of the whole face, are added: (n, 63)."""
    n = len(phones)
    held = {}
    lips = {name: reach * smooth(phones[name], 2) for name in ("aaa", "eee", "woo")}
    # half of the clips begin with any: the label should decide
    before = rng.choice([manner, rng.choice(MANNERS)])
    # from 0 to 1 over a second: the share of `manner`; the rest is `before`
    turned = np.arange(n) / 100 - rng.uniform(0, 1)
    turned = smooth(turned.clip(0, 1), 20)
    for name in CONTROLS:                                              # strong or weak, never still
        strength = 1 + 0.15 * wander(rng, 160, n)
        held[name] = strength * (before[name] * (1 - turned) + manner[name] * turned)
    # A blink lowers the control by 22: a single 1, smoothed, is 0.1 high. The lids are shut from
    # -13 on, so for some frames; what goes below -20, with narrow eyes, is cut off.
    blinks = 220 * smooth(rng.random(n) < 0.003, 4)
    held["blink"] = (held["blink"] - blinks).clip(-20)
    return expression(**lips) + expression(**held)


def toy_head(rng, phones):
    """Scale, translation, rotation, (n, 7)."""
    head = []
    n = len(phones)
    for _, mean, spread, drift, tremor, nod in HEAD:
        rest = rng.normal(mean, spread)
        drifting = drift * wander(rng, 60, n)
        trembling = tremor * wander(rng, 5, n)     # as real heads do, and trackers of them
        nodding = nod * smooth(phones["voice"], 12)
        head.append(rest + drifting + trembling + nodding)
    return np.stack(head, 1)


def toy_voice(rng, manner, phones):
    """Source and filter, in a room: (160 (n - 1),); and how loud they are without it, an amplitude
    beside log_mel's level, (n - 1,)."""
    source = torch.tensor(toy_source(rng, manner, phones))
    response = torch.tensor(toy_filter(rng, phones))
    # windows of 40 ms, as long as a video's frame
    stft = dict(n_fft=FRAME, hop_length=HOP, window=torch.hann_window(FRAME).double())
    spectrum = torch.stft(source, **stft, return_complex=True)         # (321, n)
    wav = torch.istft(spectrum * response.T, **stft).numpy()
    heard = log_mel(wav).view(-1, 40)[:, 4:29].numpy()                 # from 300 to 3400 Hz
    level = np.expm1(3 * heard).sum(1) ** 0.5      # log_mel's logarithm undone
    return np.float32(0.05 * toy_room(rng, wav)), level                # the voice: -26 dBFS


def upsample(x):
    """From 100 Hz to the sound's rate: (n,) -> (160 (n - 1),)."""
    return np.interp(np.arange(HOP * (len(x) - 1)) / HOP, range(len(x)), x)


def toy_source(rng, manner, phones):
    """Glottal pulses where phones are voiced, noise where they hiss: (160 (n - 1),)."""
    melody = 0.5 * wander(rng, 12, len(phones)) + smooth(phones["voice"], 15)
    register = rng.uniform(90, 230) * manner["pitch"]
    pitch = register * 2 ** (0.25 * manner["range"] * melody)
    phase = 2 * np.pi * np.cumsum(upsample(pitch)) / RATE
    # the nearer to 1, the slower harmonics fall off, as with more effort
    z = rng.uniform(0.86, 0.94) * np.exp(1j * phase)
    pulses = (z / (1 - z)).real                    # z + z^2 + z^3 + ..: harmonics that fall off
    voice, hiss = [upsample(smooth(phones[name], 2)) for name in ("voice", "hiss")]
    return voice * pulses + hiss * rng.standard_normal(len(z))


def toy_filter(rng, phones):
    """Frequency response of the vocal tract, or where there is no voice, of the hiss: (n, 321)."""
    khz = rfftfreq(FRAME, 1000 / RATE)
    tract = (0.02 + khz) ** rng.uniform(0.2, 1.0)  # lips radiate what is high
    shorter = rng.uniform(0.75, 1.35)              # and short tracts have higher formants
    width = rng.uniform(0.06, 0.3)                 # of formants, in kHz
    for name in "f1", "f2", "f3":
        f = shorter * smooth(phones[name], 3)[:, None]
        tract = tract * f ** 2 / np.hypot(f ** 2 - khz ** 2, width * khz)
    hiss = 6 * np.exp(-0.35 * (khz - phones["centre"][:, None]) ** 2)
    return np.where(phones["voice"][:, None] > 0, tract, hiss)


def toy_room(rng, wav):
    """A voice of unit variance with echo, music with a hum, and noise."""
    n = len(wav)
    wav = wav / wav.std()
    decay = np.exp(-np.arange(n) / rng.uniform(300, 1300))
    echo = decay * rng.standard_normal(n)
    room = irfft(rfft(wav) * rfft(echo))           # its end echoes at the start
    room *= rng.uniform(0, 0.4) / room.std()
    wav += room
    music = 0.25 * rng.random() ** 3               # soft in most clips
    for least in 0, 0, 0, 0.5:                     # swell: three tones come and go, one hums on
        tone = np.sin(rng.uniform(0.015, 0.15) * np.arange(n))
        swell = upsample(wander(rng, 10, n // HOP + 1).clip(least))
        wav += music * swell * tone
    # white, with more below a frequency from 260 to 2100 Hz
    noise = rng.standard_normal(n) + wander(rng, rng.integers(1, 9), n)
    return wav + 10 ** rng.uniform(-3, -1) * noise


class ToyTalker(Clips):
    """The embedded data set: made-up clips of T frames; clip k of a split never changes."""

    audio_type = "f4"

    def __init__(self, split="train", clips=60, T=200):
        numbers = tqdm(range(clips), f"toy talker, {split}", leave=False)
        toys = [toy_clip((split != "train", k), T) for k in numbers]
        self.wavs, motions, emotions, identities = zip(*toys)
        self.clips = [(motion, log_mel(wav).numpy(), x_c) for wav, motion, _, x_c in toys]
        rows = [dict(frames=T, emotion=emotion) for emotion in emotions]
        self.index(rows, (1, 160), moments_of(motions), moments_of([identities]))

    def read(self, k, start, motion, audio, identity):
        end = start + len(motion)
        moved, heard, identity[:] = self.clips[k]
        motion[:] = moved[start:end]
        audio[:] = heard[start + 1:end]


# ------------------------------------------------------------------------------- the command lines
class UsageError(ValueError):
    """A flag that makes no sense."""


def parse_flags(argv, doc, *settings):
    """Set the fields of dataclasses from flags --name=value; returns what was given, {name: value}.

    A flag has the type of its default; a bare --name switches a bool on. UsageError says what is
    wrong; --help prints `doc` and the classes, where every field has a comment."""
    if "--help" in argv:
        print(doc)
        for owner in settings:
            print(inspect.getsource(type(owner)))
        raise SystemExit
    # a dataclass's vars, where writing sets a field
    owners = {f"--{name}": vars(owner) for owner in settings for name in vars(owner)}
    given = {}
    for arg in argv:
        flag, _, text = arg.partition("=")
        if flag not in owners:
            raise UsageError(f"unknown flag {arg}; known: {', '.join(owners)}")
        name = flag.removeprefix("--")
        default = owners[flag][name]
        kind = type(default)
        try:
            value = BOOLEANS[text] if kind is bool else kind(text)
            if kind is not str and not abs(value) < 9e18:              # too large, or NaN
                raise ValueError
        except (KeyError, ValueError):
            raise UsageError(f"{arg}: expected {kind.__name__}, as in {flag}={default}")
        owners[flag][name] = given[name] = value
    return given


BOOLEANS = {"": True, "True": True, "False": False}


def find_device(name):
    """The torch.device of --device, by default a GPU if there is one; UsageError if it is none."""
    if name in ("", "cuda") and torch.cuda.is_available():
        # torchrun numbers the processes of a machine one after the other: each gets its own GPU
        name = f"cuda:{RANK % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name or "cpu").device
    except Exception as error:
        raise UsageError(f"--device={name}: no such device here ({error!s:.200})")


def check_effects(given, settings, effects):
    """UsageError for a flag given in vain. effects = {condition: names of the flags that have an
    effect only under it}; conditions: "with --flag", "with --flag=one|other", "without --flag"."""
    for condition, names in effects.items():
        # "with --flag=one|other" is with, flag, [one, other]; "with --flag" is with, flag, []
        how, flag, *values = re.split(" --|=|[|]", condition)
        found = getattr(settings, flag)
        if values:
            found = found in values
        idle = given.keys() & names.split()
        if idle and bool(found) != (how == "with"):
            raise UsageError(f"--{min(idle)} has an effect only {condition}")


def interrupt(number, frame):
    """End as after Ctrl-C; a second one does not disturb the cleaning up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def on_signals(handler):
    """What Ctrl-C, `kill` and a terminal that closes do."""
    for name in "SIGINT", "SIGTERM", "SIGHUP":
        number = getattr(signal, name, signal.SIGINT)                  # Windows lacks one
        if signal.getsignal(number) != signal.SIG_IGN:                 # nohup's
            signal.signal(number, handler)


def run(main):
    """Call a script's main(argv). A mistake of the user is one line on stderr and exit code 1, or 2
    for a flag."""
    on_signals(interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")                  # a name may be no UTF-8
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except (ValueError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        for child in CHILDREN:                     # which may wait for a silent stdin
            child.kill()
        # These RuntimeErrors a user can mend: torch's with "memory" or "overflow", of sizes that
        # are too large, and imageio_ffmpeg's "no ffmpeg exe could be found".
        if type(error) is RuntimeError and not re.search("memory|ffmpeg|overflow", str(error)):
            raise                                  # a fault of ours, so with its traceback
        report(f"error: {' '.join(str(error).split()) or 'interrupted'}")
        code = 2 if isinstance(error, UsageError) else 1
    # This stands outside the except block, because at that block's end Python frees the error and
    # its traceback, and with them unfinished generators, which then clean up. sys.exit would wait
    # for a thread that computes motion (sample.ahead).
    with suppress(OSError):                        # stdout may be a closed pipe
        sys.stdout.flush()
    os._exit(code)


@dataclass
class Settings:
    videos: str = ""             # folder of talking videos, one face each, searched deeply
    clips: str = ""              # csv: video,audio,start,end (seconds),crop,emotion,speaker
    data_dir: str = ""           # the data set, for train.py --data_dir
    weights: str = ""            # folder of LivePortrait's weights
    audio_encoder: str = ""      # file or folder of wav2vec 2.0 or HuBERT; else log-mel features
    crop: str = ""               # x,y,size: the square around the face; else the central one
    labels: str = ""             # csv that begins clip,emotion; a clip is a path, name or folder
    device: str = ""             # cuda if there is one


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    if not settings.data_dir or not settings.videos + settings.clips:
        raise UsageError("needed: --videos=FOLDER --data_dir=FOLDER; a table, --clips=FILE, may "
                         "stand for the folder")
    if not re.fullmatch(r"(\d+,\d+,\d+)?", settings.crop):
        raise UsageError(f"--crop={settings.crop}: should be --crop=x,y,size in pixels")
    settings.device = find_device(settings.device)
    prepare(settings)


if __name__ == "__main__":
    run(main)
