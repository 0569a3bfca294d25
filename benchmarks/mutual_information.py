"""Every estimator of `pipeline.objectives.mutual_information` on Gaussians of known information: a table of docs/experiments.md.

    python benchmarks/mutual_information.py --seeds 10

x ~ N(0, 1) in each of 10 dimensions, y = rho x + sqrt(1 - rho^2) e, so I = -5 ln(1 - rho^2). Networks learn on fresh batches,
and the estimate is the mean over fresh batches of the same size. CLUB and CLUBSample are to be held against CLUB's closed form,
D rho^2 / (1 - rho^2), the others against I.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.objectives.mutual_information import CLUB, MINE, NWJ, SMILE, Bound, CLUBSample, Gaussian, InfoNCE, L1Out, Separable

D, HIDDEN = 10, 64
NATS = (0.0, 1.0, 2.0, 4.0, 6.0)
BATCH, STEPS, LEARNING_RATE = 256, 300, 3e-3
FRESH_BATCHES = 64
ESTIMATORS: dict[str, Callable[[], Bound]] = {
    "InfoNCE": lambda: InfoNCE(Separable(D, D, HIDDEN)),
    "NWJ": lambda: NWJ(Separable(D, D, HIDDEN)),
    "MINE": lambda: MINE(Separable(D, D, HIDDEN)),
    "SMILE": lambda: SMILE(Separable(D, D, HIDDEN)),
    "L1Out": lambda: L1Out(Gaussian(D, D, HIDDEN)),
    "CLUB": lambda: CLUB(Gaussian(D, D, HIDDEN)),
    "CLUBSample": lambda: CLUBSample(Gaussian(D, D, HIDDEN)),
}


def squared_correlation(nats: float) -> float:
    """rho^2 a dimension at which D-dimensional Gaussians share so many nats."""
    return 1 - math.exp(-2 * nats / D)


def closed_form(nats: float) -> float:
    """What CLUB is for them."""
    square = squared_correlation(nats)
    return D * square / (1 - square)


def gaussians(count: int, nats: float) -> tuple[Tensor, Tensor]:
    """(N, D) twice."""
    square = squared_correlation(nats)
    x = torch.randn(count, D)
    return x, math.sqrt(square) * x + math.sqrt(1 - square) * torch.randn(count, D)


def learn(bound: Bound, draw: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Trains the networks of `bound` on fresh pairs. Gradients are clipped for the sake of NWJ."""
    parameters = [parameter for _, parameter in bound.named_parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        bound.learning_loss(*draw()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def measured(name: str, nats: float, seed: int) -> float:
    torch.manual_seed(seed)
    bound = ESTIMATORS[name]()
    learn(bound, lambda: gaussians(BATCH, nats))
    with torch.no_grad():
        return float(np.mean([float(bound.estimate(*gaussians(BATCH, nats))) for _ in range(FRESH_BATCHES)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    print(f"Mean ± standard deviation over {len(seeds)} seeds; N = {BATCH}, log N = {math.log(BATCH):.2f}.\n")
    print(f"| I | {' | '.join(ESTIMATORS)} | CLUB's closed form |\n|{' --- |' * (len(ESTIMATORS) + 2)}")
    for nats in NATS:
        found = [np.array([measured(name, nats, seed) for seed in seeds]) for name in ESTIMATORS]
        cells = [f"{of.mean():.2f} ± {of.std(ddof=1) if len(of) > 1 else 0:.2f}" for of in found]
        print(f"| {nats:g} | {' | '.join(cells)} | {closed_form(nats):.2f} |", flush=True)


if __name__ == "__main__":
    main()
