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
import ast
import csv
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import zlib
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
            while piece := ffmpeg.stdout.read(size):
                yield piece
            if ffmpeg.wait():
                log.seek(0)
                reason = log.read(1000).decode(errors="replace").splitlines() or ["ffmpeg failed"]
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
    wav = np.concatenate([np.zeros(0, np.float32), *audio_blocks(path)])
    if not len(wav):
        raise ValueError(f"{path}: the sound is empty")
    return wav


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
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
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

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
UNUSED = ("masked_spec_embed", "mask_time_emb_vector", "lm_head", "quantizer", "project_", "final_proj",
          "label_embs_concat", "adapter")
# files of a larger class carry a prefix, and torch names weight norm differently since 2.1
SPELLINGS = {"wav2vec2.": "", "hubert.": "", "parametrizations.weight.original0": "weight_g",
             "parametrizations.weight.original1": "weight_v"}
ENCODERS = "get facebook/wav2vec2-base-960h or TencentGameMate/chinese-hubert-base from huggingface.co"


def read_safetensors(path):
    """Tensors of a .safetensors file by name: 8 bytes of length, a JSON header, then plain numbers."""
    dtypes, data = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}, bytearray(path.read_bytes())
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {name: torch.frombuffer(data, dtype=dtypes[entry["dtype"]], count=math.prod(entry["shape"]),
                                       offset=start + entry["data_offsets"][0]).reshape(entry["shape"])
                for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:     # frombuffer refuses what lies past the end
        raise ValueError(f"{path}: not a readable safetensors file ({str(error)[:80]}); fetch it again") from None


def encoder_layers(net, x, channels, width, hidden, layers, heads, groups):
    """wav2vec 2.0 or HuBERT of base size: sound (1, 1, 640 T) -> the outputs of all L layers, (T, L, width)."""
    for _ in range(2):                                                     # as released: not the same as 40 at once
        x = F.pad(x, (20, 20), mode="reflect")
    for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES)):
        name = f"feature_extractor.conv_layers.{i}"
        x = net.conv(x, f"{name}.conv", channels, k=kernel, stride=stride, bias=False)
        if i == 0:
            norm = net.plain(f"{name}.layer_norm", x, weight=(channels,), bias=(channels,))
            x = F.group_norm(x, channels, *norm)
        x = F.gelu(x)                                                      # (1, C, 2 T) in the end
    x = F.interpolate(x, x.size(-1) // 2, mode="linear", align_corners=True).mT          # from 50 to 25 Hz
    x = net.layer_norm(x, "feature_projection.layer_norm", 1e-5)
    x = net.linear(x, "feature_projection.projection", width)              # (1, T, width)
    near = net.conv(x.mT, "encoder.pos_conv_embed.conv", width, k=128, groups=groups)[..., :-1]
    h, outputs = net.layer_norm(x + F.gelu(near).mT, "encoder.layer_norm", 1e-5), []
    for name in [f"encoder.layers.{i}" for i in range(layers)]:
        q, k, v = (net.linear(h, f"{name}.attention.{part}_proj", width) for part in "qkv")
        y = F.scaled_dot_product_attention(*(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)))
        y = net.linear(y.transpose(1, 2).flatten(2), f"{name}.attention.out_proj", width)
        h = net.layer_norm(h + y, f"{name}.layer_norm", 1e-5)
        y = F.gelu(net.linear(h, f"{name}.feed_forward.intermediate_dense", hidden))
        y = net.linear(y, f"{name}.feed_forward.output_dense", width)
        h = net.layer_norm(h + y, f"{name}.final_layer_norm", 1e-5)
        outputs.append(h)
    return torch.stack(outputs, 2)[0]


