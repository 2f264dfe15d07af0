"""Sound and motion in: load_audio, log-mel features, data sets of windows and their preparation,
the audio encoder, the toy talker; and what the scripts' command lines have in common.

    python data.py --videos=DIR --data_dir=data/mine --weights=pretrained_weights
    python data.py --data_dir=data/mine --check

The first makes a training set of talking videos; the second prints its hours, emotions and motion,
and clips whose sound is shifted.
Letters: N samples at 16 kHz, T frames at 25 fps (640 samples each), L x A audio layers x channels.
"""
import csv
import inspect
import json
import math
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from imageio_ffmpeg import get_ffmpeg_exe, get_ffmpeg_version
from numpy.lib.format import open_memmap
from tqdm import tqdm

from moda import EMOTIONS, MOUTH, NO_EMOTION, M, load_strictly, read_checkpoint, save
from renderer import FACE, LivePortrait, to_motion

RATE = 16000                     # samples per second
HOP = 640                        # samples per video frame
STEP = 160                       # samples per spectrum, 10 ms
BLOCK = 5                        # frames of sound that are read and analysed at once


# ------------------------------------------------------------------------------------------- sound
@contextmanager
def ffmpeg(complaint, error, *args, **pipes):
    """A running ffmpeg; if it fails, `error` is raised: the complaint and what ffmpeg said."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:        # a full pipe would stop it
        command = [get_ffmpeg_exe(), "-v", "error", *args]
        with suppress(BrokenPipeError), Popen(command, stderr=log, **pipes) as child:
            try:
                yield child
            except BrokenPipeError:                # it stopped reading, and said why
                pass
            except BaseException:
                child.kill()                       # or it waits for input forever
                raise
        log.seek(0)
        said = [line.split("] ")[-1].strip() for line in log]
    if child.returncode:
        raise error(f"{complaint} ({'; '.join(said[:1] + said[1:][-1:])})")


def decoded(path, what, options, size):
    """What ffmpeg makes of a file, in pieces of `size` bytes but the last; ValueError if nothing."""
    source = ["-nostdin", "-i", f"file:{path}"]
    if path == "-":
        source = f"-f s16le -ar {RATE} -ac 1 -i -".split()
    command = ["-abort_on", "empty_output", *source, *options.split(), "-"]
    with ffmpeg(f"{path}: no {what} could be read", ValueError, *command, stdout=PIPE) as decoder:
        while piece := decoder.stdout.read(size):
            yield piece


def audio_blocks(path):
    """Any sound ffmpeg reads, or a video's, in blocks of float32 (BLOCK * HOP,) at 16 kHz mono."""
    # async, first_pts: what starts late or has gaps is filled with silence, to stay in step
    options = f"-map 0:a:0 -af aresample=async=1:first_pts=0 -ac 1 -ar {RATE} -f f32le"
    for piece in decoded(path, "sound", options, 4 * BLOCK * HOP):
        block = np.frombuffer(piece, np.float32)
        if not np.isfinite(block).all():
            raise ValueError(f"{path}: the sound holds NaN or infinite samples")
        yield block


def load_audio(path):
    """Any sound, or a video's -> float32 (N,), 16 kHz mono, about -1..1; ValueError if none."""
    return np.concatenate(list(audio_blocks(path)))


def regroup(pieces, size):
    """Cut a stream of arrays (n,) into arrays of `size` samples; the last may be shorter."""
    waiting = np.empty(0, np.float32)
    for piece in pieces:
        waiting = np.concatenate([waiting, piece])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


def mel_filters():
    """40 triangles equally spaced on the mel scale, log(700 + Hz), 60 to 7600 Hz: (257, 40)."""
    mel = np.log(700 + np.fft.rfftfreq(512, 1 / RATE))
    place = np.interp(mel, np.log([760, 8300]), [0, 41])
    return np.clip(1 - np.abs(place[:, None] - np.arange(1, 41)), 0, None)


MEL = mel_filters()


def log_mel_blocks(pieces):
    """Sound in pieces of any length -> log-mel features of BLOCK frames, (n, 1, 160), at once.

    Four 40-band spectra of 25 ms per frame; 0 is silence. A spectrum looks back, never ahead, and
    blocks have one size: the features of a sound are the same to the bit however it was cut."""
    taper = np.hanning(400)
    wav = np.zeros(400)
    for block in regroup(pieces, BLOCK * HOP):
        silence = np.zeros(BLOCK * HOP - len(block))
        wav = np.concatenate([wav[STEP - 400:], block, silence])
        spans = np.lib.stride_tricks.sliding_window_view(wav, 400)[::STEP]
        power = np.abs(np.fft.rfft(spans * taper, 512) / taper.sum()) ** 2
        features = torch.tensor(np.log1p(1e5 * power @ MEL) / 4).float()
        frames = math.ceil(len(block) / HOP)
        yield features.view(BLOCK, 1, -1)[:frames]


def log_mel(wav, n_frames):
    """wav (N,) -> (n_frames, 1, 160); see log_mel_blocks."""
    wav = np.pad(wav, (0, max(0, n_frames * HOP - len(wav))))
    return torch.cat([*log_mel_blocks([wav])])[:n_frames]


