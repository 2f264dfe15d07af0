"""Make a face talk: voice, portrait and emotion in, video out.

    python sample.py --audio_path=voice.wav --emotion=happiness --output_path=out.mp4
    python sample.py --audio_path=voice.wav --weights=pretrained_weights --image_path=face.jpg
    python sample.py --eval                              a table of metrics on toy clips the model never saw

The voice may be any sound file, or a video with sound. The film is as long as the voice: ceil(25 x seconds) frames.
Flags and what they are without being given:

    --audio_path=            the voice: any sound, or a video with sound
    --output_path=out.mp4
    --image_path=            the portrait, and which square of it: x,y,size; the largest in the centre without
    --crop=
    --weights=               folder of LivePortrait's weights; a drawn face without
    --paste_back=False       put the moving square back into the whole picture
    --stitch=True            LivePortrait's correction for a seamless square
    --relative=False         motion relative to the portrait's own pose and expression; so it is by default,
    --absolute=False         or as the model makes it, which is the default for the released checkpoint
    --ckpt=out/toy/ckpt.pt   MoDA's weights, ours or the released net-200.pth
    --stats=                 the mean.pt that belongs to net-200.pth
    --audio_encoder=         file or folder of wav2vec 2.0 or HuBERT, for models that hear it instead of log-mel
    --emotion=none           anger contempt disgust fear happiness neutral sadness surprise none, or their number
    --seed=1                 another seed, another head motion
    --steps=10               Euler steps
    --cfg_audio=1.0          guidance (Eq. 8), condition by condition,
    --cfg_emotion=0.0
    --cfg_both=0.0           and both dropped together; the released checkpoint's is 0.2, and its cfg_audio 0
    --chunk=100              frames sampled at once, of which `overlap` fade into the next; 80 for the released one
    --overlap=16
    --smooth=False           average the pose over three frames, twice; True for the released one
    --pose_scale=1.0         exaggerate or calm the head, around the portrait's pose
    --exp_scale=1.0          the same for the expression
    --save_motion=           also write the (T, 70) motion as .npy
    --eval=False
    --alse=out/alse/ckpt.pt  lip-sync expert, for the Sync columns of --eval
    --device=
"""
import contextlib
import itertools
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import moda
from data import (MEL, RATE, AudioEncoder, ToyTalker, UsageError, audio_blocks, log_mel_blocks, parse_flags, run,
                  toy_prototypes)
from moda import ALSE, EMOTIONS, EXP, LIPS, MOUTH, ROT, M, MoDA, load_statistics, stream
from renderer import SIZE, LivePortrait, Sketch, crop_box, paste_back, read_image, relative

RELEASED = dict(cfg_audio=0.0, cfg_both=0.2, chunk=80, smooth=True, absolute=True)     # what net-200.pth is used with


def emotion_label(name):
    """Label of an emotion given by name or number."""
    if name in EMOTIONS:
        return EMOTIONS.index(name)
    if name.isdigit() and int(name) < len(EMOTIONS):
        return int(name)
    raise UsageError(f"--emotion={name}: known are {', '.join(EMOTIONS)}")


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(name, items, clock):
    """Pass items on and add the seconds they take to clock[name]."""
    items, began = iter(items), time.perf_counter()
    for item in items:
        clock[name] += time.perf_counter() - began
        yield item
        began = time.perf_counter()
    clock[name] += time.perf_counter() - began


def write_video(path, frames, audio_path):
    """Encode frames (H, W, 3) with their sound: H.264 and AAC, 25 fps. The file gets its name when complete -> n."""
    part, frames = f"{path}.part.mp4", iter(frames)
    first = next(frames)
    size = f"{first.shape[1]}x{first.shape[0]}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size,
               "-r", "25", "-i", "-", "-i", f"file:{audio_path}", "-map", "0:v", "-map", "1:a:0", "-c:v", "libx264",
               "-preset", "veryfast", "-crf", "18", "-pix_fmt", "yuv420p", "-c:a", "aac", f"file:{part}"]
    ffmpeg, n = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE), 0
    try:
        with contextlib.suppress(BrokenPipeError):                         # then ffmpeg says why
            for n, frame in enumerate(itertools.chain([first], frames), 1):
                ffmpeg.stdin.write(frame.tobytes())
        reason = ffmpeg.communicate()[1].decode(errors="replace").strip()
        if ffmpeg.returncode:
            raise OSError(f"{path}: could not be written ({(reason or 'ffmpeg failed').splitlines()[-1]})")
        os.replace(part, path)
        return n
    finally:
        ffmpeg.kill()
        Path(part).unlink(missing_ok=True)


