"""Draws what `bench_step.py` has measured, `runs/bench/phases.png`: the time of a step by phase, TRL's step, and the floor.

python tests/benchmarks/picture.py"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RUNS = Path(__file__).parents[2] / "runs" / "bench"


def main():
    steps = [json.loads(path.read_text()) for path in sorted(RUNS.glob("step, *.json"))]
    if not steps:
        print(f"no steps have been measured: {RUNS} holds none")
        return
    figure, axis = plt.subplots(figsize=(9, 1 + 0.55 * len(steps)), layout="constrained")
    phases = [phase for phase in steps[0]["ours"] if phase != "all"]
    for i, step in enumerate(steps):
        whole, start = step["ours"]["all"], 0.0
        for phase, colour in zip(phases, plt.cm.viridis([0.25, 0.55, 0.85]), strict=True):
            share = step["ours"][phase] / whole
            axis.barh(i - 0.18, share, 0.34, left=start, color=colour, label=phase if i == 0 else None)
            start += share
        if step["other"]:
            axis.barh(i + 0.18, step["other"] / whole, 0.34, color="0.75", label="TRL's RLOO" if i == 0 else None)
        axis.plot(
            [step["floor"] / whole] * 2, [i - 0.36, i], color="crimson", label="matrix products" if i == 0 else None
        )
    axis.set_yticks(range(len(steps)), [f"{step['case']}, {step['threads']} threads" for step in steps])
    axis.invert_yaxis()
    axis.set_xlabel("time of a step, in multiples of ours")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    figure.savefig(RUNS / "phases.png", dpi=120)
    print(RUNS / "phases.png")


if __name__ == "__main__":
    main()
