"""Sound and motion in: load_audio, log-mel features, the toy talker, datasets of windows; and the scripts' flags.

    python data.py --videos=DIR --data_dir=data/mine --weights=pretrained_weights     talking videos -> a training set
    python data.py --data_dir=data/mine --check          its hours, emotions and motion; clips whose sound is shifted

Flags and what they are without being given:

    --videos=                folder of talking videos, one face each; its subfolders are searched too
    --data_dir=              the data set, for train.py --data_dir
    --weights=               folder of LivePortrait's weights
    --audio_encoder=         file or folder of wav2vec 2.0 or HuBERT; log-mel features without one
    --crop=                  the square around the face: x,y,size in pixels; the largest in the centre without
    --labels=                csv file that begins with the line clip,emotion; a clip is a path, a name or a folder
    --emotion=               hsemotion, of pip install hsemotion-onnx, labels what neither file nor folder does
    --check=False            look at the data set
    --device=                cuda if there is one

Letters: N samples at 16 kHz, T frames at 25 fps (640 samples each), L x A audio layers x channels.
"""
import csv
import json
import re
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice, pairwise
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import torch
import torch.nn.functional as F
from imageio_ffmpeg import get_ffmpeg_exe, get_ffmpeg_version
from tqdm import tqdm

from moda import EMOTIONS, MOUTH, NO_EMOTION, M, UsageError, explained, read_tensors, require, save
from renderer import FACE, LivePortrait, Weights, motion_heads, to_motion

# samples per second, per video frame, per 10 ms; and the frames of sound that are read and analysed at once
RATE, HOP, STEP, BLOCK = 16000, 640, 160, 5

# -------------------------------------------------------------------------------------------------------------- sound
@contextmanager
def ffmpeg(told, error, *args, **pipes):
    """A running ffmpeg; where it fails, the user is told, with the first and last of its complaints."""
    # they go to a file: a full pipe would stop ffmpeg, as a closed one does where the reader leaves early
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [get_ffmpeg_exe(), "-v", "error", *args]
        with suppress(BrokenPipeError), Popen(command, stderr=log, **pipes) as child, ExitStack() as end:
            # after an error of ours it might wait for input forever; after its own it has something to say
            end.push(lambda kind, *_: kind not in (None, BrokenPipeError) and child.kill())
            yield child
        log.seek(0)
        lines = [line.split("] ")[-1].strip() for line in log]
        require(child.returncode == 0, f"{told} ({'; '.join(lines[:1] + lines[1:][-1:])})", error)

def decoded(path, what, options, size):
    """What ffmpeg makes of a file, in pieces of `size` bytes but the last. ValueError if that is nothing."""
    source = f"-f s16le -ar {RATE} -ac 1 -i -".split() if path == "-" else ["-nostdin", "-i", f"file:{path}"]
    options = "-abort_on", "empty_output", *source, *options, "-"
    with ffmpeg(f"{path}: no {what} could be read", ValueError, *options, stdout=PIPE) as decoder:
        yield from iter(lambda: decoder.stdout.read(size), b"")

def audio_blocks(path):
    """Pieces of float32 (BLOCK * HOP,) of any sound ffmpeg reads, or of a video's: 16 kHz mono. The last is shorter."""
    # first_pts and async: what starts late or has gaps is filled with silence and stays in step with the picture
    options = ["-map", "0:a:0", "-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", str(RATE), "-f", "f32le"]
    for piece in decoded(path, "sound", options, 4 * BLOCK * HOP):
        block = np.frombuffer(piece, np.float32)
        require(np.isfinite(block).all(), f"{path}: the sound holds NaN or infinite samples")
        yield block

def load_audio(path):
    """Any sound file, or a video's sound -> float32 (N,), 16 kHz mono, about -1..1. ValueError if there is none."""
    return np.concatenate(list(audio_blocks(path)))

# 40 triangles equally spaced on the mel scale, log(700 + Hz), from 60 to 7600 Hz: a spectrum (257,) @ MEL -> (40,)
PLACE = np.interp(np.log(700 + np.fft.rfftfreq(512, 1 / RATE)), np.log([700 + 60, 700 + 7600]), [0, 41])
MEL = np.clip(1 - np.abs(PLACE[:, None] - np.arange(1, 41)), 0, None)

def regroup(pieces, size):
    """Cut a stream of arrays (n,) into arrays of exactly `size` samples; the last may be shorter."""
    samples = chain.from_iterable(pieces)
    while len(block := np.fromiter(islice(samples, size), np.float32)):
        yield block

