"""The paper's claims at toy scale: every variant is trained with a few seeds, then measured on clips it never saw.

    python tests/ablate.py                      about half an hour on two cores; what is trained already is not again

    --steps=500      of each training
    --clips=100      toy clips to learn from
    --batch_size=8
    --seeds=3
    --eval_clips=6   unseen clips per table: sampling them costs as much time as training
    --out=out/ablate checkpoints, logs and rows.json
    --plots=assets   where plots go, if matplotlib is installed

One table for each claim, mean ± standard deviation over seeds. Where two spreads meet, the variants do not separate.
"""
import contextlib
import csv
import functools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample
import train
from data import ToyTalker, parse_flags
from moda import read_tensors

talker = functools.lru_cache(ToyTalker)            # clip k is always the same
EXPERT = "--alse={out}/expert/ckpt.pt"
# claim -> variant: what training is given, what sampling is given; {} and {} is the base of all
CLAIMS = {
    "fusion, Table 3": {"c2f": ([], []), "four-stream only": (["--fusion=four"], []),
                        "cross-attention": (["--fusion=cross"], [])},
    "Euler steps": {str(n): ([], [f"--steps={n}"]) for n in (1, 2, 5, 10, 20, 40)},
    "audio guidance, Eq. 8": {str(x): ([], [f"--cfg_audio={x}"]) for x in (0, 0.2, 0.5, 1, 2)},
    "emotion": {"in AdaLN and as a stream": ([], []), "as a stream only": (["--emotion_adaln=False"], [])},
    "sync loss, Eq. 7": {"without ALSE": ([], []), "tau 0.4": ([EXPERT, "--tau=0.4"], []),
                         "no gate": ([EXPERT, "--tau=99"], [])},
}


def trained(flags, name, *args):
    """Folder of a finished training; it is done unless there is one."""
    out = Path(flags["out"]) / name
    if not (out / "ckpt.pt").exists() or read_tensors(out / "ckpt.pt")["step"] != flags["steps"]:
        args = [arg.format(out=flags["out"]) for arg in args]
        train.main([f"--out_dir={out}", f"--steps={flags['steps']}", f"--clips={flags['clips']}", "--eval_clips=0",
                    f"--batch_size={flags['batch_size']}", "--p_drop_audio=0.2", *args])
    return out


@functools.lru_cache(None)
def measured(ckpt, alse, *args):
    """The table of sample.py --eval, as {row: {column: number}}."""
    with contextlib.redirect_stdout(None):
        return sample.main([f"--ckpt={ckpt}", f"--alse={alse}", "--eval", *args])


def row_of(flags, seed, training, sampling):
    """All that is known of one variant under one seed."""
    name = "_".join([arg.strip("-").replace("/", "").replace("{out}", "") for arg in training] + [f"seed{seed}"])
    out = trained(flags, name, *training, f"--seed={seed}")
    table = measured(out / "ckpt.pt", Path(flags["out"]) / "expert/ckpt.pt", *sampling)
    with open(out / "log.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    size = sum(x.numel() for x in read_tensors(out / "ckpt.pt")["model"].values()) / 1e6
    return table["model"] | {"corr, other voice": table["shuffled audio"]["mouth corr"],
                             "ms per step": 1e3 * statistics.median(seconds), "M parameters": size}


def spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def show(claim, variants):
    """A table in Markdown."""
    columns = list(next(iter(variants.values()))[0])
    print(f"\n| {claim} | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for variant, rows in variants.items():
        formats = ["{:.2f}" if key == "M parameters" else "{:.3f} ± {:.3f}" for key in columns]
        cells = [text.format(*spread([row[key] for row in rows])) for text, key in zip(formats, columns)]
        print(f"| {variant} | {' | '.join(cells)} |")


def plot(path, claim, variants):
    """A small panel for each quantity: a dot for each seed, a bar at their mean."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = [key for key in next(iter(variants.values()))[0] if key != "M parameters"]
    figure, panels = plt.subplots(1, len(columns), figsize=(2.1 * len(columns), 2.8), layout="constrained")
    for panel, key in zip(panels, columns):
        for x, rows in enumerate(variants.values()):
            values = [row[key] for row in rows]
            panel.plot([x] * len(values), values, "o", color="#c83c3c", alpha=0.6, markersize=4)
            panel.plot([x - 0.3, x + 0.3], 2 * [statistics.mean(values)], color="#505050")
        panel.set_title(key, fontsize=9)
        panel.set_xticks(range(len(variants)), list(variants), rotation=60, ha="right", fontsize=7)
        panel.tick_params(axis="y", labelsize=7)
    figure.suptitle(claim, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv):
    flags = parse_flags(__doc__, argv)
    train.ToyTalker, sample.ToyTalker = talker, lambda split, clips: talker(split, flags["eval_clips"])
    trained(flags, "expert", "--model=alse")
    seeds = range(1, flags["seeds"] + 1)
    results = {claim: {variant: [row_of(flags, seed, *args) for seed in seeds] for variant, args in variants.items()}
               for claim, variants in CLAIMS.items()}
    (Path(flags["out"]) / "rows.json").write_text(json.dumps(results, indent=1))
    for number, (claim, variants) in enumerate(results.items(), 1):
        show(claim, variants)
        with contextlib.suppress(ImportError):
            Path(flags["plots"]).mkdir(exist_ok=True)
            plot(Path(flags["plots"]) / f"claim{number}.png", claim, variants)


if __name__ == "__main__":
    main(sys.argv[1:])
