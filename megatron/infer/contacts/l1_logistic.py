"""Logistic regression with an L1 penalty, fitted to the optimum by proximal Newton steps, as in glmnet and liblinear.

Each step minimises the loss's quadratic approximation plus the penalty by coordinate descent on the Hessian (Lee, Sun
and Saunders, 2014, arXiv 1206.1623). Shapes: p pairs (examples), f features.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROWS_AT_ONCE = 1 << 14  # examples that are converted to fp64 together
MAX_STEPS, MAX_SWEEPS, MAX_HALVINGS = 50, 200, 20
SUFFICIENT = 0.01  # share of the predicted decrease that a step must reach (Armijo's condition)


def fit(features: Sequence[Tensor], labels: Sequence[Tensor], c: float, tolerance: float = 1e-3) -> Tensor:
    """The weights followed by the bias, fp64 [f + 1], that minimise |w|₁ + c Σ log loss; the bias is not penalised.

    `features` [p, f] and `labels` [p], bool, are lists of chunks, none of which is copied whole. `tolerance`: the
    largest violation of the optimality conditions at which fitting stops, where the penalty's slope is 1.
    """
    penalty = np.append(np.ones(features[0].shape[1]), 0.0)
    share = float(torch.cat(list(labels)).double().mean().clamp(1e-9, 1 - 1e-9))
    theta = np.append(np.zeros(features[0].shape[1]), np.log(share / (1 - share)))
    loss, gradient, hessian = _derivatives(features, labels, c, theta)
    for _ in range(MAX_STEPS):
        if violation(theta, gradient, penalty) <= tolerance:
            break
        step = _newton_step(theta, gradient, hessian, penalty)
        before = loss + penalty @ np.abs(theta)
        fall = gradient @ step + penalty @ (np.abs(theta + step) - np.abs(theta))
        for size in 0.5 ** np.arange(MAX_HALVINGS):
            tried = theta + size * step
            loss, gradient, hessian = _derivatives(features, labels, c, tried)
            if loss + penalty @ np.abs(tried) <= before + SUFFICIENT * size * fall:
                break
        theta = tried
    return torch.from_numpy(theta)


def violation(theta: np.ndarray, gradient: np.ndarray, penalty: np.ndarray) -> float:
    """The largest component, in absolute value, of the subgradient of loss plus penalty that is closest to 0."""
    at_zero = np.maximum(np.abs(gradient) - penalty, 0)
    return float(np.where(theta == 0, at_zero, np.abs(gradient + penalty * np.sign(theta))).max())


def _derivatives(features: Sequence[Tensor], labels: Sequence[Tensor], c: float,
                 theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """c times the summed loss, its gradient [f + 1] and its Hessian [f + 1, f + 1]."""
    weights, size = torch.from_numpy(theta), len(theta)
    loss, gradient, hessian = 0.0, torch.zeros(size).double(), torch.zeros(size, size).double()
    for x, y in _pieces(features, labels):
        logits = x @ weights
        chance = logits.sigmoid()
        loss += float(F.softplus(logits).sum() - logits @ y)
        gradient += (chance - y) @ x
        hessian += (x * (chance * (1 - chance))[:, None]).T @ x
    return c * loss, c * gradient.numpy(), c * hessian.numpy()


def _pieces(features: Sequence[Tensor], labels: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of the features with a column of ones appended, and of the labels, both in fp64."""
    for whole, labels_of_whole in zip(features, labels, strict=True):
        for x, y in zip(whole.split(ROWS_AT_ONCE), labels_of_whole.split(ROWS_AT_ONCE), strict=True):
            yield F.pad(x.double(), (0, 1), value=1.0), y.double()


def _newton_step(theta: np.ndarray, gradient: np.ndarray, hessian: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """The step from `theta` to the minimum of the quadratic approximation plus the penalty, by coordinate descent."""
    new, slope, widths = theta.copy(), gradient.copy(), hessian.diagonal()
    for _ in range(MAX_SWEEPS):
        farthest = 0.0
        for place in np.flatnonzero(widths > 0):
            width = widths[place]
            target = new[place] - slope[place] / width
            moved = np.sign(target) * max(abs(target) - penalty[place] / width, 0.0) - new[place]
            if moved:
                new[place] += moved
                slope += hessian[place] * moved
                farthest = max(farthest, abs(moved) * width)
        if farthest < 1e-6:
            break
    return new - theta
