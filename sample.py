"""Make a face talk: voice, portrait and emotion in, video out.

    python sample.py --audio_path=voice.wav --emotion=happiness
    python sample.py --audio_path=voice.wav --weights=pretrained_weights --image_path=face.jpg
    arecord -t raw -f S16_LE -r 16000 -c 1 | python sample.py --stream --audio_path=- --output_path=- | ffplay -
    python sample.py --eval                              a table of metrics on toy clips the model never saw
    python sample.py --bench                             how fast this machine is
The film is as long as the voice: ceil(25 x seconds) frames. Flags and what they are without being given:

    --audio_path=            the voice: any sound, or a video with sound; - is 16 kHz PCM, 16 bits, mono, on stdin
    --output_path=out.mp4    - is an MPEG transport stream on stdout
    --image_path=            the portrait, and which square of it: x,y,size; the largest in the centre without
    --crop=
    --weights=               folder of LivePortrait's weights; a drawn face without
    --paste_back=False       put the moving square back into the whole picture
    --stitch=True            LivePortrait's correction for a seamless square
    --relative=False         motion relative to the portrait's own pose and expression; so it is by default,
    --absolute=False         or as the model makes it, which is the default for the released checkpoint
    --ckpt=out/toy/ckpt.pt   MoDA's weights, ours or the released net-200.pth
    --stats=mean.pt          the statistics that belong to net-200.pth, which does not hold them
    --audio_encoder=         file or folder of wav2vec 2.0 or HuBERT, for models that hear it instead of log-mel
    --emotion=none           anger contempt disgust fear happiness neutral sadness surprise none, or their number; or
                             some in turn, each its seconds (2) long, the last to the end: neutral:2.5,happiness
    --edit=                  expression added to the motion: smile:0.5,brow:5; also aaa eee woo frown blink
    --seed=1                 another seed, another head motion
    --steps=10               Euler steps
    --cfg_audio=1.0          guidance (Eq. 8), condition by condition,
    --cfg_emotion=0.0
    --cfg_both=0.0           and both dropped together; the released checkpoint's is 0.2, and its cfg_audio 0
    --chunk=100              frames sampled at once, of which `overlap` fade into the next; 80 for the released one
    --overlap=16
    --first_chunk=0          frames of the first chunk, for an earlier start
    --smooth=False           average the pose over three frames, twice; True for the released one
    --pose_scale=1.0         exaggerate or calm the head, around the portrait's pose
    --exp_scale=1.0          the same for the expression
    --save_motion=           also write the model's motion, (T, 70), as .npy
    --motion_path=           motion saved like that, in place of the model's
    --stream=False           hear the voice no sooner than it is spoken, and tell how late the film is
    --bf16=False             MoDA and LivePortrait in bfloat16
    --compile=False          both through torch.compile: worth its minutes on a GPU
    --eval=False             on the CPU, in float32
    --bench=False
    --alse=out/alse/ckpt.pt  lip-sync expert, for the Sync columns of --eval
    --device=                cuda if there is one
"""
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import (CONTROLS, LABELS, LOOKS, RATE, ToyTalker, UsageError, audio_blocks, explained, expression, ffmpeg,
                  hearing, parse_flags, require, run)
from moda import ALSE, EXP, LIPS, MOUTH, ROT, MoDA, load_statistics, sample, save, stream
from renderer import SIZE, LivePortrait, Sketch, checked, crop_box, paste_back, read_image, relative

RELEASED = dict(cfg_audio=0.0, cfg_both=0.2, chunk=80, smooth=True, absolute=True)     # what net-200.pth is used with

def open_face(flags, device):
    """The face to animate, its Source, and a function that puts frames where they belong."""
    if not flags["weights"]:
        return Sketch(), Sketch().source(), iter
    image = read_image(flags["image_path"])
    x, y, size = box = crop_box(image, flags["crop"])
    crop = image.crop((x, y, x + size, y + size)).resize((SIZE, SIZE), Image.LANCZOS)
    face = LivePortrait(flags["weights"], device, torch.bfloat16 if flags["bf16"] else torch.float32)
    face.render = torch.compile(face.render, dynamic=False) if flags["compile"] else face.render
    crop.save(f"{flags['output_path']}.crop.png")
    place = (lambda frames: paste_back(frames, image, box)) if flags["paste_back"] else iter
    return face, face.source(np.asarray(crop)), place

