"""Sound and motion in: load_audio, log-mel features, the toy talker, datasets of windows; and the scripts' flags.

    python data.py --videos=DIR --data_dir=data/mine --weights=pretrained_weights     talking videos -> a training set
    python data.py --data_dir=data/mine --check          its hours, emotions and motion; clips whose sound is shifted

Flags and what they are without being given:

    --videos=                folder of talking videos, one face each; its subfolders are searched too
    --data_dir=              the data set, for train.py --data_dir
    --weights=               folder of LivePortrait's weights
    --audio_encoder=         file or folder of wav2vec 2.0 or HuBERT; log-mel features without one
    --crop=                  the square around the face: x,y,size in pixels; the largest in the centre without
    --labels=                csv file that begins with the line clip,emotion
    --emotion=               hsemotion: that classifier labels what neither the csv file nor a folder's name does
    --check=False            look at the data set
    --device=                cuda if there is one

Letters: N samples at 16 kHz, T frames at 25 fps (640 samples each), L x A audio layers x channels.
"""
import csv
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from moda import EMOTIONS, EXP, MOUTH, NO_EMOTION, ROT, SCALE, M, read_tensors
from renderer import FACE, LivePortrait, Weights, motion_heads, to_motion

RATE, HOP = 16000, 640                             # samples per second, samples per video frame
BLOCK = 5                                          # frames of sound read and analysed at once: 0.2 s


# -------------------------------------------------------------------------------------------------------------- sound

def decoded(path, what, options, size):
    """What ffmpeg makes of a file, in pieces of `size` bytes but the last. ValueError if that is nothing."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", f"file:{path}", *options, "-"]
    # complaints go to a file: a full pipe would stop ffmpeg
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as ffmpeg:
        try:
            n = 0
            while piece := ffmpeg.stdout.read(size):
                yield piece
                n += len(piece)
            if ffmpeg.wait() or n == 0:
                log.seek(0)
                reason = log.read(1000).decode(errors="replace").splitlines() or ["there is none"]
                raise ValueError(f"{path}: no {what} could be read ({reason[0].split('] ')[-1]})")
        finally:
            ffmpeg.kill()


def audio_blocks(path):
    """Pieces of float32 (BLOCK * HOP,) of any sound ffmpeg reads, or of a video's: 16 kHz mono. The last is shorter."""
    # first_pts and async: what starts late or has gaps is filled with silence and stays in step with the picture
    options = ["-map", "0:a:0", "-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", str(RATE), "-f", "f32le"]
    for piece in decoded(path, "sound", options, 4 * BLOCK * HOP):
        block = np.frombuffer(piece, np.float32)
        if not np.isfinite(block).all():
            raise ValueError(f"{path}: the sound holds NaN or infinite samples")
        yield block


def load_audio(path):
    """Any sound file, or a video's sound -> float32 (N,), 16 kHz mono, about -1..1. ValueError if there is none."""
    return np.concatenate(list(audio_blocks(path)))


def mel_filters(n_mels, n_fft, low=60.0, high=7600.0):
    """Triangles equally spaced on the mel scale, (n_fft / 2 + 1, n_mels)."""
    mel = lambda hz: 2595 * np.log10(1 + hz / 700)
    place = (mel(np.fft.rfftfreq(n_fft, 1 / RATE)) - mel(low)) / (mel(high) - mel(low)) * (n_mels + 1)
    return np.clip(1 - np.abs(place[:, None] - np.arange(1, n_mels + 1)), 0, None)


MEL = mel_filters(40, 512)


def regroup(pieces, size):
    """Cut a stream of arrays (n,) into arrays of exactly `size` samples; the last may be shorter."""
    held = np.zeros(0, np.float32)
    for piece in pieces:
        held = np.concatenate([held, piece])
        *whole, held = np.split(held, range(size, len(held) + 1, size))
        yield from whole
    if len(held):
        yield held


