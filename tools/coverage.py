"""Count how often 95 % intervals hold the true mean: the one that evaluation.statistics states, and others.

Usage:
    coverage [--samples=<n>]

Options:
    --samples=<n>  Simulated experiments per row [default: 2000].
    -h --help      Show this.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import bootstrap, t
from tqdm import tqdm

from evaluation.statistics import summarise
from run.cli import Arguments, Count, arguments_of, command_line

RESAMPLES = 999
# What is drawn, as (runs, seeds, 1), and its true mean.
CASES: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda g, n: g.normal(size=(n, 1, 1)), 0.0),
    "success .8, 100 episodes a run": (lambda g, n: 1.0 * (g.random((n, 100, 1)) < 0.8), 0.8),
    "success .98, 50 episodes a run": (lambda g, n: 1.0 * (g.random((n, 50, 1)) < 0.98), 0.98),
    "success of a run: beta(8, 2)": (lambda g, n: 1.0 * (g.random((n, 50, 1)) < g.beta(8, 2, (n, 1, 1))), 0.8),
    "success of a run: beta(9.5, .5)": (lambda g, n: 1.0 * (g.random((n, 50, 1)) < g.beta(9.5, 0.5, (n, 1, 1))), 0.95),
    "success .8, n seeds of one run": (lambda g, n: 1.0 * (g.random((1, n, 1)) < 0.8), 0.8),
    "lognormal, σ = .5": (lambda g, n: g.lognormal(0, 0.5, (n, 1, 1)), float(np.exp(0.125))),
    "exponential": (lambda g, n: g.exponential(size=(n, 1, 1)), 1.0),
    "lognormal, σ = 1": (lambda g, n: g.lognormal(0, 1, (n, 1, 1)), float(np.exp(0.5))),
}


def intervals(scores: np.ndarray) -> Iterator[tuple[str, float, float]]:
    """Yield name, low and high of each interval; where all values are equal, the others have none but the mean."""
    found = summarise(scores)
    yield "**stated here**", found["low"], found["high"]
    values = scores.mean(axis=(1, 2)) if len(scores) > 1 else scores[0, :, 0]
    n, mean, std = len(values), values.mean(), values.std(ddof=1)
    yield "t", *(mean + t.ppf((0.025, 0.975), n - 1) * std / np.sqrt(n))
    drawn = values[np.random.default_rng(0).integers(0, n, (RESAMPLES, n))]
    yield "percentile", *np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    drawn = drawn[np.ptp(drawn, axis=1) > 0]  # others have no t
    ratios = (drawn.mean(axis=1) - mean) / drawn.std(axis=1, ddof=1) if len(drawn) else np.zeros(1)
    yield "studentised", *(mean - np.quantile(ratios, (0.975, 0.025)) * std)
    bca = bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=0).confidence_interval if std else (mean, mean)
    yield "BCa", *bca


class Given(Arguments):
    """What the docstring says."""

    samples: Count


def main() -> None:
    """Print a Markdown table: of each interval how often it holds the mean, and its median width over that of t."""
    samples, rows = arguments_of(__doc__, Given).samples, []
    for n, name in tqdm([(n, name) for name in CASES for n in (3, 5, 10)]):
        draw, mean = CASES[name]
        generator = np.random.default_rng(n)
        found = [list(intervals(draw(generator, n))) for _ in range(samples)]
        bounds = np.array([[bounds for _, *bounds in sample] for sample in found])
        names, held = [method for method, *_ in found[0]], (bounds[..., 0] <= mean) & (mean <= bounds[..., 1])
        widths = np.median(bounds[..., 1] - bounds[..., 0], axis=0)
        cells = [
            f"{100 * share:.1f}" + (f" ({width / widths[1]:.2f})" if widths[1] else "")
            for share, width in zip(held.mean(axis=0), widths, strict=True)
        ]
        rows.append(f"| {name} | {n} | {' | '.join(cells)} |")
    print(f"| scores | n | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}", *rows, sep="\n")


if __name__ == "__main__":
    command_line(main)
