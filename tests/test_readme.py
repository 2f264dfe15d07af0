"""Every command of the README works as it is written; what one downloads has stand-ins."""
import operator
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import data
import moda
import sample
import train
from bad import folder, good, preparable, write
from data import ToyTalker, log_mel_blocks, parse_flags
from renderer import GET, LivePortrait, Sketch, write_template

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# of what it says, in blocks and within lines, that a shell would run
BLOCKS = re.findall(r"^```\n(\S.*?)^```", README, re.M | re.S)         # not the table
LINES = "\n".join(BLOCKS).splitlines() + re.findall(r"`(python [^`\n]+)`", README)
PARTS = {part.strip() for line in LINES for part in re.split(r" \| | && ", line) if line}
# installs and downloads, players and recorders, and what other tests start
OTHERS = ("pip ", "hf download ", "arecord ", "ffplay ", "torchrun ", "python -m pytest",
          "python sample.py --stream --audio_path=- ", "python tests/tools/pictures.py ",
          "python tests/tools/experiments.py", "python tests/tools/table.py ")
RUN = sorted(part for part in PARTS if not part.startswith(OTHERS))
SMALL = ("--steps=1 --batch_size=2 --workers=1 --eval_every=1 --width=32 "
         "--out_dir=out/new").split()
SMALL_MODA = "--heads=1 --n_four=1 --n_two=0 --n_one=0".split()


@pytest.fixture
def stand_ins(preparable, monkeypatch):
    """The files and models that the commands name."""
    Image.new("RGB", (64, 48), "tan").save("me.jpg")
    for path in ("out/toy", "out/alse"):
        Path(path).mkdir(parents=True)
    shutil.copy("ckpt.pt", "out/toy")
    shutil.copy("expert.pt", "out/alse/ckpt.pt")
    write_template(torch.ones(2, 70), "laugh.pkl")
    for path in ("voice.wav", "out/toy/sample.wav"):
        soundfile.write(path, np.ones(1280) / 2, 16000)
    write("pairs.csv", "portrait,voice,emotion\nme.jpg,voice.wav,anger")
    shutil.copytree("set", "data/mine")
    manifest = Path("data/mine/manifest.json")
    manifest.write_text(manifest.read_text().replace('"train"', '"val"', 1))
    model = moda.MoDA.from_pretrained("ckpt.pt")

    def from_pretrained(path, **changes):
        model.std.fill_(1 if "net-200" in str(path) else 0.1)          # it comes without statistics
        return model
    monkeypatch.setattr(moda.MoDA, "from_pretrained", from_pretrained)
    for script in sample, train:
        monkeypatch.setattr(script, "load_statistics", lambda model, path: None)
    monkeypatch.setattr(LivePortrait, "__init__", lambda face, *args: None)
    monkeypatch.setattr(LivePortrait, "source", lambda face, image: Sketch().source())
    monkeypatch.setattr(LivePortrait, "frames", lambda face, *args, **flags: Sketch().frames(*args))

    def write_video(path, frames, *sound):
        path.write_text(f"{len(list(frames))} frames")
    monkeypatch.setattr(sample, "write_video", write_video)

    class Encoder:
        blocks = staticmethod(log_mel_blocks)

        def to(self, device):
            return self
    monkeypatch.setattr(data.AudioEncoder, "from_pretrained", lambda *args: Encoder())

    class OneClip(ToyTalker):
        def __init__(self, split, clips=1):
            super().__init__(split, 1, 90)
    for script in sample, train:
        monkeypatch.setattr(script, "ToyTalker", OneClip)
    yield
    sample.load_face.cache_clear()
    sample.load_features.cache_clear()


@pytest.mark.parametrize("command", RUN)
def test_the_readmes_command_runs(command, stand_ins):
    _, script, *flags = shlex.split(command)
    if script == "sample.py":
        settings = sample.Settings()
        parse_flags(flags, "", settings)
        faster = [] if settings.motion_path else ["--steps=1", "--chunk=20", "--overlap=4"]
        sample.main([*flags, *faster])
        if settings.pairs:
            assert Path(settings.output_path, "001.mp4").read_text() == "2 frames"
        elif not settings.eval:
            assert Path(settings.output_path).read_text() == "2 frames"
        assert not settings.save_motion or Path(settings.save_motion).exists()
    elif script == "data.py":
        shutil.rmtree("data/mine")
        data.main(flags)
    elif script == "tests/tools/check.py":
        runpy.run_path(ROOT / script)["main"]([*flags, "--report="])
    else:
        assert script == "train.py"
        own_data = "--data_dir" in " ".join(flags)
        no_table = [] if own_data else ["--eval_clips=0"]
        small = SMALL if "--model=alse" in flags else SMALL + SMALL_MODA
        train.main([*flags, *small, *no_table])
        assert Path("out/new/ckpt.pt").exists()


def test_what_the_readme_names_exists():
    assert GET.removeprefix("get it with: ") in LINES     # what a missing file's message says
    scripts = re.findall(r"(?:tests/)?(?:\w+/)*\w+\.py\b", README)
    others = {"inference.py"}                      # LivePortrait's
    for script in set(scripts) - others:
        assert (ROOT / script).exists(), script
    for module, name in re.findall(r"`(moda|renderer|data|train|sample)\.(\w+)", README):
        if name not in ("py", "csv"):
            assert hasattr(globals().get(module) or __import__(module), name), f"{module}.{name}"
    for module, names in re.findall(r"\| `(\w+)\.py`: ([^|]*) \|", README):
        for name in re.findall(r"`([\w.]+)`", names):
            assert operator.attrgetter(name)(sys.modules[module]), f"{module}.{name}"
    for link in re.findall(r"\]\(((?:assets|tests)/[^)]+)\)", README):
        assert (ROOT / link).exists(), link
    # pip's, hf's and torchrun's
    known = {"index", "local", "include", "standalone", "nproc_per_node", "nnodes", "rdzv_backend",
             "rdzv_endpoint", "max_restarts"}
    for owner in (sample.Settings, data.Settings, train.Settings, moda.Config):
        known |= vars(owner()).keys()
    for tool, flag in re.findall(r"(tests/tools/\w+\.py) --(\w+)", README):
        flags = re.findall(r"^    (\w+): ", (ROOT / tool).read_text(), re.M)
        assert flag in flags or flag in known
        known.update(flags)
    assert set(re.findall(r"--(\w+)", README)) <= known