def feature_blocks(encoder, device):
    """What turns sound in pieces into features: an encoder, of its file; log-mel without one."""
    if encoder:
        return AudioEncoder.from_pretrained(encoder, device).blocks
    return log_mel_blocks


# --------------------------------------------------------------------------- windows and data sets
# A data set is a folder: clips/VIDEO/motion.npy (T, 70), audio.npy (T, L, A) in float16,
# identity.npy (63,), loudness.npy (T,); and manifest.json, which alone knows lengths and labels.

def opened(folder, *names):
    """Arrays of a clip; what is looked at is read. ValueError if one is damaged."""
    try:
        return [open_memmap(folder / f"{name}.npy", mode="r") for name in names]
    except Exception as error:
        raise ValueError(f"{folder}: cannot be used ({error}); delete it and prepare the data "
                         "again") from None


class Clips(torch.utils.data.Dataset):
    """Windows of 1 + 80 consecutive frames (Sec. 4.1.2) of the clips that data.py prepared.

    An item: motion (80, 70) and prev (70,), the frame before, in LivePortrait units; audio
    (80, L, A); emotion; identity (63,). ValueError names a clip that cannot be read."""

    frames = 80

    def __init__(self, folder, split="train"):
        """The "train" or "val" clips of a data set, or "" for both; ValueError if it is damaged."""
        path = Path(folder, "manifest.json")
        try:
            manifest = json.loads(path.read_text())
            rows = [row for row in manifest["clips"] if split in ("", row["split"])]
            self.names = [path.parent / "clips" / row["clip"] for row in rows]
            self.index(rows, manifest["audio_shape"], manifest["moments"])
        except Exception as error:
            raise ValueError(f"{path}: no {split} clips there ({error}); "
                             "prepare a data set: data.py --videos=DIR") from None

    def index(self, rows, audio_shape, moments):
        """What every kind of data set knows of its clips, without opening them."""
        self.lengths = np.array([row["frames"] for row in rows])
        self.emotion = [row["emotion"] for row in rows]
        self.audio_shape = L, A = tuple(audio_shape)
        self.numbers = (1 + self.frames) * (M + L * A) + 63            # of a window
        self.moments = torch.tensor(moments).view(2, M)                # mean and std of the motion
        windows = np.maximum(self.lengths - self.frames, 0)
        self.first = np.cumsum([0, *windows])                          # window of each clip
        if not len(self):
            raise ValueError("none is listed that is as long as a window")

    def arrays(self, k):
        return opened(self.names[k], "motion", "audio", "identity")

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        k = np.searchsorted(self.first, i, side="right") - 1
        start = i - self.first[k]
        window = slice(start, start + 1 + self.frames)
        motion, audio, identity = self.arrays(k)
        parts = motion[window], audio[window], identity
        motion, audio, identity = [torch.tensor(x).float() for x in parts]
        numbers = torch.cat([motion.flatten(), audio.flatten(), identity])
        if len(numbers) != self.numbers or not numbers.isfinite().all():
            raise ValueError(f"{self.names[k]}: frames from {start} cannot be used (of another "
                             "size, or not finite); delete it and prepare the data again")
        return dict(motion=motion[1:], prev=motion[0], audio=audio[1:], identity=identity,
                    emotion=self.emotion[k])


def moments_of(motions):
    """Mean and standard deviation of many (T, 70), in one pass: (2, 70)."""
    sums = 0
    for motion in motions:
        motion = np.asarray(motion, float)
        sums = sums + np.stack([np.ones_like(motion), motion, motion ** 2]).sum(1)
    mean, square = sums[1:] / sums[0]
    return np.stack([mean, np.sqrt(np.maximum(square - mean ** 2, 0))])


# ------------------------------------------------------------------------------------- preparation
VIDEOS = set(".mp4 .m4v .mov .mkv .webm .avi .flv .wmv .mpg .mpeg .ts".split())
# our names, which are HSEmotion's in lower case, and MEAD's folders where they differ
FOLDERS = {name: k for k, name in enumerate(EMOTIONS)}
FOLDERS |= dict(angry=0, disgusted=2, happy=4, sad=6, surprised=7)
LABELS = FOLDERS | {str(k): k for k in range(len(EMOTIONS))}
# channel, mean and standard deviation, as published with the released model
PUBLISHED = {
    "scale": (63, 1.2865, 0.0691),
    "pitch": (67, -2.3407, 8.8819),
    "yaw": (68, -0.2464, 23.8553),
    "roll": (69, -0.3269, 5.6063),
    "mouth": (MOUTH, -0.0056, 0.0214)}