def log_mel_blocks(pieces):
    """Sound in pieces of any length -> log-mel features of BLOCK frames, (n, 1, 160), as soon as they are known.
    Four 40-band spectra of 25 ms per frame; 0 is silence. A window reaches back, never ahead, and blocks have one size,
    so that the features of a sound are the same to the bit however it was cut."""
    wav, taper = np.zeros(400), np.hanning(400)
    for block in regroup(pieces, BLOCK * HOP):
        wav = np.concatenate([wav[STEP - 400:], block, np.zeros(BLOCK * HOP - len(block))])
        windows = np.lib.stride_tricks.sliding_window_view(wav, 400)[::STEP] * taper
        power = np.abs(np.fft.rfft(windows, 512)) ** 2 / taper.sum() ** 2
        yield torch.tensor(np.log1p(1e5 * power @ MEL) / 4).float().view(BLOCK, 1, -1)[:-(-len(block) // HOP)]

def log_mel(wav, n_frames):
    """wav (N,) -> (n_frames, 1, 160); see log_mel_blocks."""
    return torch.cat(list(log_mel_blocks([np.pad(wav, (0, max(0, n_frames * HOP - len(wav))))])))[:n_frames]

# --------------------------------------------------------------------------------------------------- the audio encoder
# tensors by their names without the prefix that some files carry; what else a file holds served its training
PART = re.compile(r"\b(feature_extractor|feature_projection|encoder)\..*")
ENCODERS = "get facebook/wav2vec2-base-960h or TencentGameMate/chinese-hubert-base from huggingface.co"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}

def read_safetensors(path, advice="fetch it again"):
    """Tensors of a .safetensors file by name: 8 bytes of length, a JSON header, then plain numbers, which are read
    when they are looked at."""
    with explained(path, "not a readable safetensors file", advice):
        data = np.memmap(path, mode="c")
        start = 8 + int.from_bytes(data[:8], "little")
        header, numbers = json.loads(data[8:start].tobytes()), data[start:]
        return {key: torch.frombuffer(numbers[slice(*e["data_offsets"])], dtype=DTYPES[e["dtype"]]).view(e["shape"])
                for key, e in header.items() if key != "__metadata__"}

def write_safetensors(tensors, path):
    names, ends = {dtype: name for name, dtype in DTYPES.items()}, np.cumsum([0, *(x.nbytes for x in tensors.values())])
    header = json.dumps({key: dict(dtype=names[x.dtype], shape=[*x.shape], data_offsets=span)
                         for (key, x), span in zip(tensors.items(), pairwise(ends.tolist()))})
    parts = [len(header).to_bytes(8, "little"), header.encode(), *(x.numpy().tobytes() for x in tensors.values())]
    Path(path).write_bytes(b"".join(parts))

class AudioEncoder:
    """What a public base-size wav2vec 2.0 or HuBERT hears, at 25 frames per second, as the released MoDA listens to it.
    GroupNorm and attention see the whole sound, so features depend on where it is cut: encode first, cut then."""

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """A public base-size file or its folder -> encoder; ValueError if it is missing, broken or another network."""
        self, path, conv = cls(), Path(path), "encoder.pos_conv_embed.conv"
        path = next(path.glob("model.safetensors"), path / "pytorch_model.bin") if path.is_dir() else path
        self.config = dict(num_attention_heads=12, do_normalize=True)      # unless the files beside it say otherwise
        for file in (path.with_name("config.json"), path.with_name("preprocessor_config.json")):
            with explained(file, "not readable as JSON", "fetch it again"):
                self.config |= json.loads(file.read_text()) if file.exists() else {}
        tensors = read_safetensors(path, ENCODERS) if path.suffix == ".safetensors" else read_tensors(path, ENCODERS)
        tensors = {part[0]: value for key, value in tensors.items() if (part := PART.search(key))}
        with explained(path, "not wav2vec 2.0 or HuBERT, or incomplete", ENCODERS):
            # _g and _v; original0 and 1 since torch 2.1
            g, v = (tensors.pop(key).float() for key in sorted(tensors) if conv in key and "weight" in key)
            self.width, self.channels = tensors["feature_projection.projection.weight"].shape
            self.hidden = len(tensors["encoder.layers.0.feed_forward.intermediate_dense.bias"])
            require(self.width <= 768, "a large model, and MoDA listens to the base size")
        tensors[f"{conv}.weight"] = g * v / v.norm(dim=(0, 1), keepdim=True)
        self.groups, self.depth = self.width // v.size(1), sum(key.endswith("q_proj.bias") for key in tensors)
        self.net = Weights(path, tensors, self.layers, (1, 1, HOP), advice=ENCODERS, device=device)
        return self

    def layers(self, net, x):
        """The network: sound (1, 1, 640 T) -> the outputs of all L layers, (T, L, A)."""
        C, A, heads = self.channels, self.width, self.config["num_attention_heads"]
        x = F.pad(F.pad(x, (20, 20), mode="reflect"), (20, 20), mode="reflect")    # as released, other than 40 at once
        for i, (kernel, stride) in enumerate([(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]):
            name = f"feature_extractor.conv_layers.{i}"
            x = net.conv(x, f"{name}.conv", C, k=kernel, stride=stride, bias=False)
            x = F.group_norm(x, C, *net.plain(f"{name}.layer_norm", x, weight=(C,), bias=(C,))) if i == 0 else x
            x = F.gelu(x)                                                  # (1, C, 2 T) in the end
        x = F.interpolate(x, x.size(-1) // 2, mode="linear", align_corners=True).mT      # from 50 to 25 Hz
        x = net.linear(net.layer_norm(x, "feature_projection.layer_norm", 1e-5), "feature_projection.projection", A)
        near = net.conv(x.mT, "encoder.pos_conv_embed.conv", A, k=128, groups=self.groups)[..., :-1]
        h, outputs = net.layer_norm(x + F.gelu(near).mT, "encoder.layer_norm", 1e-5), []           # (1, T, A)
        dense = lambda x, part, n=A: net.linear(x, f"{name}.{part}", n)
        for name in [f"encoder.layers.{i}" for i in range(self.depth)]:
            qkv = (dense(h, f"attention.{part}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
            y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
            h = net.layer_norm(h + dense(y, "attention.out_proj"), f"{name}.layer_norm", 1e-5)
            y = F.gelu(dense(h, "feed_forward.intermediate_dense", self.hidden))
            h = net.layer_norm(h + dense(y, "feed_forward.output_dense"), f"{name}.final_layer_norm", 1e-5)
            outputs.append(h)
        return torch.stack(outputs, 2)[0]

    def __call__(self, wav, n_frames=None):
        """wav (N,) at 16 kHz -> (T, L, A); T = N // 640 but at least 1, or n_frames: the last frame is repeated."""
        features = torch.cat(list(self.blocks([np.asarray(wav)])))
        return features[torch.arange(n_frames or max(1, len(wav) // HOP)).clamp(max=len(features) - 1)]

    @torch.inference_mode()
    def blocks(self, pieces):
        """Sound in pieces of any length -> features (n, L, A) of every started frame, minute by minute."""
        for wav in regroup(pieces, 60 * RATE):
            x = torch.from_numpy(np.pad(wav, (0, max(0, HOP - len(wav))))).to(self.net.device)
            x = F.layer_norm(x, x.shape, eps=1e-7) if self.config["do_normalize"] else x
            features = self.layers(self.net, x[None, None, :len(x) // HOP * HOP])
            yield features[torch.arange(-(-len(wav) // HOP)).clamp(max=len(features) - 1)].cpu()

def hearing(encoder, device):
    """What makes features (n, L, A) of sound in pieces: an encoder, from its file; log-mel without one."""
    return AudioEncoder.from_pretrained(encoder, device).blocks if encoder else log_mel_blocks

# ------------------------------------------------------------------------------------------------------ the toy talker
# by how many thousandths a point moves per unit of a control, as LivePortrait has it; 19y opens the mouth, frown < 0
CONTROLS = {"aaa": {"19y": 1, "19z": .1, "17y": -.1}, "eee": {"20z": -1, "20y": -1, "14y": -1},
            "woo": {"14y": 1, "3y": -.5, "7y": -.5, "17z": -.5}, "brow": {"1y": 1, "2y": -1},
            "smile": {"20y": -10, "14y": -20, "17y": 6.5, "17z": 3, "13y": -2.75, "16y": -2.75, "3y": -3.5, "7y": -3.5},
            "frown": {"1x": -1, "2x": 1, "1y": .3, "2y": -.3}, "blink": {"11y": -1, "13y": .3, "15y": -1, "16y": .3}}

def expression(**controls):
    """Sum of the controls' directions; each control a number or (T,) -> (63,) or (T, 63)."""
    return sum(np.multiply.outer(value, step / 1000 * np.eye(63)[3 * int(place[:-1]) + "xyz".index(place[-1])])
               for name, value in controls.items() for place, step in CONTROLS[name].items())

# first two formants in kHz | voice, hiss (0..1), the hiss's centre in kHz | seconds | jaw, spread, round (-1..1)
VOWELS, CONSONANTS, PAUSE = np.split(np.array([    # a e i, o u @; m b n, t s S, f l w; silence
    (.75, 1.25, 1, 0, 3, .17, 1, .1, 0), (.52, 1.85, 1, 0, 3, .15, .5, .6, 0), (.3, 2.25, .9, 0, 3, .14, .2, 1, 0),
    (.48, .9, 1, 0, 3, .16, .55, 0, .8), (.32, .8, .9, 0, 3, .15, .15, 0, 1), (.52, 1.45, .8, 0, 3, .1, .4, .1, .1),
    (.26, 1, .3, 0, 3, .09, -.3, 0, .1), (.22, .9, .06, .01, 2, .08, -.35, 0, 0), (.28, 1.6, .3, 0, 3, .07, .1, .2, 0),
    (.3, 1.8, 0, .15, 5, .07, .1, .2, 0), (.3, 1.7, 0, .35, 6, .1, .02, .5, 0), (.3, 1.8, 0, .35, 3, .1, .05, 0, .6),
    (.3, 1.2, 0, .12, 7, .09, -.15, .1, 0), (.38, 1.3, .5, 0, 3, .07, .25, .1, 0), (.3, .65, .5, 0, 3, .08, .05, 0, 1),
    (.48, 1.45, 0, 0, 3, .5, 0, 0, 0)]), [6, 15])
# of each emotion: smile, brow, frown, blink, jaw; and factors on pitch, pitch range, loudness, rate
LOOKS = np.array([(-.2, 0, -9, -6, 4), (.25, 2, 0, -10, -4), (-.3, 0, -5, -12, -2), (-.25, 10, -4, 4, 2),
                  (1, 4, 0, -2, 3), (0, 0, 0, 0, 0), (-.3, 5, -2, -9, -3), (.1, 14, 0, 5, 10)])
TONES = np.array([(1.15, 1.3, 1.6, 1.15), (.9, .7, .8, .9), (.85, .9, .9, .85), (1.3, 1, .8, 1.2),
                  (1.2, 1.5, 1.2, 1.1), (1, 1, 1, 1), (.9, .6, .6, .8), (1.3, 1.6, 1.1, 1)])

def smooth(track, width):
    """Gaussian average along the first axis; width (standard deviation) in samples."""
    kernel = np.exp(-0.5 * (np.arange(-3 * width, 3 * width + 1) / width) ** 2)
    mirrored = track[np.pad(np.arange(len(track)), 3 * width, mode="reflect")]
    return np.lib.stride_tricks.sliding_window_view(mirrored, len(kernel), 0) @ (kernel / kernel.sum())

def wander(rng, width, *shape):
    """Smooth noise of unit variance; width in samples."""
    return smooth(rng.standard_normal(shape), width) * (4 * np.pi * width ** 2) ** 0.25

def toy_clip(seed, T):
    """One clip of the toy talker: wav (T * 640,), motion (T, 70), emotion, identity (63,)."""
    rng = np.random.default_rng(seed)
    emotion = int(rng.integers(8))
    target = toy_articulation(rng, 4 * T, rate=TONES[emotion, 3])          # articulators move at 100 Hz
    motion, identity = toy_face(rng, LOOKS[emotion] * rng.uniform(0.8, 1.2, 5), target)
    return toy_voice(rng, TONES[emotion], target), motion[2::4].astype(np.float32), emotion, identity

def toy_articulation(rng, n, rate):
    """Random syllables and pauses: the columns of the phones and the stress, as targets per 10 ms -> (n, 10)."""
    count = n // 6 + 20                                                    # enough, for none is shorter than 66 ms
    phones = np.stack([rng.choice(table, count) for table in (CONSONANTS, VOWELS, CONSONANTS, PAUSE)], 1)
    stress = rng.uniform(0.75, 1.25, count)
    phones[:, 1, [2, 6]] *= stress[:, None]                                # the vowel is louder and wider
    phones = np.dstack([phones, np.outer(np.maximum(0, stress - 1), (0, 1, 0, 0))])          # (count, 4, 10)
    phones[..., 5] *= rng.uniform((0.8, 0.8, 0.8, 0.3), (1.25, 1.25, 1.25, 1.8), (count, 4)) / rate
    phones = phones[rng.random((count, 4)) < (0.9, 1, 0.25, 0.17)]         # not every syllable has all four
    return phones[np.searchsorted(np.cumsum(phones[:, 5]), rng.uniform(0, 1) + np.arange(n) / 100)]

def toy_face(rng, mood, target):
    """Motion (n, 70) at 100 Hz and identity (63,): lips follow the voice, the mood holds the rest, the head drifts."""
    n, build = len(target), rng.uniform(-1, 1, 3)                          # the proportions of this face
    identity = FACE * (1 + 0.12 * build[0], 1 + 0.08 * build[1], 1)
    identity[[14, 20], 0] *= 1 + 0.2 * build[2]                            # the mouth's width
    jaw, spread, rounding = smooth(target[:, 6:9], 4).T * (1 + 0.35 * build[2])      # wide mouths move further
    speaking, blinks = smooth(target[:, 6] != 0, 10), 10 * smooth(rng.random(n) < 0.003, 4)
    smile, brow, frown, lids = (mood[:4] * (1 + 0.12 * wander(rng, 80, n, 4))).T
    delta = expression(aaa=55 * jaw + mood[4] * speaking, eee=10 * spread, woo=12 * rounding, smile=smile, brow=brow,
                       frown=frown, blink=np.clip(lids - 22 * blinks, -20, 5))
    # scale, t_x, t_y, pitch, yaw, roll: where the head is at rest, and how far it drifts
    rest = rng.normal((1.3, 0, 0.1, 0, 0, 0), (0.05, 0.02, 0.02, 2, 4, 1.5))
    head = rest + wander(rng, 60, n, 6) * (0.006, 0.012, 0.006, 2.5, 5, 2)
    head[:, 3] += 12 * smooth(target[:, 9], 12)                            # it nods with the stress
    return np.hstack([delta, np.insert(head, 3, 0, 1)]), identity.ravel().astype(np.float32)       # t_z = 0

def toy_voice(rng, mood, target):
    """Source and filter: glottal pulses and noise through moving formants, in a room; (n, 10) -> (n * 160,)."""
    n, clock = len(target), np.arange(len(target) * STEP)
    upsample = lambda x: np.interp(clock, clock[STEP // 2::STEP], x)
    noise = lambda: rng.standard_normal(len(clock))
    melody = 0.5 * wander(rng, 12, n) + smooth(target[:, 2], 15)
    pitch = rng.uniform(90, 230) * mood[0] * 2 ** (0.25 * mood[1] * melody)
    effort = np.clip(0.86 + 0.04 * mood[2] + rng.normal(0, 0.02), 0.8, 0.94)
    z = effort * np.exp(2j * np.pi * np.cumsum(upsample(pitch)) / RATE)    # z + z^2 + z^3 + ... = z / (1 - z)
    voice, hiss = (upsample(x) for x in smooth(target[:, 2:4], 2).T)
    sources = voice * ((z / (1 - z)).real + rng.uniform(0.02, 0.1) * noise()), hiss * noise()
    khz, width = np.fft.rfftfreq(HOP, 1000 / RATE), np.array([[.08], [.1], [.14], [.25]])
    f = np.hstack([smooth(target[:, :2], 3), np.tile((2.55, 3.6), (n, 1))])[..., None] * rng.uniform(0.85, 1.2)
    formants = (f ** 2 / np.hypot(f ** 2 - khz ** 2, width * khz + 1e-6)).prod(1)
    filters = formants * (0.02 + khz) ** rng.uniform(0.2, 1.0), 6 * np.exp(-0.35 * (khz - target[:, 4:5]) ** 2)
    stft = dict(n_fft=HOP, hop_length=STEP, window=torch.hann_window(HOP).double())
    spectra = (torch.stft(torch.tensor(x), **stft, return_complex=True)[:, :n] for x in sources)
    wav = torch.istft(F.pad(sum(x * torch.tensor(h.T) for x, h in zip(spectra, filters)), (0, 1)), **stft).numpy()
    echo = np.exp(-np.arange(RATE // 4) / RATE / rng.uniform(0.02, 0.08)) * rng.standard_normal(RATE // 4)
    room = np.fft.irfft(np.fft.rfft(wav, 2 * len(wav)) * np.fft.rfft(echo, 2 * len(wav)))[:len(wav)]
    music = sum(upsample(wander(rng, 10, n).clip(0)) * np.sin(rng.uniform(0.015, 0.15) * clock) for _ in range(3))
    wav = wav / wav.std() + rng.uniform(0, 0.7) * room / room.std() + rng.choice([0, 0, 0.25]) * rng.random() * music
    wav = mood[2] ** 0.5 * 10 ** rng.uniform(-1.7, -0.9) * (wav + 10 ** rng.uniform(-3, -1) * noise())
    return np.clip(wav, -1, 1).astype(np.float32)

# ------------------------------------------------------------------------------------------------------------ datasets
def opened(clip):
    """A clip's tensors by name. Of a file, what is looked at is read; of thousands, few may be open at a time."""
    return read_safetensors(clip, "delete it and prepare the data again") if isinstance(clip, Path) else clip

def write_manifest(manifest, path):
    Path(path).write_text(json.dumps(manifest, indent=1))

def moments(clips):
    """Mean and standard deviation of the motion of clips, (2, 70), in one pass."""
    sums = sum(torch.stack([m ** 0, m, m * m]).sum(1) for m in (opened(clip)["motion"].double() for clip in clips))
    mean, square = sums[1:] / sums[0]
    return torch.stack([mean, (square - mean ** 2).clamp(min=0).sqrt()])

class Clips(torch.utils.data.Dataset):
    """Windows of 1 + 80 consecutive frames from clips, which are the paths of files or dicts: motion (T, 70), audio
    (T, L, A), identity (63,).
    An item: motion (80, 70) and prev (70,) in LivePortrait units, audio (80, L, A), emotion, identity (63,), and
    mask (80,), true: no window is cut short."""
    frames = 80                                    # Sec. 4.1.2

    def __init__(self, clips, emotion, moments):
        self.clips, self.emotion, self.moments = clips, emotion, moments
        shapes = [[np.shape(clip.get(name)) for name in ("audio", "motion", "identity")] for clip in map(opened, clips)]
        self.audio_shape = tuple(shapes[0][0][1:])                         # L, A
        for clip, shape in zip(clips, shapes):
            fits = shape == [(*shape[0][:1], *self.audio_shape), (*shape[0][:1], M), (63,)]
            require(fits, f"{clip}: {shape} does not fit {shapes[0]}; delete it and prepare the data again")
        self.length = np.array([audio[0] for audio, *_ in shapes])
        self.start = np.cumsum([0, *np.maximum(self.length - self.frames, 0)])               # first window of each clip

    @classmethod
    def open(cls, folder, split="train"):
        """What `python data.py` prepared, "train" or "val" clips, or "" for both; ValueError if it is damaged."""
        path = Path(folder, "manifest.json")
        with explained(path, f"no {split} clips there", "prepare a data set: data.py --videos=DIR"):
            manifest = json.loads(path.read_text())
            rows = [row for row in manifest["clips"] if split in ("", row["split"])]
            files, emotions = zip(*((path.parent / row["file"], row["emotion"]) for row in rows))
            moments = torch.tensor(manifest["moments"], dtype=torch.double).view(2, M)
        return cls(files, emotions, moments)

    def __len__(self):
        return int(self.start[-1])

    def __getitem__(self, i):
        k = np.searchsorted(self.start, i, side="right") - 1
        clip, window = opened(self.clips[k]), slice(i - self.start[k], i - self.start[k] + 1 + self.frames)
        motion, audio = clip["motion"][window], clip["audio"][window].float()
        return dict(motion=motion[1:], prev=motion[0], audio=audio[1:], emotion=self.emotion[k],
                    identity=clip["identity"], mask=torch.ones(self.frames, dtype=torch.bool))

class ToyTalker(Clips):
    """The embedded data set: `clips` made-up clips of T frames; clip k of a split never changes."""

    def __init__(self, split="train", clips=300, T=200):
        made = [toy_clip((split != "train", k), T) for k in tqdm(range(clips), f"toy talker, {split}", leave=False)]
        clips = [dict(motion=torch.tensor(m), audio=log_mel(wav, T), identity=torch.tensor(x)) for wav, m, _, x in made]
        self.wavs, _, emotion, _ = zip(*made)
        super().__init__(clips, emotion, moments(clips))

# -------------------------------------------------------------------------------------------------------- preparation
# A data set is clips/VIDEO.safetensors, the tensors of every video, and manifest.json: settings, clips, statistics.

VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts"}
# our names, which are HSEmotion's in lower case; MEAD's folders, where they differ; numbers
FOLDERS = {name: k for k, name in enumerate(EMOTIONS)} | dict(angry=0, disgusted=2, happy=4, sad=6, surprised=7)
LABELS = FOLDERS | {str(k): k for k in range(len(EMOTIONS))}
# channel, mean and standard deviation, as published with the released model
PUBLISHED = {"scale": (63, 1.2865, 0.0691), "pitch": (67, -2.3407, 8.8819), "yaw": (68, -0.2464, 23.8553),
             "roll": (69, -0.3269, 5.6063), "mouth": (MOUTH, -0.0056, 0.0214)}

def pictures(path, crop, batch=16):
    """The square around the face at 25 fps, from time 0 on: uint8 tensors (batch, 256, 256, 3)."""
    x, y, size = crop.split(",") if crop else ("(iw-min(iw,ih))/2", "(ih-min(iw,ih))/2", "min(iw,ih)")
    inside = f"lte({x}+{size},iw)*lte({y}+{size},ih)"                      # ffmpeg would move the square, not refuse it
    fit = f"fps=25:start_time=0,crop='if({inside},{size},0)':'{size}':'{x}':'{y}':exact=1,scale=256:256:flags=area"
    options = ["-map", "0:V:0", "-vf", fit, "-pix_fmt", "rgb24", "-f", "rawvideo", "-xerror"]
    for piece in decoded(path, f"picture with crop {crop}" if crop else "picture", options, batch * 256 * 256 * 3):
        yield torch.frombuffer(bytearray(piece), dtype=torch.uint8).view(-1, 256, 256, 3)

def read_labels(path):
    """csv file -> {clip: number}; a clip is a path below --videos, a name without suffix, or a folder."""
    known = f"lines clip,emotion name {' '.join(LABELS)}"
    with explained(path, "cannot be used", known), open(path, newline="", encoding="utf-8-sig") as file:
        return {row["clip"]: LABELS[row["emotion"].strip().lower()] for row in csv.DictReader(file)}

def hsemotion():
    """The classifier that the paper labels with: image, uint8 (256, 256, 3) -> emotion 0 to 7."""
    from hsemotion_onnx.facial_emotions import HSEmotionRecognizer         # not needed otherwise
    net = HSEmotionRecognizer("enet_b0_8_best_vgaf")                       # its eight emotions have our order
    return lambda image: int(np.argmax(net.predict_emotions(image, logits=False)[1]))

@torch.inference_mode()
def extract(path, face, hear, crop, classify):
    """One video -> the tensors of its clip. ValueError if it cannot be used."""
    wav, parts = load_audio(path), []
    for images in pictures(path, crop):
        heads = motion_heads(face.M, images.to(face.device).movedim(-1, 1) / 255)
        parts.append((to_motion(heads).cpu(), heads["kp"].cpu(), torch.tensor([classify(images[0].numpy())])))
    motion, x_c, votes = map(torch.cat, zip(*parts))
    T = min(len(motion), len(wav) // HOP)
    require(T > Clips.frames, f"{path}: {T} frames of picture and sound, and a window takes {Clips.frames + 1}")
    # whole, for what an encoder hears depends on where the sound is cut; the face of all frames, for one may be a blur
    clip = dict(motion=motion[:T].clone(), audio=torch.cat([part.half() for part in hear([wav[:T * HOP]])]),
                identity=x_c[:T].mean(0), loudness=log_mel(wav, T).mean((1, 2)), emotion=votes.mode().values)
    require(all(x.isfinite().all() for x in clip.values()), f"{path}: its motion or features hold NaN or infinity")
    return clip

def prepare(flags):
    """Talking videos -> a data set. A run that was cut off goes on; unusable videos are told at the end."""
    root, folder = Path(flags["videos"]), Path(flags["data_dir"])
    videos = sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in VIDEOS)
    require(videos, f"{root}: no videos there; looked for {' '.join(sorted(VIDEOS))}")
    labels = FOLDERS | (read_labels(flags["labels"]) if flags["labels"] else {})
    classify = hsemotion() if flags["emotion"] else lambda image: NO_EMOTION
    face = LivePortrait(flags["weights"], flags["device"])
    hear = hearing(flags["audio_encoder"], face.device)
    settings = {key: flags[key] for key in ("videos", "weights", "audio_encoder", "crop", "emotion")}
    settings |= dict(torch=str(torch.__version__), ffmpeg=get_ffmpeg_version())
    path = folder / "manifest.json"
    with explained(path, "begun with other settings", "use another --data_dir"):
        manifest = json.loads(path.read_text()) if path.exists() else dict(settings=settings)
        require(manifest["settings"] == settings, dict(manifest["settings"].items() - settings.items()))
    save(path, manifest, write=write_manifest)

    rows, left_out = [], []
    for name in tqdm(videos, "preparing", unit="video"):
        file = f"clips/{name.as_posix()}.safetensors"
        try:
            if not (folder / file).exists():
                clip = extract(root / name, face, hear, flags["crop"], classify)
                save(folder / file, clip, write=write_safetensors)
            names = [name.as_posix(), name.stem, *(part.lower() for part in name.parts[-2::-1])]
            emotion = next((labels[key] for key in names if key in labels), opened(folder / file)["emotion"].item())
            rows.append(dict(file=file, emotion=emotion, split="val" if len(rows) % 20 == 1 else "train"))
        except ValueError as error:
            left_out.append(error)
    print(f"{folder}: {len(rows)} clips; {len(left_out)} videos left out", *left_out, sep="\n")
    require(rows, f"{root}: none of its {len(videos)} videos can be used")
    train = moments(folder / row["file"] for row in rows if row["split"] == "train")
    save(path, dict(settings=settings, clips=rows, moments=train.tolist()), write=write_manifest)

def voice_lag(mouth, loud, reach=15):
    """By how many frames the voice follows the mouth's opening where both agree best, and their correlation there."""
    mouth, loud = (np.diff(x) / (np.diff(x).std() + 1e-9) for x in (mouth, loud))    # what drifts agrees with anything
    fit = np.correlate(loud, mouth[reach:-reach]) / (len(mouth) - 2 * reach)
    return int(np.argmax(fit)) - reach, max(fit)

def check(folder):
    """Print what a data set holds next to what the released model was trained on, and LOOK where a clip is odd."""
    data = Clips.open(folder, split="")
    print(f"{folder}: {len(data.clips)} clips, {data.length.sum() / 90_000:.2f} h, {len(data)} windows")
    print("emotions:", ", ".join(f"{name} {data.emotion.count(k)}" for k, name in enumerate(EMOTIONS)))
    for name, (channel, *published) in PUBLISHED.items():
        print("{:6}{:9.4f} +- {:7.4f}, published{:9.4f} +- {:7.4f}".format(name, *data.moments[:, channel], *published))
    for path, clip in zip(data.clips, map(opened, data.clips)):
        mean, (lag, fit) = clip["motion"].mean(0), voice_lag(clip["motion"][:, MOUTH].numpy(), clip["loudness"].numpy())
        odd = [name for name, (c, usual, std) in PUBLISHED.items() if abs(mean[c] - usual) > 4 * std]
        odd += ["voice"] if fit > 0.3 and abs(lag) > 3 else []
        print(f"{path}: voice {lag:+d} frames after the lips (correlation {fit:.2f})", *(f"LOOK: {x}" for x in odd))

def main(argv):
    flags = parse_flags(__doc__, argv)
    require(flags["data_dir"] and bool(flags["videos"]) != flags["check"],
            "needed: --data_dir=FOLDER and either --videos=FOLDER or --check", UsageError)
    require(flags["emotion"] in ("", "hsemotion") and re.fullmatch(r"(\d+,\d+,\d+)?", flags["crop"]),
            "expected --emotion=hsemotion, if any, and --crop=x,y,size in pixels", UsageError)
    check(flags["data_dir"]) if flags["check"] else prepare(flags)

# ---------------------------------------------------------------------------------------------------------- the scripts
def parse_flags(doc, argv, defaults={}):
    """The flags that a script's docstring lists as `--name=default`, other `defaults`, and what argv says instead.
    A flag has the type of its default; a bare --name switches a bool on. UsageError says what is wrong."""
    value = lambda text: json.loads(text.lower()) if re.fullmatch(r"True|False|\d[\d.e-]*", text) else text
    flags = {name: value(text) for name, text in re.findall(r"^ +--(\w+)=(\S*)", doc, re.M)} | defaults
    if {"-h", "--help"} & set(argv):
        sys.exit(print(doc))
    for arg in argv:
        name, _, text = arg.removeprefix("--").partition("=")
        require(arg.startswith("--") and name in flags, f"unknown flag {arg}; known: {', '.join(flags)}", UsageError)
        kind = type(flags[name])
        with explained(arg, f"expected {kind.__name__}", f"as in --{name}={flags[name]}", UsageError):
            flags[name] = {"": True, "True": True, "False": False}[text] if kind is bool else kind(text)
            require(kind is str or abs(flags[name]) < 2 ** 63, "no usable number")         # nor is NaN
    device = flags.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    with explained(f"--device={device}", "no such device here", "as in --device=cpu", UsageError):
        torch.empty(0, device=device)
        return flags | dict(device=torch.device(device))

def run(main):
    """Call a script's main(argv); a mistake of the user is one line on stderr and exit code 1, or 2 for a flag."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (ValueError, OSError, ImportError, UsageError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):                         # a mistake of ours
            raise
        tqdm.write(f"error: {' '.join(str(error).split()) or 'interrupted'}", sys.stderr)
        sys.stdout = None                                                  # or a closed pipe is told once more
        sys.exit(2 if isinstance(error, UsageError) else 1)

if __name__ == "__main__":
    run(main)