def sampling(flags):
    """What the flags say to moda.stream."""
    guidance = {"audio": flags["cfg_audio"], "emotion": flags["cfg_emotion"], "audio+emotion": flags["cfg_both"]}
    names = "seed", "steps", "chunk", "overlap", "first_chunk", "smooth"
    return {name: flags[name] for name in names} | {"guidance": guidance}

def pairs(flags, name, known, default):
    """A flag such as smile:0.5,brow:5 -> [(what is known as smile, 0.5), ...]; UsageError if a word is not known."""
    with explained(f"--{name}={flags[name]}", f"known are {', '.join(known)}", "use NAME or NAME:NUMBER", UsageError):
        words = (part.partition(":") for part in flags[name].split(",") if part)
        return [(known[word], float(number or default)) for word, _, number in words]

def talk(flags, model, source, features, made):
    """The motion of a voice, piece by piece (n, 70), in LivePortrait units and for this portrait. To `made` goes what
    the model says, and --motion_path stands for: the same before it is edited and put on the portrait."""
    portrait, absolute = source.motion[0].to(model.mean.device), flags["absolute"] and not flags["relative"]
    # LivePortrait moves a portrait relative to a neutral driver; a generator's is a face at rest in its mean pose
    at_rest, size = torch.cat([0 * model.mean[EXP], model.mean[63:]]), model.size(portrait) if absolute else 1.0
    neutral = portrait if absolute else at_rest
    scale = portrait.new_tensor(63 * [flags["exp_scale"]] + 4 * [1.0] + 3 * [flags["pose_scale"]])
    edit = portrait.new_tensor(expression(**dict(pairs(flags, "edit", {name: name for name in CONTROLS}, 1))))
    if flags["motion_path"]:
        with explained(flags["motion_path"], "no motion could be read", "expected what --save_motion wrote"):
            motions = [checked(np.load(flags["motion_path"], allow_pickle=False))]
    else:
        moods, seconds = zip(*pairs(flags, "emotion", LABELS, 2))          # to the nearest frame, without drift
        emotions = list(zip(moods, np.diff(np.round(25 * np.cumsum([0, *seconds[:-1]])), append=np.inf)))
        zs = stream(model, features, source.x_c, model.normalise(neutral, size), emotions, **sampling(flags))
        motions = (model.denormalise(z.to(portrait)) for z in zs)
    for motion in motions:
        made.extend([motion.cpu()] if flags["save_motion"] else [])
        motion = neutral.lerp(motion.to(portrait) * size, scale)
        motion[:, EXP] += edit
        yield (motion if absolute else relative(motion, portrait, neutral)).cpu()

def write_video(path, frames, audio_path, heard=os.devnull):
    """Encode a generator of frames (H, W, 3) as they come, with their sound: 25 fps, and H.264 and AAC in an .mp4.
    `path` appears when it is complete: until then the film lies in a folder beside it that always goes away. "-" is
    stdout. Sound of the audio_path "-" comes through the pipe `heard`, float32."""
    coding = "-f ppm_pipe -framerate 25 -i - -map 1:v -map 0:a:0 -preset veryfast -crf 18 -pix_fmt yuv420p".split()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, open(heard) as pipe:
        part, live = Path(folder, path.name), f"-f f32le -ar {RATE} -ac 1 -i pipe:{pipe.fileno()}".split()
        voice = live if audio_path == "-" else ["-i", f"file:{audio_path}"]
        target = "-tune zerolatency -c:v libx264 -c:a aac -f mpegts -".split() if path.name == "-" else [f"file:{part}"]
        with ffmpeg(f"{path}: could not be written", OSError, *voice, *coding, *target,
                    stdin=PIPE, pass_fds=[pipe.fileno()]) as encoder:
            encoder.stdin.writelines(b"P6 %d %d 255\n" % frame.shape[1::-1] + frame.tobytes() for frame in frames)
        if path.name != "-":
            part.replace(path)

def timed(name, items, clock):
    """Pass items on and add the seconds they take to clock[name]."""
    began = time.perf_counter()
    for item in items:
        clock[name] += time.perf_counter() - began
        clock.setdefault(f"first {name}", time.perf_counter())
        yield item
        began = time.perf_counter()