def pictures(path, crop, batch=16):
    """The square around the face at 25 fps, from time 0: uint8 tensors (batch, 256, 256, 3)."""
    x, y, size = "(iw-min(iw,ih))/2", "(ih-min(iw,ih))/2", "min(iw,ih)"
    if crop:
        x, y, size = crop.split(",")
    inside = f"lte({x}+{size},iw)*lte({y}+{size},ih)"                  # else ffmpeg moves the square
    square = f"crop='if({inside},{size},0)':'{size}':'{x}':'{y}':exact=1"
    filters = f"fps=25:start_time=0,{square},scale=256:256:flags=area"
    options = f"-map 0:V:0 -vf {filters} -pix_fmt rgb24 -f rawvideo -xerror"
    for piece in decoded(path, f"picture with crop {crop}", options, batch * 256 * 256 * 3):
        pixels = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        yield pixels.view(-1, 256, 256, 3)


def read_labels(path):
    """csv file -> {clip: number}; a clip is a path below --videos, a name or a folder."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        return {row["clip"]: LABELS[row["emotion"].strip().lower()] for row in rows}
    except Exception as error:
        raise ValueError(f"{path}: cannot be used ({error}); expected lines clip,emotion with names "
                         f"{' '.join(LABELS)}") from None


def hsemotion():
    """The classifier that the paper labels with: uint8 (256, 256, 3) -> emotion 0 to 7."""
    from hsemotion_onnx.facial_emotions import HSEmotionRecognizer     # an optional extra
    net = HSEmotionRecognizer("enet_b0_8_best_vgaf")                   # emotions in our order

    def classify(image):
        name, scores = net.predict_emotions(image, logits=False)
        return int(np.argmax(scores))
    return classify


@torch.inference_mode()
def extract(path, face, features, crop, classify):
    """One video -> the arrays of its clip; ValueError if it cannot be used."""
    wav = load_audio(path)
    motion, x_c, votes = [], [], []
    for images in pictures(path, crop):
        heads = face.M(images.to(face.device).movedim(-1, 1) / 255)
        motion.append(to_motion(heads).cpu())
        x_c.append(heads["kp"].cpu())
        votes.append(classify(images[0].numpy()))
    motion = torch.cat(motion)
    T = min(len(motion), len(wav) // HOP)
    if T <= Clips.frames:
        raise ValueError(f"{path}: {T} frames of picture and sound; a window is {Clips.frames + 1}")
    # the sound whole, for features depend on where it is cut; the face of all frames, not of a blur
    audio = torch.cat([*features([wav[:T * HOP]])]).half()
    clip = dict(motion=motion[:T], audio=audio, identity=torch.cat(x_c)[:T].mean(0),
                loudness=log_mel(wav, T).mean((1, 2)), emotion=torch.tensor(votes).mode().values)
    for name, array in clip.items():
        if not array.isfinite().all():
            raise ValueError(f"{path}: its {name} holds NaN or infinity")
    return clip


def write_npy(array, path):
    with open(path, "wb") as file:                 # by its name, np.save might add a suffix
        np.save(file, array)
    open_memmap(path, mode="r")                    # for np.save overlooks a full disk


def write_manifest(manifest, path):
    path.write_text(json.dumps(manifest, indent=1))


def prepare(settings):
    """Talking videos -> a data set. A run that was cut off goes on; bad videos are listed."""
    root, folder = Path(settings.videos), Path(settings.data_dir)
    videos = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in VIDEOS)
    if not videos:
        raise ValueError(f"{root}: no videos there; looked for {' '.join(sorted(VIDEOS))}")
    labels = FOLDERS | (read_labels(settings.labels) if settings.labels else {})
    classify = hsemotion() if settings.emotion else lambda image: NO_EMOTION
    face = LivePortrait(settings.weights, settings.device)
    features = feature_blocks(settings.audio_encoder, settings.device)
    begun = dict(torch=str(torch.__version__), ffmpeg=get_ffmpeg_version())
    for name in ("videos", "weights", "audio_encoder", "crop", "emotion"):
        begun[name] = getattr(settings, name)
    path = folder / "manifest.json"
    check_begun(path, begun)
    if not path.exists():
        save(path, dict(settings=begun), write=write_manifest)

    rows, left_out, motions = [], [], []
    for name in tqdm(videos, "preparing", unit="video"):
        clip = folder / "clips" / name
        try:
            if not clip.exists():
                arrays = extract(root / name, face, features, settings.crop, classify)
                write_clip(arrays, clip)
            motion, audio, vote = opened(clip, "motion", "audio", "emotion")
        except ValueError as error:
            left_out.append(error)
            continue
        emotion = label_of(name, labels, int(vote))
        split = "val" if len(rows) % 20 == 1 else "train"
        rows.append(dict(clip=name.as_posix(), frames=len(motion), emotion=emotion, split=split))
        if split == "train":
            motions.append(motion)
    print(f"{folder}: {len(rows)} clips; {len(left_out)} videos left out", *left_out, sep="\n")
    if not rows:
        raise ValueError(f"{root}: none of its {len(videos)} videos can be used")
    moments = moments_of(motions).tolist()
    manifest = dict(settings=begun, audio_shape=audio.shape[1:], moments=moments, clips=rows)
    save(path, manifest, write=write_manifest)


def check_begun(path, settings):
    """ValueError if a preparation was begun there with other settings."""
    try:
        before = json.loads(path.read_text())["settings"] if path.exists() else settings
    except Exception as error:
        before = error
    if before != settings:
        raise ValueError(f"{path}: begun with other settings ({before}); use another --data_dir")


def write_clip(clip, folder):
    """A folder of .npy files that appears when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    for name, array in clip.items():
        save(part / f"{name}.npy", array.numpy(), write=write_npy)
    part.rename(folder)


