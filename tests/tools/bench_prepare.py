"""What preparing a data set costs, stage by stage: hours of video per hour of this machine.

    python tests/tools/bench_prepare.py VIDEO          any talking video of half a minute or less

Decoding, LivePortrait's M and the audio encoder at their full sizes, with random weights: what they
compute is meaningless, the time is not. One process; several share a GPU, or the cores."""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from data import FRAME, RATE, AudioEncoder, find_device, load_audio, log_mel, pictures, run
from renderer import MotionExtractor, fold_for_inference, keep_memory


def timed(stage, work, seconds):
    """Print what a second of video takes -> that, and what the work gave."""
    began = time.perf_counter()
    result = work()
    taken = (time.perf_counter() - began) / seconds
    print(f"{stage:12} {taken:7.3f} s per second of video")
    return taken, result


@torch.inference_mode()
def main(argv):
    device = find_device("")
    keep_memory()
    motion = fold_for_inference(MotionExtractor(), device).eval()
    encoder = AudioEncoder().to(device)
    path, = argv
    wav = load_audio(path)
    seconds = len(wav) / RATE
    decoding, batches = timed("decoding", lambda: list(pictures(path, "")), seconds)
    extraction, _ = timed("M", lambda: [motion(images.to(device).movedim(-1, 1) / 255)["kp"].cpu()
                                        for images in batches], seconds)
    encoding, _ = timed("encoder", lambda: list(encoder.blocks([wav])), seconds)
    mel, _ = timed("log-mel", lambda: log_mel(wav[:len(wav) // FRAME * FRAME]), seconds)
    total = decoding + extraction + encoding + mel
    shares = [f"{100 * part / total:.0f} %" for part in (decoding, extraction, encoding, mel)]
    print(f"{1 / total:.3f} hours of video an hour: {', '.join(shares)}; {device}, "
          f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    run(main)