def microphone(pieces, clock, pipe):
    """Sound no sooner than it is spoken, at clock["spoken"]; a thread puts it into the pipe, which may be full."""
    writer, clock["spoken"] = ThreadPoolExecutor(1), time.perf_counter()
    for piece in pieces:
        clock["spoken"] += len(piece) / RATE
        time.sleep(max(0, clock["spoken"] - time.perf_counter()))
        writer.submit(pipe.write, piece.tobytes())
        yield piece
    writer.submit(pipe.close)

def ahead(parts, clock):
    """Pass motion on while a thread makes the next piece; tell how late each is."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, parts, None)
        while (part := coming.result()) is not None:
            tqdm.write(f"{len(part)} frames of motion {time.perf_counter() - clock['spoken']:.2f} s after their sound")
            coming = thread.submit(next, parts, None)
            yield part

def main(argv):
    """Make the video that the flags ask for."""
    flags, began = parse_flags(__doc__, argv), time.perf_counter()
    out, voice, saved = Path(flags["output_path"]), flags["audio_path"], Path(flags["save_motion"])
    sys.stdout = sys.stderr if out.name == "-" else sys.stdout             # stdout is for the film
    if flags["bench"]:
        from tests.bench import bench
        return bench(flags)
    require(flags["eval"] or voice and not Path(voice).is_fifo() and (voice != "-" or not flags["motion_path"]),
            f"--audio_path={voice}: which voice? a file, no pipe; or - for stdin, not with --motion_path", UsageError)
    require(bool(flags["weights"]) == bool(flags["image_path"]), "--weights and --image_path go together", UsageError)
    require((out.name == "-" or out.suffix and out.parent.is_dir() and str(out) != voice) and saved.parent.is_dir(),
            f"--output_path={out} or --save_motion: no new file in a folder that exists", UsageError)
    require(pairs(flags, "emotion", LABELS, 2), "--emotion= is empty: none, or another name", UsageError)
    model = MoDA.from_pretrained(flags["ckpt"])
    flags = parse_flags(__doc__, argv, RELEASED if model.cfg.rope_streams == 2 else {})
    if model.std.eq(1).all():
        load_statistics(model, flags["stats"])
    if flags["eval"]:
        return evaluate(flags, model, ToyTalker("val", 16))
    model.to(flags["device"])
    model.fuse = torch.compile(model.fuse, mode="reduce-overhead", dynamic=False) if flags["compile"] else model.fuse
    for p in model.parameters() if flags["bf16"] else ():
        p.data = p.data.bfloat16()                                         # the statistics stay float32
    film(flags, model, out, began)

def film(flags, model, out, began):
    """From the voice to the file, where each stage pulls from the one before it; and how long each took."""
    face, source, place = open_face(flags, model.mean.device)
    clock, made, voice = dict.fromkeys(("sound", "motion", "render"), 0.0), [], flags["audio_path"]
    heard, pipe = os.pipe() if voice == "-" else (os.devnull, os.devnull)
    live, sound = not flags["motion_path"] and (flags["stream"] or voice == "-"), audio_blocks(voice)
    sound = microphone(sound, clock, open(pipe, "wb")) if live else sound
    features = timed("sound", hearing(flags["audio_encoder"], model.mean.device)(sound), clock)
    parts = timed("motion", talk(flags, model, source, features, made), clock)
    drawn = (face.frames(source, part, stitch=flags["stitch"]) for part in (ahead(parts, clock) if live else parts))
    frames = place(frame for film in drawn for frame in timed("render", film, clock))
    started = time.perf_counter()
    write_video(out, bar := tqdm(frames, "frames", unit=""), voice, heard)
    taken, busy = time.perf_counter() - started, clock["motion"] - clock["sound"] + clock["render"]
    if flags["save_motion"]:
        save(flags["save_motion"], torch.cat(made), write=lambda motion, path: np.save(open(path, "wb"), motion))
    print(f"{out}: {bar.n} frames; loading {started - began:.2f} s, sound {clock['sound']:.2f} s, motion "
          f"{clock['motion'] - clock['sound']:.2f} s, render {clock['render']:.2f} s, encode "
          f"{max(0, taken - busy - clock['sound']):.2f} s; first frame after {clock['first render'] - started:.2f} s; "
          f"real-time factor {taken / bar.n * 25:.3f}, steady {busy / bar.n * 25:.3f}")

def sync_scores(expert, audio, motion):
    """SyncNet's protocol on motion, K clips: the mean distance at each of the offsets -15..15, the best of which is D;
    C, the confidence, is how far the median lies above it."""
    a, m = expert(audio, motion, torch.ones(motion.shape[:2], dtype=torch.bool))
    # every offset's stretch of motion (K, 31, D, T - 30) against the middle of the voice
    distance = (m.unfold(1, m.size(1) - 30, 1) - a[:, None, 15:-15].mT).norm(dim=2).mean(-1)
    best = distance.amin(1)
    return {"Sync-C": (distance.median(1).values - best).mean().item(), "Sync-D": best.mean().item()}

@torch.inference_mode()
def evaluate(flags, model, talker):
    """Truth, the model, and the model given another clip's voice, as a table -> {row: {metric: value}}."""
    expert = ALSE.from_pretrained(flags["alse"]) if Path(flags["alse"]).is_file() else None
    clips, emotion = torch.utils.data.default_collate(talker.clips), torch.tensor(talker.emotion)
    audio, (prev, truth) = clips["audio"][:, 1:], model.normalise(clips["motion"]).tensor_split([1], 1)

    def speak(voices, **other):
        given = zip(tqdm(voices, "evaluating", leave=False), clips["identity"], prev, emotion)
        return torch.stack([sample(model, *one, **sampling(flags | other)) for one in given])
    rows = {"truth": truth, "model": speak(audio), "shuffled audio": speak(audio.roll(1, 0))}
    still, table = [c for c in range(63) if c not in LIPS], {}
    moods = torch.tensor(expression(**dict(zip(("smile", "brow", "frown", "blink"), LOOKS.T))))[:, still].float()
    for name, z in rows.items():
        mood = torch.cdist(model.denormalise(z)[..., still].mean(1), moods).argmin(1)
        table[name] = {"mouth corr": np.mean([np.corrcoef(a[:, MOUTH], b[:, MOUTH])[0, 1] for a, b in zip(z, truth)]),
                       **(sync_scores(expert, audio, model.denormalise(z)) if expert else {}),
                       "emotion": (mood == emotion).float().mean().item(),
                       "jerk": z.diff(n=3, dim=1).abs().mean().item()}
    table["model"]["pose diversity"] = (rows["model"] - speak(audio, seed=flags["seed"] + 1))[..., ROT].std().item()
    print(" " * 15, *(f"{metric:>14}" for metric in table["model"]))
    for name, row in table.items():
        print(f"{name:15}", *(f"{row.get(metric, '-'):>14.3}" for metric in table["model"]))
    return table