def label_of(name, labels, vote):
    """The emotion of a video: of its path, name or nearest folder, or what was voted for."""
    folders = [part.lower() for part in reversed(name.parts[:-1])]
    for key in (name.as_posix(), name.stem, *folders):
        if key in labels:
            return labels[key]
    return vote


def voice_lag(mouth, loud, reach=15):
    """By how many frames the voice follows the mouth where both agree best, and their correlation."""
    mouth, loud = np.diff(mouth), np.diff(loud)    # what drifts agrees with anything
    mouth = mouth / (mouth.std() + 1e-9)
    loud = loud / (loud.std() + 1e-9)
    fit = np.correlate(loud, mouth[reach:-reach]) / (len(mouth) - 2 * reach)
    return int(np.argmax(fit)) - reach, fit.max()


def check(folder):
    """Print what a data set holds beside what the released model was trained on, and odd clips."""
    data = Clips(folder, split="")
    hours = data.lengths.sum() / (25 * 3600)
    print(f"{folder}: {len(data.lengths)} clips, {hours:.2f} h, {len(data)} windows")
    counts = [f"{name} {data.emotion.count(k)}" for k, name in enumerate(EMOTIONS)]
    print("emotions:", ", ".join(counts))
    for name, (channel, mean, std) in PUBLISHED.items():
        ours = data.moments[:, channel]
        print(f"{name:6}{ours[0]:9.4f} +- {ours[1]:7.4f}, published{mean:9.4f} +- {std:7.4f}")
    for path in data.names:
        motion, loudness, *_ = opened(path, "motion", "loudness", "audio", "identity")
        lag, fit = voice_lag(motion[:, MOUTH], loudness)
        odd = [name for name, (channel, mean, std) in PUBLISHED.items()
               if abs(motion[:, channel].mean() - mean) > 4 * std]
        if fit > 0.3 and abs(lag) > 3:
            odd.append("voice")
        looks = "".join(f" LOOK: {name}" for name in odd)
        print(f"{path}: voice {lag:+d} frames after the lips (correlation {fit:.2f}){looks}")


# ------------------------------------------------------------------------------- the audio encoder
ENCODERS = "get facebook/wav2vec2-base-960h or TencentGameMate/chinese-hubert-base"
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64)


def read_safetensors(path):
    """Tensors of a .safetensors file: 8 bytes of length, a JSON header, plain numbers."""
    data = np.memmap(path, mode="c")
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        flat = torch.frombuffer(data[start + begin:start + end], dtype=DTYPES[about["dtype"]])
        tensors[name] = flat.view(about["shape"])
    return tensors


