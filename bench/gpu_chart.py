"""The chart of bench.gpu: captions a second and latency over batch size."""

from __future__ import annotations

from pathlib import Path

# What is drawn: the ends of the figures' names, and what the legend calls them.
SERIES = {
    "float16": "this suite, float16",
    "FP8, ViT too": "this suite, FP8",
    "float16, transformers": "transformers, float16",
}


def draw(figures: dict[str, float | str], batches: list[int], path: Path) -> None:
    """A line for each of SERIES that was measured with all `batches`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for end, label in SERIES.items():
        names = [f"{batch} pictures to 20 tokens, {end}" for batch in batches]
        if not all(name in figures for name in names):
            continue
        ms = [figures[name] for name in names]
        rates = [batch / each * 1e3 for batch, each in zip(batches, ms, strict=True)]
        left.plot(batches, rates, "o-", label=label)
        right.plot(batches, ms, "o-", label=label)
    left.set(ylabel="captions of 20 tokens / s", ylim=(0, None))
    right.set(ylabel="ms a batch", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, batches)
        axes.set_xlabel("pictures a batch")
        axes.grid(alpha=0.3)
    right.legend()
    figure.suptitle(f"BLIP-2 OPT-2.7B, {figures['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