class AudioEncoder:
    """What a public base-size wav2vec 2.0 or HuBERT hears, at 25 frames per second, as the released MoDA listens to it.

    GroupNorm and attention see the whole sound, so features depend on where it is cut: encode first, cut then.
    """

    def __init__(self, path, tensors, settings, device):
        """`tensors` as in the file, without prefix; `settings` of its config.json and preprocessor_config.json."""
        conv = "encoder.pos_conv_embed.conv.weight"
        try:
            g, v = tensors.pop(f"{conv}_g").float(), tensors.pop(f"{conv}_v").float()
            tensors[conv] = g * v / v.norm(dim=(0, 1), keepdim=True)
            width, channels = tensors["feature_projection.projection.weight"].shape
            hidden = len(tensors["encoder.layers.0.feed_forward.intermediate_dense.bias"])
        except KeyError as error:
            raise ValueError(f"{path}: not wav2vec 2.0 or HuBERT, {error} is missing; {ENCODERS}") from None
        if width > 768:
            raise ValueError(f"{path}: a large model, but MoDA listens to the base size; {ENCODERS}")
        self.shape = layers, width = sum(key.endswith("q_proj.bias") for key in tensors), width      # L x A
        self.normalise = settings.get("do_normalize", True)
        self.layers = functools.partial(encoder_layers, channels=channels, width=width, hidden=hidden, layers=layers,
                                        heads=settings.get("num_attention_heads", 12), groups=width // v.size(1))
        self.net = Weights(path, tensors, self.layers, (1, 1, HOP), advice=ENCODERS, device=device)

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """A public base-size file or its folder -> encoder; ValueError if it is missing, broken or another network."""
        path, settings = Path(path), {}
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            path /= "model.safetensors" if (path / "model.safetensors").exists() else "pytorch_model.bin"
        for beside in ("config.json", "preprocessor_config.json"):
            if (folder / beside).exists():
                settings |= json.loads((folder / beside).read_text())
        safe = path.suffix == ".safetensors" and path.exists()
        tensors = read_safetensors(path) if safe else read_tensors(path, ENCODERS)
        for spelling, plain in SPELLINGS.items():
            tensors = {key.replace(spelling, plain): value for key, value in tensors.items()}
        return cls(path, {key: value for key, value in tensors.items() if not key.startswith(UNUSED)}, settings, device)

    def __call__(self, wav, n_frames=None):
        """wav (N,) at 16 kHz -> (T, L, A); T = N // 640 but at least 1, or n_frames: the last frame is repeated."""
        features = torch.cat(list(self.blocks([np.asarray(wav)])))
        n = max(1, len(wav) // HOP) if n_frames is None else n_frames
        return features[torch.arange(n).clamp(max=len(features) - 1)]

    @torch.inference_mode()
    def blocks(self, pieces):
        """Sound in pieces of any length -> features (n, L, A) of every started frame, minute by minute."""
        for wav in regroup(pieces, 60 * RATE):
            wav, n = torch.from_numpy(np.pad(wav, (0, max(0, HOP - len(wav))))).to(self.net.device), -(-len(wav) // HOP)
            x = (wav - wav.mean()) / (wav.var(correction=0) + 1e-7).sqrt() if self.normalise else wav
            features = self.layers(self.net, x[None, None, :len(x) // HOP * HOP])
            yield features[torch.arange(n).clamp(max=len(features) - 1)].cpu()


# ------------------------------------------------------------------------------------------------------ the toy talker

# (point, axis) moved per unit of each control, in LivePortrait's own directions; 19 y is the mouth opening, frown < 0
CONTROLS = {
    "aaa": {(19, 1): 1e-3, (19, 2): 1e-4, (17, 1): -1e-4}, "eee": {(20, 2): -1e-3, (20, 1): -1e-3, (14, 1): -1e-3},
    "woo": {(14, 1): 1e-3, (3, 1): -5e-4, (7, 1): -5e-4, (17, 2): -5e-4},
    "smile": {(20, 1): -1e-2, (14, 1): -2e-2, (17, 1): 6.5e-3, (17, 2): 3e-3, (13, 1): -2.75e-3, (16, 1): -2.75e-3,
              (3, 1): -3.5e-3, (7, 1): -3.5e-3},
    "blink": {(11, 1): -1e-3, (13, 1): 3e-4, (15, 1): -1e-3, (16, 1): 3e-4},
    "brow": {(1, 1): 1e-3, (2, 1): -1e-3}, "frown": {(1, 0): -1e-3, (2, 0): 1e-3, (1, 1): 3e-4, (2, 1): -3e-4},
    "gaze_x": {(11, 0): 8e-4, (15, 0): 8e-4}, "gaze_y": {(11, 1): -1e-3, (15, 1): -1e-3}}


def expression(**controls):
    """Sum of the controls' directions; each control a number or (T,) -> (63,) or (T, 63)."""
    delta = 0
    for name, value in controls.items():
        row = np.zeros(63)
        for (point, axis), step in CONTROLS[name].items():
            row[3 * point + axis] = step
        delta = delta + np.multiply.outer(value, row)
    return delta


# first two formants in Hz | voice, hiss (0..1), the hiss's centre in kHz | seconds | jaw, spread, round (-1..1)
PHONES = {
    "a": (750, 1250, 1.0, 0, 3, .17, 1.0, .1, 0), "e": (520, 1850, 1.0, 0, 3, .15, .50, .6, 0),
    "i": (300, 2250, 0.9, 0, 3, .14, 0.2, 1., 0), "o": (480, 900, 1.0, 0, 3, .16, .55, 0., .8),
    "u": (320, 800, 0.9, 0, 3, .15, 0.15, 0, 1.), "@": (520, 1450, 0.8, 0, 3, .10, .40, .1, .1),
    "m": (260, 1000, .3, 0, 3, .09, -.3, 0, .1), "b": (220, 900, .06, .01, 2, .08, -.35, 0, 0),
    "n": (280, 1600, .3, 0, 3, .07, .1, .2, 0), "t": (300, 1800, 0, .15, 5, .07, 0.1, .2, 0),
    "k": (300, 2000, 0, .1, 2, .07, .15, 0, 0), "s": (300, 1700, 0, .35, 6, .1, 0.02, .5, 0),
    "S": (300, 1800, 0, .35, 3, .1, .05, 0, .6), "f": (300, 1200, 0, .12, 7, .09, -.15, .1, 0),
    "l": (380, 1300, .5, 0, 3, .07, .25, .1, 0), "w": (300, 650, .5, 0, 3, .08, .05, 0, 1.),
    "j": (280, 2200, .5, 0, 3, .07, .1, .8, 0), " ": (480, 1450, 0, 0, 3, .3, 0.00, 0, 0.)}
VOWELS, CONSONANTS = list("aeiou@"), list("mbntksSflwj")
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
    padded = np.pad(track.astype(float), [(3 * width, 3 * width)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, len(kernel), 0) @ (kernel / kernel.sum())


def toy_clip(seed, T):
    """One clip of the toy talker: wav (T * 640,), motion (T, 70), emotion, identity (63,)."""
    rng = np.random.default_rng(seed)
    emotion = int(rng.integers(8))
    mood = MOODS[emotion] * np.append(rng.uniform(0.8, 1.2, 5), np.ones(4))
    target = toy_articulation(rng, mood, 4 * T)                            # articulators move at 100 Hz
    motion, identity = toy_face(rng, mood, target)
    return toy_voice(rng, mood, target), motion[2::4].astype(np.float32), emotion, identity


def toy_articulation(rng, mood, n):
    """Random syllables and pauses: the columns of PHONES and the stress, as targets in steps of 10 ms -> (n, 10)."""
    rows, seconds = [], 0
    while seconds < n / 100 + 1:
        stress = rng.uniform(0.75, 1.25)
        onset, vowel, coda = rng.choice(CONSONANTS), rng.choice(VOWELS), rng.choice(CONSONANTS)
        for phone, odds in ((onset, 0.9), (vowel, 1.0), (coda, 0.25), (" ", 0.17)):
            row = np.append(PHONES[phone], 0.0)
            row[5] *= rng.uniform(0.5, 3) if phone == " " else rng.uniform(0.8, 1.25) / mood[8]
            if phone == vowel:
                row[[2, 6, 9]] = row[2] * stress, row[6] * stress, max(0, stress - 1)
            if rng.random() < odds:
                rows.append(row)
                seconds += row[5]
    ends = np.cumsum([row[5] for row in rows])
    return np.stack(rows)[np.searchsorted(ends, rng.uniform(0, 1) + np.arange(n) / 100)]


def toy_face(rng, mood, target):
    """Motion (n, 70) at 100 Hz and identity (63,): lips follow the voice, the mood holds the rest, the head drifts."""
    n, build = len(target), rng.uniform(-1, 1, 4)                          # the proportions of this face
    identity = FACE * (1 + 0.12 * build[0], 1 + 0.08 * build[1], 1)
    identity[[14, 20], 0] *= 1 + 0.2 * build[2]
    identity[[1, 2], 1] -= 0.015 * build[3]

    def wander(width, size):                                               # smooth noise of unit variance
        white = smooth(rng.standard_normal((n + 6 * width, size)), width)[3 * width:-3 * width]
        return white * (4 * np.pi * width ** 2) ** 0.25
    jaw, spread, rounding = smooth(target[:, 6:9], 4).T * (1 + 0.35 * build[2])      # wide mouths move further
    speaking, blinks = smooth(target[:, 6] != 0, 10), 10 * smooth(rng.random(n) < 0.003, 4)
    smile, brow, frown, lids = (mood[:4] * (1 + 0.12 * wander(80, 4))).T
    motion, drift = np.zeros((n, M)), wander(60, 6)
    motion[:, EXP] = expression(aaa=55 * jaw + mood[4] * speaking, eee=10 * spread, woo=12 * rounding, smile=smile,
                                brow=brow, frown=frown, blink=np.clip(lids - 22 * blinks, -20, 5))
    rest = rng.uniform(1.2, 1.4), rng.normal(0, 0.02), rng.normal(0.1, 0.02)
    motion[:, 63:66] = rest + drift[:, :3] * (0.006, 0.012, 0.006)         # scale, t_x, t_y
    motion[:, ROT] = rng.normal(0, 1, 3) * (2, 4, 1.5) + drift[:, 3:] * (2.5, 5, 2)
    motion[:, ROT.start] += 12 * smooth(target[:, 9], 12)                  # it nods with the stress
    return motion, identity.ravel()


def toy_voice(rng, mood, target):
    """Source and filter: glottal pulses and noise through moving formants, in a room; (n, 10) -> (n * 160,)."""
    n, step = len(target), HOP // 4
    upsample = lambda x: np.interp(np.arange(n * step), np.arange(n) * step + step / 2, x)
    noise = lambda: rng.standard_normal(n * step)
    voiced, hiss = smooth(target[:, 2:4], 2).T
    melody = smooth(rng.standard_normal(n), 12) * 3 + smooth(target[:, 2], 15)
    pitch = rng.uniform(90, 230) * mood[5] * 2 ** (0.25 * mood[6] * melody)
    angle = 2 * np.pi * np.cumsum(upsample(pitch)) / RATE
    r = np.clip(0.86 + 0.04 * mood[7] + rng.normal(0, 0.02), 0.8, 0.94)    # harmonic k has strength r^k: effort
    pulses = (1 - r * np.cos(angle)) / (1 - 2 * r * np.cos(angle) + r * r) - 1
    source, white = upsample(voiced) * (pulses + rng.uniform(0.02, 0.1) * noise()), upsample(hiss) * noise()

    hz, width = np.fft.rfftfreq(HOP, 1 / RATE), np.array([[80], [100], [140], [250]])
    f = np.hstack([smooth(target[:, :2], 3), np.tile((2550, 3600), (n, 1))])[..., None] * rng.uniform(0.85, 1.2)
    gain = (f ** 2 / np.hypot(f ** 2 - hz ** 2, width * hz + 1)).prod(1)
    gain *= (0.02 + hz / 1000) ** rng.uniform(0.2, 1.0)                    # microphones differ
    band = 6 * np.exp(-0.5 * ((hz - 1000 * target[:, 4:5]) / 1200) ** 2)
    stft = dict(n_fft=HOP, hop_length=step, window=torch.hann_window(HOP).double())
    spectrum = lambda x: torch.stft(torch.tensor(x), **stft, return_complex=True)[:, :n]
    shaped = spectrum(source) * torch.tensor(gain.T) + spectrum(white) * torch.tensor(band.T)
    wav = torch.istft(F.pad(shaped, (0, 1)), **stft).numpy()

    echo = np.exp(-np.arange(RATE // 4) / RATE / rng.uniform(0.02, 0.08)) * rng.standard_normal(RATE // 4)
    wet = np.fft.irfft(np.fft.rfft(wav, 2 * len(wav)) * np.fft.rfft(echo, 2 * len(wav)))[:len(wav)]
    beat = smooth(rng.standard_normal((n, 3)), 10).clip(0).T
    music = sum(upsample(b) * np.sin(2 * np.pi * rng.uniform(40, 400) * np.arange(n * step) / RATE) for b in beat)
    wav = wav / wav.std() + rng.uniform(0, 0.7) * wet / wet.std() + rng.choice([0, 0, 1.5]) * rng.random() * music
    wav = mood[7] ** 0.5 * 10 ** rng.uniform(-1.7, -0.9) * (wav + 10 ** rng.uniform(-3, -1) * noise())
    return np.clip(wav, -1, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ datasets

def frame_records(**columns):
    """Columns (T, ...) -> an array (T,) of records, one per frame, as a clip lies in memory and on disk."""
    records = np.empty(len(columns["motion"]), [(name, x.dtype, x.shape[1:]) for name, x in columns.items()])
    for name, x in columns.items():
        records[name] = x
    return records


def moments(clips):
    """Mean and standard deviation of the motion in (T,) records, (2, 70), in one pass."""
    sums = sum(np.stack([m ** 0, m, m * m]).sum(1) for m in (clip["motion"].astype(float) for clip in clips))
    mean, square = sums[1:] / sums[0]
    return np.stack([mean, np.sqrt(np.maximum(square - mean ** 2, 0))])


class Clips(torch.utils.data.Dataset):
    """Windows of 1 + 80 consecutive frames from clips, each an array of records or the path of its .npy file.

    An item: motion (80, 70) and prev (70,) in LivePortrait units, audio (80, L, A), emotion, identity (63,), and
    mask (80,), false where a clip was too short and the window is filled up. For a window with NaN comes the next one
    that shares no frame with it; ValueError where that happens to more than 1 % of them.
    """
    frames = 80                                    # Sec. 4.1.2

    def __init__(self, clips, length, emotion, identity, moments):
        self.clips, self.length, self.emotion = clips, np.array(length), np.array(emotion)
        self.identity, self.moments = np.array(identity, np.float32), np.array(moments)
        self.end = np.cumsum(np.maximum(self.length - self.frames, 1))     # windows up to and with each clip
        self.audio_shape, self.asked, self.spoilt = self.records(0)["audio"].shape[1:], 0, 0

    @classmethod
    def open(cls, folder, split="train"):
        """What `python data.py` prepared, "train" or "val" clips, or "" for both; ValueError if it is damaged."""
        path = Path(folder, "manifest.json")
        try:
            manifest = json.loads(path.read_text())
            rows = [row for row in manifest["clips"] if split in ("", row["split"])]
            columns = ([row[key] for row in rows] for key in ("frames", "emotion", "identity"))
            data = cls([path.parent / row["file"] for row in rows], *columns, manifest["moments"])
            sizes = {data.records(k)["audio"].shape[1:] for k in range(len(rows))}
            if len(sizes) > 1:
                raise ValueError(f"features of different sizes, {sizes}")
            return data
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: no usable {split} clips ({error!r}); prepare them: data.py --videos=DIR") from None

    def records(self, k):
        """Clip k, (T,) records. A file is mapped anew each time: of thousands, few may be open, and only parts read."""
        clip = self.clips[k]
        clip = np.load(clip, mmap_mode="r", allow_pickle=False) if isinstance(clip, Path) else clip
        if clip.shape != (self.length[k],):
            raise ValueError(f"{self.clips[k]}: {clip.shape} records in place of {self.length[k]}; delete the file")
        return clip

    def __len__(self):
        return int(self.end[-1])

    def __getitem__(self, i):
        k = np.searchsorted(self.end, i, side="right")
        first = i - (self.end[k - 1] if k else 0)
        part = self.records(k)[first:first + 1 + self.frames]              # of a file, only these frames are read
        window = np.zeros(1 + self.frames, part.dtype)
        window[:len(part)] = part
        motion, audio = (torch.tensor(window[name]).float() for name in ("motion", "audio"))
        self.asked += 1
        if not (motion.isfinite().all() and audio.isfinite().all()):
            self.spoilt += 1
            if self.spoilt > max(10, self.asked / 100):
                raise ValueError(f"{self.spoilt} of {self.asked} windows hold NaN or infinity; prepare the data again")
            return self[(i + self.frames + 1) % len(self)]
        return dict(motion=motion[1:], prev=motion[0], audio=audio[1:], emotion=self.emotion[k],
                    identity=self.identity[k], mask=np.arange(1, self.frames + 1) < len(part))

    def clip(self, k):
        """All of clip k: motion (T, 70), audio (T, L, A), emotion, identity (63,)."""
        records = self.records(k)
        return np.array(records["motion"]), records["audio"].astype(np.float32), int(self.emotion[k]), self.identity[k]


class ToyTalker(Clips):
    """The embedded data set: `clips` made-up clips of 8 s; clip k of a split never changes."""
    T = 200

    def __init__(self, split="train", clips=300):
        seeds = tqdm([(split != "train", k) for k in range(clips)], f"toy talker, {split}", leave=False)
        wavs, motion, emotion, identity = zip(*(toy_clip(seed, self.T) for seed in seeds))
        self.wavs = wavs if split != "train" else None
        made = [frame_records(motion=m, audio=log_mel(wav, self.T).numpy()) for m, wav in zip(motion, wavs)]
        super().__init__(made, [self.T] * clips, emotion, identity, moments(made))


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


def emotion_of(path, labels, votes):
    """Emotion that the labels tell of a video, or its innermost folder that is named like one, or most of its frames."""
    folders = [LABELS.get(part.lower()) for part in path.parts[-2::-1] if not part.isdigit()]
    found = [labels.get(path.as_posix()), labels.get(path.stem), *folders, int(np.bincount(votes).argmax())]
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
def extract(path, face, encoder, crop, classify):
    """One video -> the records of its frames. ValueError if it cannot be used."""
    wav, parts = load_audio(path), [(torch.empty(0, M), torch.empty(0, 63), torch.empty(0).long())]
    for images in pictures(path, crop):
        heads = motion_heads(face.M, images.to(face.device).movedim(-1, 1) / 255)
        emotion = classify(images[0].numpy()) if classify else NO_EMOTION
        parts.append((to_motion(heads).cpu(), heads["kp"].cpu(), torch.full((len(images),), emotion)))
    motion, x_c, emotion = (torch.cat(column) for column in zip(*parts))
    T = min(len(motion), len(wav) // HOP)
    if T <= Clips.frames:
        raise ValueError(f"{path}: {T} frames of picture and sound, and a window takes {Clips.frames + 1}")
    wav = wav[:T * HOP]                            # whole: what an encoder hears depends on where the sound is cut
    mel, blocks = log_mel(wav, T), encoder.blocks if encoder else log_mel_blocks
    audio = torch.cat([part.half() for part in blocks([wav])])
    columns = dict(motion=motion, audio=audio, x_c=x_c, emotion=emotion, loudness=mel.mean((1, 2)))
    if not all(x.isfinite().all() for x in columns.values()):
        raise ValueError(f"{path}: its motion or features hold NaN or infinity")
    return frame_records(**{name: x[:T].numpy() for name, x in columns.items()})


def write(path, content):
    """A file with these bytes, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def begin(flags):
    """The settings of a data set that is begun, or begun again: they may not change on the way."""
    settings = {key: value for key, value in flags.items() if key not in ("data_dir", "check", "device", "labels")}
    settings |= dict(format=1, torch=torch.__version__, ffmpeg=imageio_ffmpeg.get_ffmpeg_version())
    path = Path(flags["data_dir"], "settings.json")
    old = json.loads(path.read_text()) if path.exists() else settings
    new = [f"{key}={value!r}, not {old.get(key)!r}" for key, value in settings.items() if value != old.get(key)]
    if new:
        raise ValueError(f"{path}: begun with other settings ({'; '.join(new)}); use them, or another --data_dir")
    write(path, json.dumps(settings, indent=1).encode())
    return settings


def prepare(flags):
    """Talking videos -> a data set. A run that was cut off goes on; unusable videos are told at the end."""
    root, folder = Path(flags["videos"]), Path(flags["data_dir"])
    videos = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in VIDEOS and p.is_file())
    if not videos:
        raise ValueError(f"{root}: no videos there; looked for {' '.join(sorted(VIDEOS))}")
    labels = read_labels(flags["labels"]) if flags["labels"] else {}
    classify = hsemotion() if flags["emotion"] else None
    device = flags["device"] or default_device()
    face = LivePortrait(flags["weights"], device)
    encoder = AudioEncoder.from_pretrained(flags["audio_encoder"], device) if flags["audio_encoder"] else None
    settings, rows, left_out = begin(flags), [], []
    for name in tqdm(videos, "preparing", unit="video"):
        file = f"clips/{name.as_posix()}.npy"
        try:
            if not (folder / file).exists():
                buffer = io.BytesIO()              # np.save into a file would not notice a full disk
                np.save(buffer, extract(root / name, face, encoder, flags["crop"], classify))
                write(folder / file, buffer.getvalue())
            clip = np.load(folder / file, mmap_mode="r", allow_pickle=False)
            identity = clip["x_c"].mean(0, dtype=float)                    # a blink or a blur shall not make a face
            rows.append(dict(file=file, frames=len(clip), emotion=emotion_of(name, labels, clip["emotion"]),
                             identity=identity.tolist(), split="train"))
        except ValueError as error:
            left_out.append(error)
        except OSError as error:
            raise OSError(f"{folder / file}: could not be written ({error}); the same command goes on from here") from None
    for error in left_out:
        print(f"left out: {error}", file=sys.stderr)
    if not rows:
        raise ValueError(f"{root}: none of its {len(videos)} videos can be used")
    lots = sorted((zlib.crc32(os.fsencode(row["file"])), k) for k, row in enumerate(rows))       # drawn once and for ever
    for _, k in lots[:min(len(rows) - 1, max(1, len(rows) // 20))]:
        rows[k]["split"] = "val"
    train = moments(np.load(folder / row["file"], mmap_mode="r") for row in rows if row["split"] == "train")
    write(folder / "manifest.json", json.dumps(dict(settings=settings, clips=rows, moments=train.tolist()), indent=1).encode())
    print(f"{folder}: {len(rows)} clips, {sum(row['frames'] for row in rows) / 90_000:.2f} h; {len(left_out)} left out")


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
    hours, counts = data.length.sum() / 90_000, np.bincount(data.emotion, minlength=len(EMOTIONS))
    print(f"{folder}: {len(data.length)} clips, {hours:.2f} h, {len(data)} windows of {data.frames} frames")
    print("emotions:", ", ".join(f"{name} {n}" for name, n in zip(EMOTIONS, counts) if n))
    for name, (channel, *published) in PUBLISHED.items():
        print("{:6}{:9.4f} +- {:7.4f}, published {:9.4f} +- {:7.4f}".format(name, *data.moments[:, channel], *published))
    for k, path in enumerate(data.clips):
        clip = data.records(k)
        lag, fit = voice_lag(clip["motion"][:, MOUTH], clip["loudness"])
        if fit > 0.3 and abs(lag) > 3:
            print(f"look at {path}: the voice follows the lips by {lag:+d} frames (correlation {fit:.2f})")
        for name, (channel, mean, std) in PUBLISHED.items():
            if abs(clip["motion"][:, channel].mean() - mean) > 4 * std:
                print(f"look at {path}: {name} {clip['motion'][:, channel].mean():.4g} on average")


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
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
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
