"""Attention to columns of which many groups of queries have copies: these are made again for the gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def columns_of(items: Tensor | None, rows: Tensor | None, written: Tensor | None) -> Tensor:
    """Return the columns (groups, K, D) that `Attend` takes in parts."""
    if items is None:
        return written
    stored = items if rows is None else F.embedding(rows, items)
    return stored if written is None else torch.cat((stored, written), dim=1)


class Attend(torch.autograd.Function):
    """Scores, their softmax, and the mixtures of the columns by it.

    Autograd would keep the columns of each block until its gradient is computed; they are two fifths of all that it
    keeps. Here it keeps where they lie.
    """

    @staticmethod
    def forward(
        context: Any, questions: Tensor, bias: Tensor, items: Tensor | None, rows: Tensor | None, written: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return mixtures (groups, Q, D) and weights (groups, Q, K), which are for looking at: without a gradient.

        Args:
            questions: (groups, Q, D).
            bias: (groups, Q, K) added to the scores.
            items: (groups, K', D) the first columns of each group, constant; or (n, D) of which `rows` says which.
            rows: (groups, K') int64, or None.
            written: (groups, K − K', D) the other columns, which have a gradient; None where there are none.
        """
        columns = columns_of(items, rows, written)
        weights = torch.baddbmm(bias, questions, columns.mT).softmax(dim=2)
        context.save_for_backward(questions if written is not None else None, weights, items, rows, written)
        context.low = torch.is_autocast_enabled(questions.device.type)
        context.mark_non_differentiable(weights)
        context.set_materialize_grads(False)
        return torch.bmm(weights, columns), weights

    @staticmethod
    def backward(context: Any, slope: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to questions, bias and written columns for that of the mixtures."""
        questions, weights, *parts = context.saved_tensors
        columns, of_written = columns_of(*parts), None
        with torch.autocast(slope.device.type, torch.bfloat16, enabled=context.low):
            of_weights = torch.bmm(slope, columns.mT).to(weights.dtype)
            of_scores = torch._softmax_backward_data(of_weights, weights, 2, weights.dtype)
            of_questions = torch.bmm(of_scores, columns)
            if questions is not None:
                of_written = torch.bmm(weights.mT, slope) + torch.bmm(of_scores.mT, questions)
                of_written = of_written[:, -parts[-1].shape[1] :]
        return of_questions, of_scores, None, None, of_written