class AudioEncoder(nn.Module):
    """A public base-size wav2vec 2.0 or HuBERT, at 25 frames per second as the released MoDA has it.

    GroupNorm and attention see the whole sound: features depend on where it is cut, so encode
    first, cut then."""

    def __init__(self, channels=512, width=768, hidden=3072, depth=12, groups=16, heads=12):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(1, channels, 10, stride=5, bias=False)])
        for kernel in (3, 3, 3, 3, 2, 2):
            self.convs.append(nn.Conv1d(channels, channels, kernel, stride=2, bias=False))
        self.group_norm = nn.GroupNorm(channels, channels)
        self.projection = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.position = nn.Conv1d(width, width, 128, padding=64, groups=groups)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            post_norm = nn.TransformerEncoderLayer(
                width, heads, hidden, dropout=0, activation="gelu", batch_first=True)
            self.layers.append(post_norm)
        self.eval()

    def encode(self, wav):
        """Sound (640 T,) -> the outputs of all L layers, (T, L, A)."""
        x = wav[None, None]
        for _ in range(2):                         # as released, which is other than 40 at once
            x = F.pad(x, (20, 20), mode="reflect")
        for conv in self.convs:
            x = conv(x)
            if conv is self.convs[0]:
                x = self.group_norm(x)
            x = F.gelu(x)                                              # (1, channels, 2 T) at last
        x = F.interpolate(x, x.size(-1) // 2, mode="linear", align_corners=True)       # to 25 Hz
        x = self.projection(x.mT)                                      # (1, T, A)
        near = F.gelu(self.position(x.mT)[..., :-1])
        x = self.norm(x + near.mT)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x[0])
        return torch.stack(outputs, 1)

    @torch.inference_mode()
    def blocks(self, pieces):
        """Sound in pieces of any length -> features (n, L, A) of started frames, minute by minute."""
        for wav in regroup(pieces, 60 * RATE):
            x = torch.from_numpy(np.pad(wav, (0, max(0, HOP - len(wav)))))
            if self.normalise:
                x = F.layer_norm(x, x.shape, eps=1e-7)
            whole = len(x) // HOP
            features = self.encode(x[:whole * HOP].to(self.norm.weight.device)).cpu()
            frames = torch.arange(math.ceil(len(wav) / HOP))
            yield features[frames.clamp(max=whole - 1)]                # the last may stand for two

    def forward(self, wav, n_frames=None):
        """wav (N,) at 16 kHz -> (T, L, A); T is n_frames, repeating the last, or N // 640 or 1."""
        features = torch.cat(list(self.blocks([np.asarray(wav)])))
        frames = torch.arange(n_frames or max(1, len(wav) // HOP))
        return features[frames.clamp(max=len(features) - 1)]

    @classmethod
    def from_pretrained(cls, path, device="cpu", **sizes):
        """A public base-size file or its folder; ValueError if it is another network or broken."""
        path = Path(path)
        if path.is_dir():
            safe = path / "model.safetensors"
            path = safe if safe.exists() else path / "pytorch_model.bin"
        about = dict(num_attention_heads=12, do_normalize=True)        # unless the files beside it
        for name in ("config.json", "preprocessor_config.json"):       # say otherwise
            file = path.with_name(name)
            try:
                about |= json.loads(file.read_text()) if file.exists() else {}
            except Exception as error:
                raise ValueError(f"{file}: not readable as JSON ({error})") from None
        try:
            read = read_safetensors if path.suffix == ".safetensors" else read_checkpoint
            with torch.device("meta"):
                model = cls(heads=about["num_attention_heads"], **sizes)
            model.to_empty(device="cpu")
            load_strictly(model.state_dict(), encoder_tensors(read(path)))
        except Exception as error:
            raise ValueError(f"{path}: not a base-size wav2vec 2.0 or HuBERT, or incomplete "
                             f"({error!s:.200}); {ENCODERS}") from None
        model.normalise = about["do_normalize"]
        return model.to(device)


# parts of public names and ours, which are those of nn.TransformerEncoderLayer
RENAMED = [row.split() for row in """
    feature_extractor.conv_layers.0.layer_norm  group_norm
    feature_extractor.conv_layers               convs
    feature_projection.layer_norm               projection.0
    feature_projection.projection               projection.1
    encoder.pos_conv_embed.conv                 position
    encoder.layers                              layers
    encoder.layer_norm                          norm
    attention.out_proj                          self_attn.out_proj
    feed_forward.intermediate_dense             linear1
    feed_forward.output_dense                   linear2
    final_layer_norm                            norm2
    .layer_norm                                 .norm1
    .conv.                                      .
    """.strip().splitlines()]


def encoder_tensors(file):
    """A public file's tensors by our names."""
    tensors = {}
    for key, value in file.items():
        public = re.search(r"\b(feature_extractor|feature_projection|encoder)\..*", key)
        if public:                                 # the rest served its training
            key = public[0]
            for theirs, ours in RENAMED:
                key = key.replace(theirs, ours)
            tensors[key] = value.float()
    # weight norm: weight_g and weight_v, or original0 and original1 since torch 2.1
    g, v = [tensors.pop(key) for key in sorted(tensors) if re.match("position.*weight", key)]
    tensors["position.weight"] = g * v / v.norm(dim=(0, 1), keepdim=True)
    for key in [key for key in tensors if "q_proj" in key]:
        qkv = [tensors.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        tensors[key.replace("attention.q_proj.", "self_attn.in_proj_")] = torch.cat(qkv)
    return tensors


# ---------------------------------------------------------------------------------- the toy talker
# A made-up talker in LivePortrait's own 70 numbers: formant-synthesised syllables, and the motion of
# mouth, head, brows and lids that belongs to them. Emotion and identity act on voice and face.

def table(text):
    """Columns of numbers under their names -> structured array."""
    return np.genfromtxt(text.splitlines(), names=True, dtype=None, encoding="utf-8")


# by how many thousandths a point moves along an axis per unit of a control, as LivePortrait has it
MOVES = table("""
    place  aaa  eee  woo  brow  smile  frown  blink
    19y    1    0    0    0     0      0      0
    19z    .1   0    0    0     0      0      0
    20y    0    -1   0    0     -10    0      0
    20z    0    -1   0    0     0      0      0
    14y    0    -1   1    0     -20    0      0
    17y    -.1  0    0    0     6.5    0      0
    17z    0    0    -.5  0     3      0      0
    3y     0    0    -.5  0     -3.5   0      0
    7y     0    0    -.5  0     -3.5   0      0
    1x     0    0    0    0     0      -1     0
    2x     0    0    0    0     0      1      0
    1y     0    0    0    1     0      .3     0
    2y     0    0    0    -1    0      -.3    0
    11y    0    0    0    0     0      0      -1
    15y    0    0    0    0     0      0      -1
    13y    0    0    0    0     -2.75  0      .3
    16y    0    0    0    0     -2.75  0      .3""")
CONTROLS = {name: np.zeros((21, 3)) for name in MOVES.dtype.names[1:]}
for move in MOVES:
    point, axis = int(move["place"][:-1]), "xyz".index(move["place"][-1])
    for name, delta in CONTROLS.items():
        delta[point, axis] = move[name] / 1000


def expression(**controls):
    """Sum of the controls; each a number or (T,) -> (63,) or (T, 63)."""
    return sum(np.multiply.outer(x, CONTROLS[name].ravel()) for name, x in controls.items())


# two formants in kHz; how much voice and hiss; the hiss's centre in kHz; jaw, spread, round (-1..1)
PHONES = table("""
    phone  f1    f2    voice  hiss  centre  seconds  jaw   spread  round
    a      .75   1.25  1      0     3       .17      1     .1      0
    e      .52   1.85  1      0     3       .15      .5    .6      0
    i      .3    2.25  .9     0     3       .14      .2    1       0
    o      .48   .9    1      0     3       .16      .55   0       .8
    u      .32   .8    .9     0     3       .15      .15   0       1
    @      .52   1.45  .8     0     3       .1       .4    .1      .1
    m      .26   1     .3     0     3       .09      -.3   0       .1
    b      .22   .9    .06    .01   2       .08      -.35  0       0
    n      .28   1.6   .3     0     3       .07      .1    .2      0
    t      .3    1.8   0      .15   5       .07      .1    .2      0
    s      .3    1.7   0      .35   6       .1       .02   .5      0
    S      .3    1.8   0      .35   3       .1       .05   0       .6
    f      .3    1.2   0      .12   7       .09      -.15  .1      0
    l      .38   1.3   .5     0     3       .07      .25   .1      0
    w      .3    .65   .5     0     3       .08      .05   0       1
    pause  .48   1.45  0      0     3       .5       0     0       0""")
VOWELS, CONSONANTS, PAUSE = PHONES[:6], PHONES[6:15], PHONES[15:]
# group, how often a syllable has it, and factors on its length
SYLLABLE = [
    (CONSONANTS, 0.9, 0.8, 1.25),
    (VOWELS, 1.0, 0.8, 1.25),
    (CONSONANTS, 0.25, 0.8, 1.25),
    (PAUSE, 0.17, 0.3, 1.8)]
# of each emotion: controls that it holds, jaw only while speaking; and factors on the voice
MANNERS = table("""
    emotion    smile  brow  frown  blink  jaw  pitch  range  loudness  rate
    anger      -.2    0     -9     -6     4    1.15   1.3    1.6       1.15
    contempt   .25    2     0      -10    -4   .9     .7     .8        .9
    disgust    -.3    0     -5     -12    -2   .85    .9     .9        .85
    fear       -.25   10    -4     4      2    1.3    1      .8        1.2
    happiness  1      4     0      -2     3    1.2    1.5    1.2       1.1
    neutral    0      0     0      0      0    1      1      1         1
    sadness    -.3    5     -2     -9     -3   .9     .6     .6        .8
    surprise   .1     14    0      5      10   1.3    1.6    1.1       1""")


def smooth(track, width):
    """Gaussian average along the first axis; width (standard deviation) in samples."""
    offsets = np.arange(-3 * width, 3 * width + 1)
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    mirrored = track[np.pad(np.arange(len(track)), 3 * width, mode="reflect")]
    spans = np.lib.stride_tricks.sliding_window_view(mirrored, len(kernel), 0)
    return spans @ (kernel / kernel.sum())


def wander(rng, width, *shape):
    """Smooth noise of unit variance; width in samples."""
    return smooth(rng.standard_normal(shape), width) * (4 * np.pi * width ** 2) ** 0.25


def toy_clip(seed, T):
    """One clip of the toy talker: wav (T * 640,), motion (T, 70), emotion, identity (63,)."""
    rng = np.random.default_rng(seed)
    emotion = int(rng.integers(8))
    manner = MANNERS[emotion]
    phones, stress = articulation(rng, 4 * T, manner["rate"])          # at 100 Hz
    build = rng.uniform(-1, 1, 3)                                      # this face's proportions
    identity = toy_identity(build)
    delta = toy_expression(rng, manner, phones, 1 + 0.35 * build[2])   # wide mouths move further
    motion = np.hstack([delta, toy_head(rng, stress)])
    wav = toy_voice(rng, manner, phones)
    return wav, motion[2::4].astype(np.float32), emotion, identity


def articulation(rng, n, rate):
    """Random syllables and pauses: phones (n,) and stress (n,), every 10 ms."""
    phones, stress, ends = [], [], []
    end = rng.uniform(-1, 0)                       # speech has begun before
    while end < n / 100:
        strength = rng.uniform(0.75, 1.25)
        for group, chance, shortest, longest in SYLLABLE:
            if rng.random() > chance:
                continue
            phone = rng.choice(group)
            end += phone["seconds"] * rng.uniform(shortest, longest) / rate
            stressed = group is VOWELS             # then it is louder and wider
            if stressed:
                phone["voice"] *= strength
                phone["jaw"] *= strength
            phones.append(phone)
            stress.append(stressed * max(0, strength - 1))
            ends.append(end)
    now = np.searchsorted(ends, np.arange(n) / 100)
    return np.array(phones)[now], np.array(stress)[now]


def toy_identity(build):
    """A face of its own height, width and mouth width: (63,)."""
    points = FACE * (1 + 0.12 * build[0], 1 + 0.08 * build[1], 1)
    points[[14, 20], 0] *= 1 + 0.2 * build[2]
    return points.ravel().astype(np.float32)


def toy_expression(rng, manner, phones, reach):
    """Lips follow the voice, the emotion holds the rest: (n, 63)."""
    n = len(phones)
    jaw, spread, rounding = [reach * smooth(phones[x], 4) for x in ("jaw", "spread", "round")]
    speaking = smooth(phones["jaw"] != 0, 10)
    blinks = 10 * smooth(rng.random(n) < 0.003, 4)
    held = {}
    for name in ("smile", "brow", "frown", "blink"):                   # strong or weak, never still
        held[name] = manner[name] * rng.uniform(0.8, 1.2) * (1 + 0.12 * wander(rng, 80, n))
    held["blink"] = np.clip(held["blink"] - 22 * blinks, -20, 5)
    open_jaw = 55 * jaw + manner["jaw"] * rng.uniform(0.8, 1.2) * speaking
    return expression(aaa=open_jaw, eee=10 * spread, woo=12 * rounding, **held)


def toy_head(rng, stress):
    """Scale, translation, rotation (n, 7): a head at rest that drifts, and nods with the stress."""
    # scale, t_x, t_y, pitch, yaw, roll
    rest = rng.normal((1.3, 0, 0.1, 0, 0, 0), (0.05, 0.02, 0.02, 2, 4, 1.5))
    drift = wander(rng, 60, len(stress), 6) * (0.006, 0.012, 0.006, 2.5, 5, 2)
    head = rest + drift
    head[:, 3] += 12 * smooth(stress, 12)
    return np.insert(head, 3, 0, 1)                # t_z = 0


def toy_voice(rng, manner, phones):
    """Source and filter, in a room: (n * 160,)."""
    voiced, hiss = toy_sources(rng, manner, phones)
    tract, hiss_filter = toy_filters(rng, phones)
    stft = dict(n_fft=HOP, hop_length=STEP, window=torch.hann_window(HOP).double())
    spectrum = 0
    for source, response in ((voiced, tract), (hiss, hiss_filter)):
        frames = torch.stft(torch.tensor(source), **stft, return_complex=True)
        spectrum = spectrum + frames[:, :-1] * torch.tensor(response.T)
    wav = toy_room(rng, torch.istft(F.pad(spectrum, (0, 1)), **stft).numpy())
    loudness = manner["loudness"] ** 0.5 * 10 ** rng.uniform(-1.7, -0.9)
    return np.clip(loudness * wav, -1, 1).astype(np.float32)


def upsample(x):
    """From 100 Hz to the sound's rate."""
    clock = np.arange(len(x) * STEP)
    return np.interp(clock, clock[STEP // 2::STEP], x)


def toy_sources(rng, manner, phones):
    """Glottal pulses with some breath, and hiss, where phones have them: (n * 160,) each."""
    melody = 0.5 * wander(rng, 12, len(phones)) + smooth(phones["voice"], 15)
    pitch = rng.uniform(90, 230) * manner["pitch"] * 2 ** (0.25 * manner["range"] * melody)
    phase = 2 * np.pi * np.cumsum(upsample(pitch)) / RATE
    effort = np.clip(0.86 + 0.04 * manner["loudness"] + rng.normal(0, 0.02), 0.8, 0.94)
    z = effort * np.exp(1j * phase)
    pulses = (z / (1 - z)).real                    # z + z^2 + z^3 + ..: harmonics that fall off
    breath, hiss = rng.standard_normal((2, len(z)))
    voiced = pulses + rng.uniform(0.02, 0.1) * breath
    return [upsample(smooth(phones[name], 2)) * sound
            for name, sound in (("voice", voiced), ("hiss", hiss))]


def toy_filters(rng, phones):
    """Frequency responses (n, 321): of the moving vocal tract, and of the hiss."""
    khz = np.fft.rfftfreq(HOP, 1000 / RATE)
    tract = (0.02 + khz) ** rng.uniform(0.2, 1.0)  # lips radiate what is high
    shorter = rng.uniform(0.85, 1.2)               # and short tracts have higher formants
    formants = smooth(phones["f1"], 3), smooth(phones["f2"], 3), np.array([2.55]), np.array([3.6])
    for f, width in zip(formants, (0.08, 0.1, 0.14, 0.25)):
        f = shorter * f[:, None]
        tract = tract * f ** 2 / np.hypot(f ** 2 - khz ** 2, width * khz + 1e-6)
    hiss = 6 * np.exp(-0.35 * (khz - phones["centre"][:, None]) ** 2)
    return tract, hiss


def toy_room(rng, wav):
    """A voice of unit variance with echo, sometimes music, and noise."""
    seconds = np.arange(RATE // 4) / RATE
    echo = np.exp(-seconds / rng.uniform(0.02, 0.08)) * rng.standard_normal(len(seconds))
    n = 2 * len(wav)
    room = np.fft.irfft(np.fft.rfft(wav, n) * np.fft.rfft(echo, n))[:len(wav)]
    room *= rng.uniform(0, 0.7) / room.std()
    music = rng.choice([0, 0, 0.25]) * rng.random()
    for _ in range(3):
        tone = np.sin(rng.uniform(0.015, 0.15) * np.arange(len(wav)))
        room += music * upsample(wander(rng, 10, len(wav) // STEP).clip(0)) * tone
    noise = 10 ** rng.uniform(-3, -1) * rng.standard_normal(len(wav))
    return wav / wav.std() + room + noise


class ToyTalker(Clips):
    """The embedded data set: `clips` made-up clips of T frames; clip k of a split never changes."""

    def __init__(self, split="train", clips=300, T=200):
        self.wavs, self.clips, self.names, rows = [], [], [], []
        for k in tqdm(range(clips), f"toy talker, {split}", leave=False):
            wav, motion, emotion, identity = toy_clip((split != "train", k), T)
            self.wavs.append(wav)
            self.names.append(f"toy clip {k}")
            self.clips.append((motion, log_mel(wav, T).numpy(), identity))
            rows.append(dict(frames=T, emotion=emotion))
        self.index(rows, (1, 160), moments_of(motion for motion, *_ in self.clips))

    def arrays(self, k):
        return self.clips[k]


# ------------------------------------------------------------------------------- the command lines
class UsageError(Exception):
    """A flag that makes no sense."""


def parse_flags(argv, doc, *settings):
    """Set the fields of dataclasses from flags --name=value; returns the names that were given.

    A flag has the type of its default; a bare --name switches a bool on. UsageError says what is
    wrong; --help prints `doc` and every field with the comment in its class."""
    if {"-h", "--help"} & set(argv):
        print(doc, *map(describe, settings), sep="\n")
        sys.exit()
    owners = {name: owner for owner in settings for name in vars(owner)}
    given = set()
    for arg in argv:
        name, _, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in owners:
            raise UsageError(f"unknown flag {arg}; known: {', '.join(owners)}")
        default = getattr(owners[name], name)
        kind = type(default)
        try:
            value = BOOLEANS[text] if kind is bool else kind(text)
            if kind in (int, float) and not abs(value) < 2 ** 63:      # neither is NaN
                raise ValueError
        except (KeyError, ValueError):
            line = f"{arg}: expected {kind.__name__}, as in --{name}={default}"
            raise UsageError(line) from None
        setattr(owners[name], name, value)
        given.add(name)
    return given


BOOLEANS = {"": True, "True": True, "False": False}


def describe(settings):
    """The fields of a dataclass as its source lists them: name, default, comment."""
    source = inspect.getsource(type(settings))
    rows = re.findall(r'^    (\w+): \w+ = "?(.*?)"? +# (.*)$', source, re.M)
    return "\n".join(f"    {f'--{name}={default}':26} {comment}" for name, default, comment in rows)


def find_device(name):
    """The torch.device of --device, by default a GPU if there is one; UsageError if it is none."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except Exception as error:
        raise UsageError(f"--device={name}: no such device here ({error!s:.200})") from None


def run(main):
    """Call a script's main(argv). A mistake of the user is one line on stderr and exit code 1, or 2
    for a flag."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError, UsageError,
            KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise                                  # a mistake of ours
        tqdm.write(f"error: {' '.join(str(error).split()) or 'interrupted'}", sys.stderr)
        sys.stdout = None                          # or a closed pipe is reported once more
        code = 2 if isinstance(error, UsageError) else 1
    sys.exit(code)                                 # here, where the error lets go of workers


@dataclass
class Settings:
    videos: str = ""             # folder of talking videos, one face each, searched deeply
    data_dir: str = ""           # the data set, for train.py --data_dir
    weights: str = ""            # folder of LivePortrait's weights
    audio_encoder: str = ""      # file or folder of wav2vec 2.0 or HuBERT; else log-mel features
    crop: str = ""               # x,y,size: the square around the face; else the central one
    labels: str = ""             # csv that begins clip,emotion; a clip is a path, name or folder
    emotion: str = ""            # hsemotion (pip install hsemotion-onnx) labels what else has none
    check: bool = False          # look at the data set
    device: str = ""             # cuda if there is one


def main(argv):
    settings = Settings()
    parse_flags(argv, __doc__, settings)
    if not settings.data_dir or bool(settings.videos) == settings.check:
        raise UsageError("needed: --data_dir=FOLDER and either --videos=FOLDER or --check")
    if settings.emotion not in ("", "hsemotion"):
        raise UsageError(f"--emotion={settings.emotion}: should be hsemotion")
    if not re.fullmatch(r"(\d+,\d+,\d+)?", settings.crop):
        raise UsageError(f"--crop={settings.crop}: should be --crop=x,y,size in pixels")
    settings.device = find_device(settings.device)
    if settings.check:
        check(settings.data_dir)
    else:
        prepare(settings)


if __name__ == "__main__":
    run(main)
