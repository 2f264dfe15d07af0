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
import subprocess
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import (LABELS, MEL, RATE, AudioEncoder, ToyTalker, UsageError, audio_blocks, default_device, log_mel_blocks,
                  parse_flags, run, toy_prototypes)
from moda import ALSE, EMOTIONS, EXP, LIPS, MOUTH, ROT, MoDA, load_statistics, sample, stream
from renderer import SIZE, LivePortrait, Sketch, crop_box, paste_back, read_image, relative

RELEASED = dict(cfg_audio=0.0, cfg_both=0.2, chunk=80, smooth=True, absolute=True)     # what net-200.pth is used with


def check(flags):
    """UsageError, before any work, where a flag is missing or makes no sense."""
    out = Path(flags["output_path"])
    if not flags["audio_path"] and not flags["eval"]:
        raise UsageError("--audio_path=FILE is missing: which voice?")
    if bool(flags["weights"]) != bool(flags["image_path"]):
        raise UsageError("--image_path=PICTURE and --weights=FOLDER go together: LivePortrait moves the portrait")
    if not out.suffix or not out.parent.is_dir():
        raise UsageError(f"--output_path={out}: expected a name such as out.mp4 in a folder that exists")
    if flags["emotion"] not in LABELS:
        raise UsageError(f"--emotion={flags['emotion']}: known are {', '.join(EMOTIONS)}")


def open_face(flags, device):
    """The face to animate, its Source, and a function that puts frames where they belong."""
    if not flags["weights"]:
        return Sketch(), Sketch().source(), iter
    image = read_image(flags["image_path"])
    x, y, size = box = crop_box(image, flags["crop"])
    crop = image.crop((x, y, x + size, y + size)).resize((SIZE, SIZE), Image.LANCZOS)
    crop.save(f"{flags['output_path']}.crop.png")
    face = LivePortrait(flags["weights"], device)
    place = (lambda frames: paste_back(frames, image, box)) if flags["paste_back"] else iter
    return face, face.source(np.asarray(crop)), place


def listen(flags, model):
    """What the model hears of --audio_path, piece by piece (n, L, A)."""
    sound, path = audio_blocks(flags["audio_path"]), flags["audio_encoder"]
    encoder = AudioEncoder.from_pretrained(path, model.mean.device) if path else None
    gives, hears = encoder.shape if path else (1, 4 * MEL.shape[1]), (model.cfg.audio_layers, model.cfg.audio_dim)
    if gives != hears:
        raise ValueError(f"{flags['ckpt']}: hears {hears} features per frame, not {gives}; name their --audio_encoder")
    return encoder.blocks(sound) if path else log_mel_blocks(sound)


def sampling(flags):
    """What the flags say to moda.stream."""
    guidance = {"audio": flags["cfg_audio"], "emotion": flags["cfg_emotion"], "audio+emotion": flags["cfg_both"]}
    return {name: flags[name] for name in ("steps", "chunk", "overlap", "smooth")} | {"guidance": guidance}


def talk(flags, model, source, features):
    """The motion of a voice, piece by piece (n, 70), in LivePortrait units and for this portrait."""
    portrait, absolute = source.motion[0].to(model.mean.device), flags["absolute"] and not flags["relative"]
    # a generator's neutral is the mean of its motion; as LivePortrait moves a portrait relative to the driver's neutral
    neutral, size = (portrait, model.size(portrait)) if absolute else (model.mean, 1.0)
    scale = torch.ones_like(portrait)
    scale[EXP], scale[ROT] = flags["exp_scale"], flags["pose_scale"]
    prev, emotion = model.normalise(neutral, size), LABELS[flags["emotion"]]
    for z in stream(model, features, source.x_c, prev, emotion, seed=flags["seed"], **sampling(flags)):
        motion = neutral + scale * (model.denormalise(z.to(portrait), size) - neutral)
        yield (motion if absolute else relative(motion, portrait, neutral)).cpu()


