"""What tests and tools work with: a small network, stand-ins for public weight files, videos of the
toy talker, and a data set of random numbers."""
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import torch

from data import FRAME, RATE, AudioEncoder, toy_clip
from fill import fill
from moda import MOUTH, Config, M, MoDA
from stand_in import brightness

HERE = Path(__file__).parent
SMALL = dict(width=32, heads=2, n_four=1, n_two=1, n_one=2, audio_layers=1, audio_dim=160,
             chunk=20)                             # in shorter ones attention is adapted
SMALL_ENCODER = dict(channels=32, width=48, hidden=96, depth=3, groups=4, heads=4)


class SmallEncoder(AudioEncoder):
    def __init__(self):
        super().__init__(**SMALL_ENCODER)


# ------------------------------------------------------------------------------- networks, weights
def model(**changes):
    """A small MoDA in which every weight counts; fresh ones begin with closed gates."""
    model = MoDA(Config(**SMALL | changes)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def manifest(name):
    """Keys, shapes and types of a public file."""
    return json.loads((HERE / f"{name}_manifest.json").read_text())


def tensors(keys, seed=1):
    """A manifest's tensors with numbers of our own, layer by layer on all cores."""
    layers = {}
    for key, about in keys.items():
        layers.setdefault(key.rpartition(".")[0], {})[key] = about
    filled = {}
    with ThreadPoolExecutor() as pool:
        for part in pool.map(lambda layer: fill(layer, seed), layers.values()):
            filled |= part
    return to_tensors({key: filled[key] for key in keys})


def to_tensors(x):
    """Arrays, in nested dicts, as tensors."""
    if isinstance(x, dict):
        return {key: to_tensors(value) for key, value in x.items()}
    return torch.from_numpy(np.asarray(x))


def liveportrait(folder, seed=1):
    """The five LivePortrait files in the public layout below `folder`."""
    for file, keys in manifest("liveportrait")["files"].items():
        path = Path(folder) / "liveportrait" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors(keys, seed), path)
    return folder


def encoder(folder, size="base", seed=1):
    """The folder of a wav2vec 2.0 of the base size, or of a small one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors(manifest("wav2vec2")[size], seed), folder / "pytorch_model.bin")
    return folder


# ---------------------------------------------------------------------------- videos and data sets
def ffmpeg(*args, **options):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, args)]
    subprocess.run(command, check=True, **options)


def video(path, seed=0, frames=100, rate=25, late=0, sound=()):
    """A toy clip, 64 x 48, as bright as its mouth is open; its voice comes `late` frames late."""
    path = Path(path)
    wav, motion, *_ = toy_clip(seed, frames)
    wav = np.pad(wav, (late * FRAME, 0))[:len(wav)]
    voice = path.with_suffix(".wav")
    soundfile.write(voice, wav, RATE)
    grey = (255 * brightness(motion[:, MOUTH])).clip(0, 255).round().astype(np.uint8)
    pictures = np.broadcast_to(grey[:, None, None, None], (frames, 48, 64, 3))
    raw = "-f rawvideo -pix_fmt rgb24 -s 64x48 -r 25 -i -".split()
    coding = f"-map 0:v -map 1:a -vf fps={rate} -pix_fmt yuv420p".split()
    ffmpeg(*raw, "-i", voice, *coding, *sound, path, input=pictures.tobytes())
    voice.unlink()


def data_set(folder, lengths=(200, 90), audio_shape=(1, 160), splits=("train", "train")):
    """A data set of random motion in silence, with a clip of each length."""
    folder, rows = Path(folder), []
    for k, n in enumerate(lengths):
        clip = dict(motion=np.random.default_rng(k).standard_normal((n, M)).astype(np.float32),
                    audio=np.zeros((n, *audio_shape), np.float16),
                    identity=np.zeros(63, np.float32),
                    loudness=np.zeros(n, np.float32))
        (folder / f"clips/{k}").mkdir(parents=True)
        for name, array in clip.items():
            np.save(folder / f"clips/{k}/{name}.npy", array)
        rows.append(dict(clip=str(k), frames=n, emotion=8, split=splits[k % 2]))
    # a std of 1 means in a checkpoint that it has no statistics
    write_manifest(folder, clips=rows, audio_shape=audio_shape, moments=[[0] * M, [2] * M],
                   x_c_moments=[[0] * 63, [1] * 63])
    return folder


def write_manifest(folder, **content):
    (Path(folder) / "manifest.json").write_text(json.dumps(content))