def open_face(flags, device):
    """The face to animate, its Source, and a function that puts frames where they belong."""
    if not flags["weights"]:
        face = Sketch()
        return face, face.source(), iter
    image = read_image(flags["image_path"])
    x, y, size = box = crop_box(image, flags["crop"])
    crop = image.crop((x, y, x + size, y + size)).resize((SIZE, SIZE), Image.LANCZOS)
    crop.save(f"{flags['output_path']}.crop.png")
    face = LivePortrait(flags["weights"], device)
    place = (lambda frames: paste_back(frames, image, box)) if flags["paste_back"] else iter
    return face, face.source(np.asarray(crop)), place


def listen(flags, model):
    """What the model hears of --audio_path, piece by piece (n, L, A)."""
    hears, sound = (model.cfg.audio_layers, model.cfg.audio_dim), audio_blocks(flags["audio_path"])
    if not flags["audio_encoder"]:
        if hears != (1, MEL.shape[1] * 4):
            raise ValueError(f"{flags['ckpt']} hears {hears[0]} x {hears[1]} features: name their --audio_encoder")
        return log_mel_blocks(sound)
    encoder = AudioEncoder.from_pretrained(flags["audio_encoder"], model.mean.device)
    if encoder.shape != hears:
        raise ValueError(f"{flags['audio_encoder']} gives {encoder.shape} features, but {flags['ckpt']} hears {hears}")
    return encoder.blocks(sound)


def guidance(flags):
    return {"audio": flags["cfg_audio"], "emotion": flags["cfg_emotion"], "audio+emotion": flags["cfg_both"]}


def talk(flags, model, face, source, features, clock):
    """Frames of the face speaking, made while they are asked for; with --save_motion, the motion is written too."""
    portrait, absolute = source.motion[0], flags["absolute"]
    # a generator's neutral is the mean of its motion; as LivePortrait moves a portrait relative to the driver's neutral
    neutral, size = (portrait, model.size(portrait)) if absolute else (model.mean, 1.0)
    scale = torch.ones(M)
    scale[EXP], scale[ROT] = flags["exp_scale"], flags["pose_scale"]
    parts = timed("motion", stream(
        model, timed("features", features, clock), source.x_c, model.normalise(neutral, size),
        emotion_label(flags["emotion"]), flags["steps"], guidance(flags), flags["chunk"], flags["overlap"],
        flags["seed"], smooth=flags["smooth"]), clock)
    made = []
    for z in parts:
        motion = neutral + scale * (model.denormalise(z, size) - neutral)
        made.append(motion if absolute else relative(motion, portrait, neutral))
        yield from face.frames(source, made[-1], stitch=flags["stitch"])
    if flags["save_motion"]:
        np.save(flags["save_motion"], torch.cat(made).numpy())