def write_video(path, frames, audio_path):
    """Encode a generator of frames (H, W, 3) as they come, with their sound: H.264 and AAC, 25 fps.

    `path` appears when it is complete: until then the film lies in a folder beside it that always goes away.
    """
    pictures = "-v error -f image2pipe -c:v ppm -framerate 25 -i -".split()
    coding = "-map 0:v -map 1:a:0 -c:v libx264 -preset veryfast -crf 18 -pix_fmt yuv420p -c:a aac".split()
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), *pictures, "-i", f"file:{audio_path}", *coding]
    with tempfile.TemporaryFile("w+", errors="replace") as log, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, path.name)
        encoder = subprocess.Popen([*ffmpeg, f"file:{part}"], stdin=subprocess.PIPE, stderr=log)
        # when the pipe breaks, ffmpeg has said why
        with contextlib.suppress(BrokenPipeError), contextlib.closing(frames), encoder:
            for frame in frames:
                encoder.stdin.write(b"P6 %d %d 255\n" % frame.shape[1::-1] + frame.tobytes())
        if encoder.returncode:
            log.seek(0)
            raise OSError(f"{path}: could not be written ({' '.join(log.read().split())[-300:]})")
        part.replace(path)


def timed(name, items, clock):
    """Pass items on and add the seconds they take to clock[name]."""
    began = time.perf_counter()
    for item in items:
        clock[name] += time.perf_counter() - began
        yield item
        began = time.perf_counter()


def main(argv, opened=None):
    """Make the video that the flags ask for -> its motion (T, 70). `opened`: what to use in place of open_face's."""
    flags, began = parse_flags(__doc__, argv), time.perf_counter()
    check(flags)
    model = MoDA.from_pretrained(flags["ckpt"])
    if model.cfg.rope_streams == 2:
        flags = parse_flags(__doc__, argv, RELEASED)
    if flags["stats"]:
        load_statistics(model, flags["stats"])
    elif model.std.eq(1).all():
        raise UsageError("--stats=mean.pt is missing: the released checkpoint does not hold its statistics")
    if flags["eval"]:
        return evaluate(flags, model, ToyTalker("val", 16))
    model.to(flags["device"] or default_device())
    face, source, place = opened or open_face(flags, model.mean.device)
    features = listen(flags, model)

    clock, loaded = dict(sound=0.0, motion=0.0, render=0.0), time.perf_counter()
    parts = talk(flags, model, source, timed("sound", features, clock))
    parts, kept = itertools.tee(timed("motion", parts, clock))
    frames = (frame for part in parts for frame in face.frames(source, part, stitch=flags["stitch"]))
    frames = timed("render", tqdm(place(frames), "frames", unit=""), clock)
    write_video(Path(flags["output_path"]), frames, flags["audio_path"])
    motion, total = torch.cat(list(kept)), time.perf_counter() - loaded
    if flags["save_motion"]:
        with tempfile.TemporaryDirectory(dir=Path(flags["save_motion"]).parent) as folder:
            np.save(f"{folder}/motion.npy", motion)
            Path(folder, "motion.npy").replace(flags["save_motion"])
    # each stage pulls from the one before: its own time is the difference
    stages = zip(("sound", "motion", "render", "encode"), np.diff([0, *clock.values(), total]))
    print(f"{flags['output_path']}: {len(motion)} frames; loading {loaded - began:.2f} s, "
          + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages)
          + f"; real-time factor {total / len(motion) * 25:.3f}")
    return motion


# ---------------------------------------------------------------------------------------------------------- evaluation

def sync_scores(expert, audio, z):
    """SyncNet's protocol on motion, K clips: the mean distance at each of the offsets -15..15, the best of which is D;
    C, the confidence, is how far the median lies above it."""
    a, m = expert(audio, z, torch.ones(z.shape[:2], dtype=torch.bool))
    n = z.size(1) - 30
    distance = torch.stack([(a[:, 15:15 + n] - m[:, k:k + n]).norm(dim=-1).mean(1) for k in range(31)])
    best = distance.amin(0)
    return {"Sync-C": (distance.median(0).values - best).mean().item(), "Sync-D": best.mean().item()}


