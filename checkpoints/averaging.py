"""Averages of the weights of several checkpoints of one model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.errors import UserError, some

Weights = dict[str, Tensor]


def average(every: Sequence[Weights]) -> Weights:
    """Return the mean of state dicts, in float64 before rounding to their types.

    Integers, such as the counts of batch norms, are those of the last. UserError if names or shapes
    differ, or a weight is not finite.
    """
    first, *others = ({name: w.shape for name, w in weights.items()} for weights in every)
    for shapes in others:
        other = {name for name, _ in first.items() ^ shapes.items()}
        if other:
            raise UserError(
                f"the checkpoints are of different models: {some(sorted(other))} differ"
            )
    result = {}
    for name, last in every[-1].items():
        if last.is_floating_point() or last.is_complex():
            total = torch.zeros_like(last, dtype=torch.promote_types(last.dtype, torch.float64))
            for weights in every:
                total += weights[name]
            result[name] = (total / len(every)).to(last.dtype)
            if not result[name].isfinite().all():
                raise UserError(f"the average of {name} is not finite")
        else:
            result[name] = last.clone()
    return result


def greedy_soup(
    every: Sequence[Weights], accuracy_of: Callable[[Weights], float]
) -> tuple[Weights, list[int], list[float], float]:
    """Average those that do not lower the accuracy of the average, tried from the best one on.

    (Wortsman et al., Model soups, arXiv 2203.05482, recipe 1.)

    Returns the average, the numbers of those in it, the accuracy of each, and that of the average.
    """
    accuracies = [accuracy_of(weights) for weights in every]
    order = sorted(range(len(every)), key=lambda i: -accuracies[i])
    chosen, soup, best = order[:1], every[order[0]], accuracies[order[0]]
    for number in order[1:]:
        tried = average([every[i] for i in (*chosen, number)])
        accuracy = accuracy_of(tried)
        if accuracy >= best:
            chosen, soup, best = [*chosen, number], tried, accuracy
    return soup, chosen, accuracies, best