def log_mel_blocks(pieces):
    """Sound in pieces of any length -> log-mel features of BLOCK frames, (n, 1, 160), as soon as they are known.

    Four 40-band spectra of 25 ms per frame; 0 is silence. A window reaches back, never ahead, and blocks have one size,
    so that the features of a sound are the same to the bit however it was cut.
    """
    step, width = HOP // 4, 400
    past, taper = np.zeros(width - step, np.float32), np.hanning(width)
    for block in regroup(pieces, BLOCK * HOP):
        wav = np.concatenate([past, block, np.zeros(BLOCK * HOP - len(block), np.float32)])
        windows = np.lib.stride_tricks.sliding_window_view(wav, width)[::step] * taper
        power = np.abs(np.fft.rfft(windows, 512)) ** 2 / taper.sum() ** 2
        mel = np.log1p(1e5 * power @ MEL) / 4
        yield torch.from_numpy(mel.astype(np.float32)).reshape(BLOCK, 1, -1)[:-(-len(block) // HOP)]
        past = wav[-len(past):]


def log_mel(wav, n_frames):
    """wav (N,) -> (n_frames, 1, 160); see log_mel_blocks."""
    wav = np.pad(wav, (0, max(0, n_frames * HOP - len(wav))))
    return torch.cat(list(log_mel_blocks([wav])))[:n_frames]


# --------------------------------------------------------------------------------------------------- the audio encoder

PARTS = "feature_extractor.", "feature_projection.", "encoder."            # what else a file holds served its training
# files of a larger class carry a prefix, and torch names weight norm differently since 2.1
SPELLINGS = {"wav2vec2.": "", "hubert.": "", "parametrizations.weight.original0": "weight_g",
             "parametrizations.weight.original1": "weight_v"}
ENCODERS = "get facebook/wav2vec2-base-960h or TencentGameMate/chinese-hubert-base from huggingface.co"


def read_json(path):
    """The dict in a JSON file; ValueError names a file that holds none."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def read_safetensors(path):
    """Tensors of a .safetensors file by name: 8 bytes of length, a JSON header, then plain numbers."""
    dtypes, data = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}, bytearray(path.read_bytes())
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        numbers = {key: data[start:][slice(*entry["data_offsets"])] for key, entry in header.items()}
        return {key: torch.frombuffer(numbers[key], dtype=dtypes[entry["dtype"]]).view(entry["shape"])
                for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({str(error)[:80]}); fetch it again") from None


class AudioEncoder:
    """What a public base-size wav2vec 2.0 or HuBERT hears, at 25 frames per second, as the released MoDA listens to it.

    GroupNorm and attention see the whole sound, so features depend on where it is cut: encode first, cut then.
    """

    def __init__(self, path, tensors, settings, device):
        """`tensors` as in the file, without prefix; `settings` of its config.json and preprocessor_config.json."""
        conv = "encoder.pos_conv_embed.conv.weight"
        try:
            g, v = tensors.pop(f"{conv}_g").float(), tensors.pop(f"{conv}_v").float()
            self.width, self.channels = tensors["feature_projection.projection.weight"].shape
            self.hidden = len(tensors["encoder.layers.0.feed_forward.intermediate_dense.bias"])
        except KeyError as error:
            raise ValueError(f"{path}: not wav2vec 2.0 or HuBERT, {error} is missing; {ENCODERS}") from None
        if self.width > 768:
            raise ValueError(f"{path}: a large model, but MoDA listens to the base size; {ENCODERS}")
        tensors[conv] = g * v / v.norm(dim=(0, 1), keepdim=True)
        self.shape = sum(key.endswith("q_proj.bias") for key in tensors), self.width         # L x A
        self.heads, self.groups = settings.get("num_attention_heads", 12), self.width // v.size(1)
        self.normalise = settings.get("do_normalize", True)
        self.net = Weights(path, tensors, self.layers, (1, 1, HOP), advice=ENCODERS, device=device)

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """A public base-size file or its folder -> encoder; ValueError if it is missing, broken or another network."""
        path, settings = Path(path), {}
        folder = path if path.is_dir() else path.parent
        if path == folder:
            path = next(folder.glob("model.safetensors"), folder / "pytorch_model.bin")
        for beside in ("config.json", "preprocessor_config.json"):
            if (folder / beside).exists():
                settings |= read_json(folder / beside)
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path, ENCODERS)
        for spelling, plain in SPELLINGS.items():
            tensors = {key.replace(spelling, plain): value for key, value in tensors.items()}
        return cls(path, {key: value for key, value in tensors.items() if key.startswith(PARTS)}, settings, device)

    def layers(self, net, x):
        """The network: sound (1, 1, 640 T) -> the outputs of all L layers, (T, L, A)."""
        for _ in range(2):                                                 # as released: not the same as 40 at once
            x = F.pad(x, (20, 20), mode="reflect")
        for i, (kernel, stride) in enumerate([(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]):
            name = f"feature_extractor.conv_layers.{i}"
            x = net.conv(x, f"{name}.conv", self.channels, k=kernel, stride=stride, bias=False)
            if i == 0:
                norm = net.plain(f"{name}.layer_norm", x, weight=(self.channels,), bias=(self.channels,))
                x = F.group_norm(x, self.channels, *norm)
            x = F.gelu(x)                                                  # (1, C, 2 T) in the end
        x = F.interpolate(x, x.size(-1) // 2, mode="linear", align_corners=True).mT      # from 50 to 25 Hz
        x = net.layer_norm(x, "feature_projection.layer_norm", 1e-5)
        x = net.linear(x, "feature_projection.projection", self.width)     # (1, T, A)
        near = net.conv(x.mT, "encoder.pos_conv_embed.conv", self.width, k=128, groups=self.groups)[..., :-1]
        h, outputs = net.layer_norm(x + F.gelu(near).mT, "encoder.layer_norm", 1e-5), []
        for name in [f"encoder.layers.{i}" for i in range(self.shape[0])]:
            q, k, v = (net.linear(h, f"{name}.attention.{part}_proj", self.width) for part in "qkv")
            y = F.scaled_dot_product_attention(*(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)))
            y = net.linear(y.transpose(1, 2).flatten(2), f"{name}.attention.out_proj", self.width)
            h = net.layer_norm(h + y, f"{name}.layer_norm", 1e-5)
            y = F.gelu(net.linear(h, f"{name}.feed_forward.intermediate_dense", self.hidden))
            y = net.linear(y, f"{name}.feed_forward.output_dense", self.width)
            h = net.layer_norm(h + y, f"{name}.final_layer_norm", 1e-5)
            outputs.append(h)
        return torch.stack(outputs, 2)[0]

    def __call__(self, wav, n_frames=None):
        """wav (N,) at 16 kHz -> (T, L, A); T = N // 640 but at least 1, or n_frames: the last frame is repeated."""
        features = torch.cat(list(self.blocks([np.asarray(wav)])))
        n = max(1, len(wav) // HOP) if n_frames is None else n_frames
        return features[torch.arange(n).clamp(max=len(features) - 1)]

    @torch.inference_mode()
    def blocks(self, pieces):
        """Sound in pieces of any length -> features (n, L, A) of every started frame, minute by minute."""
        for wav in regroup(pieces, 60 * RATE):
            x = torch.from_numpy(np.pad(wav, (0, max(0, HOP - len(wav))))).to(self.net.device)
            if self.normalise:
                x = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
            features = self.layers(self.net, x[None, None, :len(x) // HOP * HOP])
            yield features[torch.arange(-(-len(wav) // HOP)).clamp(max=len(features) - 1)].cpu()


# ------------------------------------------------------------------------------------------------------ the toy talker

# (point, axis) moved per unit of each control, in LivePortrait's own directions; 19 y is the mouth opening, frown < 0
CONTROLS = {
    "aaa": {(19, 1): 1e-3, (19, 2): 1e-4, (17, 1): -1e-4}, "eee": {(20, 2): -1e-3, (20, 1): -1e-3, (14, 1): -1e-3},
    "woo": {(14, 1): 1e-3, (3, 1): -5e-4, (7, 1): -5e-4, (17, 2): -5e-4},
    "smile": {(20, 1): -1e-2, (14, 1): -2e-2, (17, 1): 6.5e-3, (17, 2): 3e-3, (13, 1): -2.75e-3, (16, 1): -2.75e-3,
              (3, 1): -3.5e-3, (7, 1): -3.5e-3},
    "blink": {(11, 1): -1e-3, (13, 1): 3e-4, (15, 1): -1e-3, (16, 1): 3e-4},
    "brow": {(1, 1): 1e-3, (2, 1): -1e-3}, "frown": {(1, 0): -1e-3, (2, 0): 1e-3, (1, 1): 3e-4, (2, 1): -3e-4}}


def expression(**controls):
    """Sum of the controls' directions; each control a number or (T,) -> (63,) or (T, 63)."""
    delta = np.zeros((*np.broadcast_shapes(*map(np.shape, controls.values())), 21, 3))
    for name, value in controls.items():
        for (point, axis), step in CONTROLS[name].items():
            delta[..., point, axis] += np.multiply(value, step)
    return delta.reshape(*delta.shape[:-2], 63)


# first two formants in Hz | voice, hiss (0..1), the hiss's centre in kHz | seconds | jaw, spread, round (-1..1)
VOWELS = np.array([                                # a e i, o u @
    (750, 1250, 1, 0, 3, .17, 1, .1, 0), (520, 1850, 1, 0, 3, .15, .5, .6, 0), (300, 2250, .9, 0, 3, .14, .2, 1, 0),
    (480, 900, 1, 0, 3, .16, .55, 0, .8), (320, 800, .9, 0, 3, .15, .15, 0, 1), (520, 1450, .8, 0, 3, .1, .4, .1, .1)])
CONSONANTS = np.array([                            # m b n, t s S, f l w
    (260, 1000, .3, 0, 3, .09, -.3, 0, .1), (220, 900, .06, .01, 2, .08, -.35, 0, 0),
    (280, 1600, .3, 0, 3, .07, .1, .2, 0), (300, 1800, 0, .15, 5, .07, .1, .2, 0),
    (300, 1700, 0, .35, 6, .1, .02, .5, 0), (300, 1800, 0, .35, 3, .1, .05, 0, .6),
    (300, 1200, 0, .12, 7, .09, -.15, .1, 0), (380, 1300, .5, 0, 3, .07, .25, .1, 0),
    (300, 650, .5, 0, 3, .08, .05, 0, 1)])
PAUSE = np.array([(480, 1450, 0, 0, 3, .5, 0, 0, 0)])
# smile, brow, frown, blink, jaw | factors on pitch, pitch range, loudness, rate
MOODS = np.array([
    (-0.2, 0, -9, -6, 4, 1.15, 1.3, 1.6, 1.15), (0.25, 2, 0, -10, -4, 0.9, 0.7, 0.8, 0.9),
    (-0.3, 0, -5, -12, -2, 0.85, 0.9, 0.9, 0.85), (-0.25, 10, -4, 4, 2, 1.3, 1.0, 0.8, 1.2),
    (1.0, 4, 0, -2, 3, 1.2, 1.5, 1.2, 1.1), (0, 0, 0, 0, 0, 1, 1, 1, 1),
    (-0.3, 5, -2, -9, -3, 0.9, 0.6, 0.6, 0.8), (0.1, 14, 0, 5, 10, 1.3, 1.6, 1.1, 1.0)])


def toy_prototypes():
    """The expression that each of the eight emotions holds, (8, 63)."""
    smile, brow, frown, blink = MOODS.T[:4]
    return expression(smile=smile, brow=brow, frown=frown, blink=blink)


def smooth(track, width):
    """Gaussian average along the first axis; width (standard deviation) in samples."""
    kernel = np.exp(-0.5 * (np.arange(-3 * width, 3 * width + 1) / width) ** 2)
    padded = np.pad(track.astype(float), [(3 * width, 3 * width)] + [(0, 0)] * (track.ndim - 1), mode="reflect")
    return np.lib.stride_tricks.sliding_window_view(padded, len(kernel), 0) @ (kernel / kernel.sum())


def wander(rng, width, *shape):
    """Smooth noise of unit variance; width in samples."""
    return smooth(rng.standard_normal(shape), width) * (4 * np.pi * width ** 2) ** 0.25


def toy_clip(seed, T):
    """One clip of the toy talker: wav (T * 640,), motion (T, 70), emotion, identity (63,)."""
    rng = np.random.default_rng(seed)
    emotion = int(rng.integers(8))
    face, voice = np.split(MOODS[emotion], [5])
    target = toy_articulation(rng, 4 * T, voice[-1])                       # articulators move at 100 Hz
    motion, identity = toy_face(rng, face * rng.uniform(0.8, 1.2, 5), target)
    return toy_voice(rng, voice, target), motion[2::4].astype(np.float32), emotion, identity


def toy_articulation(rng, n, rate):
    """Random syllables and pauses: the columns of the phones and the stress, as targets per 10 ms -> (n, 10)."""
    count = n // 6 + 20                                                    # enough, for none is shorter than 66 ms
    parts = [table[rng.integers(len(table), size=count)] for table in (CONSONANTS, VOWELS, CONSONANTS, PAUSE)]
    phones = np.pad(np.stack(parts, 1), ((0, 0), (0, 0), (0, 1)))          # (count, 4, 10)
    stress = rng.uniform(0.75, 1.25, count)
    phones[:, 1, [2, 6]] *= stress[:, None]
    phones[:, 1, 9] = np.maximum(0, stress - 1)
    phones[:, :3, 5] *= rng.uniform(0.8, 1.25, (count, 3)) / rate
    phones[:, 3, 5] *= rng.uniform(0.3, 1.8, count)
    phones = phones[rng.random((count, 4)) < (0.9, 1, 0.25, 0.17)]         # not every syllable has all four
    ends = np.cumsum(phones[:, 5])
    return phones[np.searchsorted(ends, rng.uniform(0, 1) + np.arange(n) / 100)]


def toy_face(rng, mood, target):
    """Motion (n, 70) at 100 Hz and identity (63,): lips follow the voice, the mood holds the rest, the head drifts."""
    n, build = len(target), rng.uniform(-1, 1, 4)                          # the proportions of this face
    identity = FACE * (1 + 0.12 * build[0], 1 + 0.08 * build[1], 1)
    identity[[14, 20], 0] *= 1 + 0.2 * build[2]
    identity[[1, 2], 1] -= 0.015 * build[3]
    jaw, spread, rounding = smooth(target[:, 6:9], 4).T * (1 + 0.35 * build[2])      # wide mouths move further
    speaking, blinks = smooth(target[:, 6] != 0, 10), 10 * smooth(rng.random(n) < 0.003, 4)
    smile, brow, frown, lids = (mood[:4] * (1 + 0.12 * wander(rng, 80, n, 4))).T
    motion = np.zeros((n, M))
    motion[:, EXP] = expression(aaa=55 * jaw + mood[4] * speaking, eee=10 * spread, woo=12 * rounding, smile=smile,
                                brow=brow, frown=frown, blink=np.clip(lids - 22 * blinks, -20, 5))
    # scale, t_x, t_y, pitch, yaw, roll: where the head is at rest, and how far it drifts
    rest = rng.normal((1.3, 0, 0.1, 0, 0, 0), (0.05, 0.02, 0.02, 2, 4, 1.5))
    motion[:, [63, 64, 65, 67, 68, 69]] = rest + wander(rng, 60, n, 6) * (0.006, 0.012, 0.006, 2.5, 5, 2)
    motion[:, ROT.start] += 12 * smooth(target[:, 9], 12)                  # it nods with the stress
    return motion, identity.ravel()


def toy_voice(rng, mood, target):
    """Source and filter: glottal pulses and noise through moving formants, in a room; (n, 10) -> (n * 160,)."""
    n, step = len(target), HOP // 4
    clock = np.arange(n * step)
    upsample = lambda x: np.interp(clock, clock[step // 2::step], x)
    noise = lambda: rng.standard_normal(n * step)
    voiced, hiss = (upsample(x) for x in smooth(target[:, 2:4], 2).T)
    melody = 0.5 * wander(rng, 12, n) + smooth(target[:, 2], 15)
    pitch = rng.uniform(90, 230) * mood[0] * 2 ** (0.25 * mood[1] * melody)
    angle = 2 * np.pi * np.cumsum(upsample(pitch)) / RATE
    r = np.clip(0.86 + 0.04 * mood[2] + rng.normal(0, 0.02), 0.8, 0.94)    # harmonic k has strength r^k: effort
    pulses = (1 - r * np.cos(angle)) / (1 - 2 * r * np.cos(angle) + r * r) - 1
    source = voiced * (pulses + rng.uniform(0.02, 0.1) * noise())

    hz, width = np.fft.rfftfreq(HOP, 1 / RATE), np.array([[80], [100], [140], [250]])
    f = np.hstack([smooth(target[:, :2], 3), np.tile((2550, 3600), (n, 1))])[..., None] * rng.uniform(0.85, 1.2)
    gain = (f ** 2 / np.hypot(f ** 2 - hz ** 2, width * hz + 1)).prod(1)   # four resonances
    gain *= (0.02 + hz / 1000) ** rng.uniform(0.2, 1.0)                    # microphones differ
    band = 6 * np.exp(-0.5 * ((hz - 1000 * target[:, 4:5]) / 1200) ** 2)
    stft = dict(n_fft=HOP, hop_length=step, window=torch.hann_window(HOP).double())
    filtered = sum(torch.stft(torch.tensor(x), **stft, return_complex=True)[:, :n] * torch.tensor(shape.T)
                   for x, shape in ((source, gain), (hiss * noise(), band)))
    wav = torch.istft(F.pad(filtered, (0, 1)), **stft).numpy()

    echo = np.exp(-np.arange(RATE // 4) / RATE / rng.uniform(0.02, 0.08)) * rng.standard_normal(RATE // 4)
    wet = np.fft.irfft(np.fft.rfft(wav, 2 * len(wav)) * np.fft.rfft(echo, 2 * len(wav)))[:len(wav)]
    music = sum(upsample(wander(rng, 10, n).clip(0)) * np.sin(rng.uniform(0.015, 0.15) * clock) for _ in range(3))
    wav = wav / wav.std() + rng.uniform(0, 0.7) * wet / wet.std() + rng.choice([0, 0, 0.25]) * rng.random() * music
    wav = mood[2] ** 0.5 * 10 ** rng.uniform(-1.7, -0.9) * (wav + 10 ** rng.uniform(-3, -1) * noise())
    return np.clip(wav, -1, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ datasets

def frame_records(**columns):
    """Columns (T, ...) -> an array (T,) of records, one per frame, as a clip lies in memory and on disk."""
    records = np.empty(len(columns["motion"]), [(name, x.dtype, x.shape[1:]) for name, x in columns.items()])
    for name, x in columns.items():
        records[name] = x
    return records


def load_records(path):
    """A clip's file, of which only the parts that are looked at are read; ValueError if it is damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and prepare the data again") from None


def moments(clips):
    """Mean and standard deviation of the motion in (T,) records, (2, 70), in one pass."""
    sums = sum(np.stack([m ** 0, m, m * m]).sum(1) for m in (clip["motion"].astype(float) for clip in clips))
    mean, square = sums[1:] / sums[0]
    return np.stack([mean, np.sqrt(np.maximum(square - mean ** 2, 0))])


class Clips(torch.utils.data.Dataset):
    """Windows of 1 + 80 consecutive frames from clips, each an array of records or the path of its .npy file.

    An item: motion (80, 70) and prev (70,) in LivePortrait units, audio (80, L, A), emotion, identity (63,), and
    mask (80,), true: no window is cut short. For a window with NaN comes the next one that shares no frame with it;
    ValueError where that happens to more than 1 % of them.
    """
    frames = 80                                    # Sec. 4.1.2

    def __init__(self, clips, emotion, moments):
        self.clips, self.emotion, self.moments = clips, np.array(emotion), np.array(moments)
        sizes = np.array([self.records(k)["audio"].shape for k in range(len(clips))])        # T, L, A
        other = (sizes[:, 1:] != sizes[0, 1:]).any(1)
        if other.any():
            raise ValueError(f"{clips[other.argmax()]}: other features than in {clips[0]}; prepare the data again")
        self.length, self.audio_shape = sizes[:, 0], tuple(sizes[0, 1:].tolist())
        self.start = np.cumsum([0, *np.maximum(self.length - self.frames, 0)])               # first window of each clip
        self.asked = self.spoilt = 0

    @classmethod
    def open(cls, folder, split="train"):
        """What `python data.py` prepared, "train" or "val" clips, or "" for both; ValueError if it is damaged."""
        path = Path(folder, "manifest.json")
        try:
            manifest = read_json(path)
            rows = [row for row in manifest["clips"] if split in ("", row["split"])]
            clips, emotion = ([row[key] for row in rows] for key in ("file", "emotion"))
            return cls([path.parent / clip for clip in clips], emotion, manifest["moments"])
        except (OSError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: no data set with {split} clips ({error!r}); prepare one: data.py --videos=DIR") from None

    def records(self, k):
        """Clip k, (T,) records. A file is mapped anew each time: of thousands, few may be open."""
        clip = self.clips[k]
        return load_records(clip) if isinstance(clip, Path) else clip

    def __len__(self):
        return int(self.start[-1])

    def __getitem__(self, i):
        k = np.searchsorted(self.start, i, side="right") - 1
        window = self.records(k)[i - self.start[k]:][:1 + self.frames]     # of a file, only these frames are read
        motion, audio, identity = (torch.tensor(window[name]).float() for name in ("motion", "audio", "identity"))
        self.asked += 1
        if not (motion.isfinite().all() and audio.isfinite().all()):
            self.spoilt += 1
            if self.spoilt > max(10, self.asked / 100):
                raise ValueError(f"{self.spoilt} of {self.asked} windows hold NaN or infinity; prepare the data again")
            return self[(i + self.frames + 1) % len(self)]
        return dict(motion=motion[1:], prev=motion[0], audio=audio[1:], emotion=self.emotion[k], identity=identity[0],
                    mask=torch.ones(self.frames, dtype=torch.bool))

    def clip(self, k):
        """All of clip k: motion (T, 70), audio (T, L, A), emotion, identity (63,)."""
        motion, audio, identity = (self.records(k)[name].astype(np.float32) for name in ("motion", "audio", "identity"))
        return motion, audio, int(self.emotion[k]), identity[0]


class ToyTalker(Clips):
    """The embedded data set: `clips` made-up clips of 8 s; clip k of a split never changes."""
    T = 200

    def __init__(self, split="train", clips=300):
        seeds = tqdm([(split != "train", k) for k in range(clips)], f"toy talker, {split}", leave=False)
        wavs, motion, emotion, identity = zip(*(toy_clip(seed, self.T) for seed in seeds))
        self.wavs = wavs if split != "train" else None
        audio = (log_mel(wav, self.T).numpy() for wav in wavs)
        made = [frame_records(motion=m, audio=a, identity=np.tile(x_c, (self.T, 1)))
                for m, a, x_c in zip(motion, audio, identity)]
        super().__init__(made, emotion, moments(made))


# -------------------------------------------------------------------------------------------------------- preparation
# A data set is clips/VIDEO.npy, the records of every video, and manifest.json: settings, clips, statistics. Each file
# gets its name when it is complete.

VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts"}
# our names, which are HSEmotion's in lower case; MEAD's folders, where they differ; numbers
LABELS = {name: k for k, emotion in enumerate(EMOTIONS) for name in (emotion, str(k))}
LABELS |= dict(angry=0, disgusted=2, happy=4, sad=6, surprised=7)
# channel, mean and standard deviation, as published with the released model
PUBLISHED = {"scale": (63, 1.2865, 0.0691), "x": (64, -0.0133, 0.0658), "y": (65, 0.0999, 0.0348),
             "pitch": (67, -2.3407, 8.8819), "yaw": (68, -0.2464, 23.8553), "roll": (69, -0.3269, 5.6063),
             "mouth": (MOUTH, -0.0056, 0.0214)}


def pictures(path, crop, batch=16):
    """The square around the face at 25 fps, from time 0 on: uint8 tensors (batch, 256, 256, 3)."""
    x, y, size = crop.split(",") if crop else ("(iw-min(iw,ih))/2", "(ih-min(iw,ih))/2", "min(iw,ih)")
    inside = f"lte({x}+{size},iw)*lte({y}+{size},ih)"                      # ffmpeg would move the square, not refuse it
    fit = f"fps=25:start_time=0,crop='if({inside},{size},0)':'{size}':'{x}':'{y}':exact=1,scale=256:256:flags=area"
    options = ["-map", "0:V:0", "-vf", fit, "-pix_fmt", "rgb24", "-f", "rawvideo", "-xerror"]
    for piece in decoded(path, f"picture with crop {crop}" if crop else "picture", options, batch * 256 * 256 * 3):
        yield torch.frombuffer(bytearray(piece), dtype=torch.uint8).view(-1, 256, 256, 3)


def read_labels(path):
    """csv file, columns clip (a path below --videos, or a name without suffix) and emotion -> {clip: number}."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return {row["clip"]: LABELS[row["emotion"].strip().lower()] for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be used ({error!r}); its first line is clip,emotion, and emotions are "
                         f"{' '.join(LABELS)}") from None


def emotion_of(path, labels, otherwise):
    """Number of the emotion that the labels tell of a video, or its innermost folder that is named like one."""
    folders = [LABELS.get(part.lower()) for part in path.parts[-2::-1] if not part.isdigit()]
    found = [labels.get(path.as_posix()), labels.get(path.stem), *folders, otherwise]
    return next(emotion for emotion in found if emotion is not None)


def hsemotion():
    """The classifier that the paper labels with: image, uint8 (256, 256, 3) -> emotion 0 to 7."""
    try:
        from hsemotion_onnx.facial_emotions import HSEmotionRecognizer
    except ImportError as error:
        raise ValueError(f"--emotion=hsemotion: {error}; pip install hsemotion-onnx") from None
    net = HSEmotionRecognizer("enet_b0_8_best_vgaf")                       # its eight emotions have our order
    return lambda image: int(np.argmax(net.predict_emotions(image, logits=False)[1]))


@torch.inference_mode()
def extract(path, face, hear, crop, classify):
    """One video -> the records of its frames. ValueError if it cannot be used."""
    wav, motion, x_c, votes = load_audio(path), [], [], []
    for images in pictures(path, crop):
        heads = motion_heads(face.M, images.to(face.device).movedim(-1, 1) / 255)
        motion.append(to_motion(heads).cpu())
        x_c.append(heads["kp"].cpu())
        votes.append(classify(images[0].numpy()))
    T = min(sum(map(len, motion)), len(wav) // HOP)
    if T <= Clips.frames:
        raise ValueError(f"{path}: {T} frames of picture and sound, and a window takes {Clips.frames + 1}")
    wav = wav[:T * HOP]                            # whole: what an encoder hears depends on where the sound is cut
    identity = torch.cat(x_c)[:T].mean(0)          # of all frames: a blink or a blur in one shall not make a face
    columns = dict(motion=torch.cat(motion)[:T], audio=torch.cat([part.half() for part in hear([wav])]),
                   identity=identity.expand(T, 63), emotion=torch.full((T,), np.bincount(votes).argmax()),
                   loudness=log_mel(wav, T).mean((1, 2)))
    if not all(x.isfinite().all() for x in columns.values()):
        raise ValueError(f"{path}: its motion or features hold NaN or infinity")
    return frame_records(**{name: x.numpy() for name, x in columns.items()})


def write(path, content):
    """A file with these bytes, as a whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error}); the same command goes on from here") from None


def prepare(flags):
    """Talking videos -> a data set. A run that was cut off goes on; unusable videos are told at the end."""
    root, folder = Path(flags["videos"]), Path(flags["data_dir"])
    videos = sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in VIDEOS)
    if not videos:
        raise ValueError(f"{root}: no videos there; looked for {' '.join(sorted(VIDEOS))}")
    labels = read_labels(flags["labels"]) if flags["labels"] else {}
    classify = hsemotion() if flags["emotion"] else lambda image: NO_EMOTION
    device, ears = flags["device"] or default_device(), flags["audio_encoder"]
    face = LivePortrait(flags["weights"], device)
    hear = AudioEncoder.from_pretrained(ears, device).blocks if ears else log_mel_blocks

    path = folder / "manifest.json"
    settings = {key: flags[key] for key in ("videos", "weights", "audio_encoder", "crop", "emotion")}
    settings |= dict(torch=torch.__version__, ffmpeg=imageio_ffmpeg.get_ffmpeg_version())
    manifest = read_json(path) if path.exists() else dict(settings=settings, clips=[])
    if manifest["settings"] != settings:
        raise ValueError(f"{path}: begun with {manifest['settings']}, not {settings}; use another --data_dir")
    write(path, json.dumps(manifest, indent=1).encode())

    rows, left_out, motion = [], [], []
    for name in tqdm(videos, "preparing", unit="video"):
        file = folder / "clips" / f"{name}.npy"
        try:
            if not file.exists():
                buffer = io.BytesIO()              # np.save into a file would not notice a full disk
                np.save(buffer, extract(root / name, face, hear, flags["crop"], classify))
                write(file, buffer.getvalue())
            emotion = emotion_of(name, labels, int(load_records(file)["emotion"][0]))
            split = "val" if len(rows) % 20 == 1 else "train"
            rows.append(dict(file=file.relative_to(folder).as_posix(), emotion=emotion, split=split))
        except ValueError as error:
            left_out.append(error)
    for error in left_out:
        print(f"left out: {error}", file=sys.stderr)
    if not rows:
        raise ValueError(f"{root}: none of its {len(videos)} videos can be used")
    train = (load_records(folder / row["file"]) for row in rows if row["split"] == "train")
    manifest = dict(settings=settings, clips=rows, moments=moments(train).tolist())
    write(path, json.dumps(manifest, indent=1).encode())
    print(f"{folder}: {len(rows)} clips; {len(left_out)} videos left out")


def voice_lag(mouth, loud, reach=15):
    """By how many frames the voice follows the mouth's opening where both agree best, and their correlation there."""
    mouth, loud = np.diff(mouth), np.diff(loud)                            # what drifts slowly agrees with anything
    inner = slice(reach, len(mouth) - reach)
    with np.errstate(invalid="ignore", divide="ignore"):                   # silence agrees with nothing
        fit = {k: np.corrcoef(mouth[inner], np.roll(loud, -k)[inner])[0, 1] for k in range(-reach, reach + 1)}
    best = max(fit, key=fit.get)
    return best, fit[best]


def check(folder):
    """Print what a data set holds next to what the released model was trained on, and the clips that look wrong."""
    data = Clips.open(folder, split="")
    print(f"{folder}: {len(data.clips)} clips, {data.length.sum() / 90_000:.2f} h, {len(data)} windows")
    print("emotions:", ", ".join(f"{name} {n}" for k, name in enumerate(EMOTIONS) if (n := sum(data.emotion == k))))
    for name, (channel, *published) in PUBLISHED.items():
        print("{:6}{:9.4f} +- {:7.4f}, published {:9.4f} +- {:7.4f}".format(name, *data.moments[:, channel], *published))
    for k, path in enumerate(data.clips):
        motion = data.records(k)["motion"]
        lag, fit = voice_lag(motion[:, MOUTH], data.records(k)["loudness"])
        if fit > 0.3 and abs(lag) > 3:
            print(f"look at {path}: the voice follows the lips by {lag:+d} frames (correlation {fit:.2f})")
        for name, (channel, mean, std) in PUBLISHED.items():
            if abs(motion[:, channel].mean() - mean) > 4 * std:
                print(f"look at {path}: {name} {motion[:, channel].mean():.4g} on average")


def main(argv):
    flags = parse_flags(__doc__, argv)
    if not flags["data_dir"] or bool(flags["videos"]) == flags["check"]:
        raise UsageError("needed: --data_dir=FOLDER and either --videos=FOLDER or --check")
    if flags["emotion"] not in ("", "hsemotion") or not re.fullmatch(r"(\d+,\d+,\d+)?", flags["crop"]):
        raise UsageError("expected --emotion=hsemotion, if any, and --crop=x,y,size in pixels")
    check(flags["data_dir"]) if flags["check"] else prepare(flags)


# ---------------------------------------------------------------------------------------------------------- the scripts

def parse_flags(doc, argv, defaults={}):
    """The flags that a script's docstring lists as `--name=default`, other `defaults`, and what argv says instead.

    A flag has the type of its default; a bare --name switches a bool on. UsageError says what is wrong.
    """
    def literal(text):
        try:
            return json.loads(text.lower())                                # a number, or a bool
        except ValueError:
            return text
    flags = {name: literal(text) for name, text in re.findall(r"^ +--(\w+)=(\S*)", doc, re.M)} | defaults
    if {"-h", "--help"} & set(argv):
        print(doc)
        sys.exit()
    for arg in argv:
        name, _, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in flags:
            raise UsageError(f"unknown flag {arg}; known: {', '.join(flags)}")
        kind = type(flags[name])
        try:
            flags[name] = {"": True, "True": True, "False": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UsageError(f"{arg}: expected {kind.__name__}, as in --{name}={flags[name]}") from None
    return flags


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


class UsageError(Exception):
    """A flag that makes no sense: exit code 2."""


def run(main):
    """Call a script's main(argv); a mistake of the user is one line on stderr and exit code 1, or 2 for a flag."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    run(main)