def film_strip(path, frames, wav, generated, true):
    """A picture of a clip: frames in a row, the sound wave, and the mouth opening generated (red) over true (grey)."""
    width, tile = 1280, 160
    image = Image.new("RGB", (width, tile + 280), "white")
    for k in range(8):
        frame = Image.fromarray(frames[k * (len(frames) - 1) // 7])
        image.paste(frame.resize((tile, tile)), (k * tile, 0))
    brush = ImageDraw.Draw(image)
    loud = np.abs(wav[:len(wav) // width * width].reshape(width, -1)).max(1) / np.abs(wav).max()
    for x, y in enumerate(50 * loud):
        brush.line([(x, tile + 60 - y), (x, tile + 60 + y)], (120, 150, 170))
    low, high = min(generated.min(), true.min()), max(generated.max(), true.max())
    for curve, colour in ((true, (150, 150, 150)), (generated, (200, 60, 60))):
        x, y = np.linspace(0, width - 1, len(curve)), tile + 265 - 130 * (curve - low) / (high - low)
        brush.line(list(zip(x, y)), colour, 3)
    brush.text((8, tile + 122), "mouth opening: grey true, red generated", (80, 80, 80), ImageFont.load_default(14))
    image.save(path)


# ---------------------------------------------------------------------------------------------------------- evaluation

def sync_scores(expert, audio, z):
    """SyncNet's protocol on motion: mean distance D at the best of the offsets -15..15, and confidence C, median - D."""
    a, m = (x[0] for x in expert(audio[None], z[None], torch.ones(1, len(z), dtype=torch.bool)))
    n = len(z) - 30
    distance = torch.stack([(a[15:15 + n] - m[k:k + n]).norm(dim=-1).mean() for k in range(31)])
    return (distance.median() - distance.min()).item(), distance.min().item()


@torch.inference_mode()
def evaluate(flags, model, talker):
    """Print one table for the talker's clips: truth, the model, and the model given another clip's voice."""
    expert = ALSE.from_pretrained(flags["alse"]) if Path(flags["alse"]).exists() else None
    still = [c for c in range(63) if c not in LIPS and model.std[c] > 1e-6]
    moods = model.normalise(torch.from_numpy(np.pad(toy_prototypes(), ((0, 0), (0, 7)))).float())[:, still]
    rows = {"truth": [], "model": [], "shuffled audio": []}
    for k in tqdm(range(len(talker.length)), "evaluating", leave=False):
        motion, audio, emotion, identity = talker.clip(k)
        truth, audio = model.normalise(torch.from_numpy(motion)), torch.from_numpy(audio)[1:]
        foreign = torch.from_numpy(talker.clip(k - 1)[1])[1:]
        options = dict(identity=torch.from_numpy(identity), prev=truth[0], emotion=emotion, steps=flags["steps"],
                       guidance=guidance(flags))
        made = {"truth": [truth[1:]], "model": [moda.sample(model, audio, seed=seed, **options) for seed in (1, 2)],
                "shuffled audio": [moda.sample(model, foreign, seed=1, **options)]}
        for name, takes in made.items():
            z = takes[0]
            rows[name].append((
                np.corrcoef(z[:, MOUTH], truth[1:, MOUTH])[0, 1],
                *(sync_scores(expert, audio, z) if expert else (np.nan, np.nan)),
                float(torch.cdist(z[None, :, still].mean(1), moods).argmin() == emotion),
                z.diff(n=2, dim=0).abs().mean().item(),
                (takes[0] - takes[1])[:, ROT].std().item() if len(takes) > 1 else np.nan))
    print(f"{'':16}mouth corr   Sync-C   Sync-D   emotion   jerk   pose diversity")
    for name, values in rows.items():
        corr, c, d, emotion, jerk, diversity = np.mean(values, 0)
        print(f"{name:16}{corr:10.3f}{c:9.3f}{d:9.3f}{emotion:10.3f}{jerk:7.3f}{diversity:17.3f}".replace("nan", "  -"))
    if expert is None:
        print(f"for Sync-C and Sync-D train the expert: python train.py --model=alse (looked for {flags['alse']})")


def after_training(ckpt, out, clips):
    """What `train.py` ends with on the toy talker: the table, and one unseen clip as a film and as a strip."""
    talker, model = ToyTalker("val", clips), MoDA.from_pretrained(ckpt)
    evaluate(parse_flags(__doc__, []), model, talker)
    motion, audio, emotion, identity = talker.clip(0)
    soundfile.write(out / "sample.wav", talker.wavs[0], RATE)
    face = Sketch()
    source = face.source(x_c=identity)
    z = moda.sample(model, torch.from_numpy(audio), source.x_c, model.normalise(torch.from_numpy(motion[0])), emotion)
    made = model.denormalise(z)
    frames = list(face.frames(source, made))
    write_video(out / "sample.mp4", frames, out / "sample.wav")
    film_strip(out / "sample.png", frames, talker.wavs[0], made[:, MOUTH].numpy(), motion[:, MOUTH])
    print(f"{out / 'sample.mp4'}: emotion {EMOTIONS[emotion]}; film strip in {out / 'sample.png'}")


def main(argv):
    flags = parse_flags(__doc__, argv)
    model = MoDA.from_pretrained(flags["ckpt"])
    released = model.cfg.rope_streams == 2
    if released:
        flags = parse_flags(__doc__, argv, RELEASED)
    if flags["stats"]:
        load_statistics(model, flags["stats"])
    elif released and model.std.eq(1).all():
        raise UsageError("--stats=mean.pt is missing: the released checkpoint does not hold its statistics")
    flags["absolute"] &= not flags["relative"]
    if flags["eval"]:
        return evaluate(flags, model, ToyTalker("val", 16))
    if not flags["audio_path"]:
        raise UsageError("--audio_path=FILE is missing: which voice?")
    if bool(flags["weights"]) != bool(flags["image_path"]):
        raise UsageError("--image_path=PICTURE and --weights=FOLDER go together: LivePortrait moves the portrait")
    clock, began = Counter(), time.perf_counter()
    device = flags["device"] or default_device()
    face, source, place = open_face(flags, device)
    features = listen(flags, model)
    loaded = time.perf_counter()
    spoken = talk(flags, model, face, source, features, clock)
    frames = timed("render", tqdm(place(spoken), "frames", unit=""), clock)
    n = write_video(flags["output_path"], frames, flags["audio_path"])
    total = time.perf_counter() - loaded
    # each stage pulls from the one before: its own time is the difference
    sound, motion, render = clock["features"], clock["motion"] - clock["features"], clock["render"] - clock["motion"]
    print(f"{flags['output_path']}: {n} frames, {n / 25:.2f} s; loading {loaded - began:.2f} s; sound {sound:.2f} s, "
          f"motion {motion:.2f} s, render {render:.2f} s, encode {total - clock['render']:.2f} s; "
          f"real-time factor {total / n * 25:.3f}")


if __name__ == "__main__":
    run(main)