@torch.inference_mode()
def evaluate(flags, model, talker):
    """Truth, the model, and the model given another clip's voice, as a table -> {row: {metric: value}}."""
    expert = ALSE.from_pretrained(flags["alse"]) if Path(flags["alse"]).exists() else None
    if (model.cfg.audio_layers, model.cfg.audio_dim) != talker.audio_shape:
        raise ValueError(f"{flags['ckpt']}: does not hear the log-mel features that the toy talker comes with")
    clips = zip(*[talker.clip(k) for k in range(len(talker.length))])
    motion, audio, emotion, identity = (torch.as_tensor(np.stack(column)) for column in clips)
    truth, audio = model.normalise(motion), audio[:, 1:]                   # (K, T, 70); the first frame is prev

    def speak(voices, seed=1):
        given = tqdm(zip(voices, identity, truth[:, 0], emotion), "evaluating", len(voices), leave=False)
        return torch.stack([sample(model, *one, seed=seed, **sampling(flags)) for one in given])
    rows = {"truth": truth[:, 1:], "model": speak(audio), "shuffled audio": speak(audio.roll(1, 0))}
    still = [c for c in range(63) if c not in LIPS]
    moods = model.normalise(torch.from_numpy(np.pad(toy_prototypes(), ((0, 0), (0, 7)))).float())[:, still]
    table = {}
    for name, z in rows.items():
        mouths, mood = zip(z[..., MOUTH], truth[:, 1:, MOUTH]), torch.cdist(z[..., still].mean(1), moods).argmin(1)
        table[name] = {"mouth corr": float(np.mean([np.corrcoef(*pair)[0, 1] for pair in mouths])),
                       **(sync_scores(expert, audio, z) if expert else {}),
                       "emotion": (mood == emotion).float().mean().item(),
                       "jerk": z.diff(n=3, dim=1).abs().mean().item()}
    table["model"]["pose diversity"] = (rows["model"] - speak(audio, seed=2))[..., ROT].std().item()
    print(" " * 15, *(f"{metric:>14}" for metric in table["model"]))
    for name, row in table.items():
        print(f"{name:15}", *(f"{row[metric]:14.3f}" if metric in row else f"{'-':>14}" for metric in table["model"]))
    if not expert:
        print(f"for Sync-C and Sync-D train the expert: python train.py --model=alse (looked for {flags['alse']})")
    return table


def film_strip(path, frames, wav, true, made):
    """A picture of a clip: frames in a row, the sound wave, and the mouth opening generated (red) over true (grey)."""
    image = Image.new("RGB", (1280, 440), "white")
    image.paste(Image.fromarray(np.hstack(list(frames))).resize((1280, 160)))
    brush = ImageDraw.Draw(image)
    wave, mouth = 55 / np.abs(wav).max(), 110 / max(true.max(), made.max())
    for curve, zoom, base, colour in ((wav[::40], wave, 220, "#7896aa"), (true, mouth, 405, "#969696"),
                                      (made, mouth, 405, "#c83c3c")):
        brush.line(list(zip(np.linspace(0, 1280, len(curve)), np.asarray(base - zoom * curve))), colour, 2)
    brush.text((8, 282), "mouth opening: grey true, red generated", "#505050", font_size=14)
    image.save(path)


def after_training(ckpt, out, clips):
    """What `train.py` ends with on the toy talker: the table, and one unseen clip as a film and as a strip."""
    talker = ToyTalker("val", clips)
    motion, _, emotion, identity = (torch.as_tensor(x) for x in talker.clip(0))
    argv = [f"--ckpt={ckpt}", f"--audio_path={out}/sample.wav", f"--output_path={out}/sample.mp4", "--absolute",
            f"--emotion={emotion}"]
    evaluate(parse_flags(__doc__, argv), MoDA.from_pretrained(ckpt), talker)
    soundfile.write(out / "sample.wav", talker.wavs[0], RATE)
    face = Sketch()
    source = face.source(x_c=identity)._replace(motion=motion[:1])
    made = main(argv, (face, source, iter))
    film_strip(out / "sample.png", face.frames(source, made[::25]), talker.wavs[0], motion[:, MOUTH], made[:, MOUTH])


if __name__ == "__main__":
    run(main)