def after_training(ckpt, out, clips):
    """The table, a film of an unseen clip, and its strip: frames, sound, mouth opening generated (red) over true."""
    flags, model, talker = parse_flags(__doc__, []), MoDA.from_pretrained(ckpt), ToyTalker("val", clips)
    evaluate(flags, model, talker)
    motion, audio, identity = talker.clips[0].values()
    z = sample(model, audio, identity, model.normalise(motion[0]), talker.emotion[0], **sampling(flags))
    face, source, wav, made = Sketch(), Sketch().source(x_c=identity), talker.wavs[0], model.denormalise(z)
    soundfile.write(out / "sample.wav", wav, RATE)
    write_video(out / "sample.mp4", face.frames(source, made), out / "sample.wav")
    strip = Image.new("RGB", (1280, 440), "white")
    strip.paste(Image.fromarray(np.hstack(list(face.frames(source, made[::25])))).resize((1280, 160)))
    for curve, zoom, base, colour in ((wav[::40], 55 / np.abs(wav).max(), 220, "#7896aa"),
                                      (motion[:, MOUTH], 2000, 390, "#969696"), (made[:, MOUTH], 2000, 390, "#c83c3c")):
        points = np.c_[np.linspace(0, 1280, len(curve)), base - zoom * curve]
        ImageDraw.Draw(strip).line(points.ravel().tolist(), colour, 2)
    strip.save(out / "sample.png")

if __name__ == "__main__":
    run(main)
