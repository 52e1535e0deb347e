"""Which step of a training counts: the best on validation images, or the last. The test split never chooses."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.loop import Loop


class Best:
    """Scores a training at evenly spread steps, the last at its end, and keeps the weights of the best validation.

    weights: {name: tensor} of all that the training changes, the tensors themselves. score(split) -> percent; all
    processes of the loop's team call it. splits: what is scored at each look. "val" decides; without it the last look
    does. What is remembered lies in the loop's checkpoint.
    """

    def __init__(
        self,
        loop: Loop,
        weights: dict[str, torch.Tensor],
        looks: int,
        score: Callable[[str], float],
        splits: Sequence[str],
    ):
        self.loop, self.weights, self.score, self.splits = loop, weights, score, splits
        self.steps = {math.ceil(loop.total * (i + 1) / looks) for i in range(looks)}
        loop.extra = loop.extra or {"history": [], "best": None}

    def look(self, step: int) -> None:
        """Score the splits if it is time. step: updates done so far."""
        if step not in self.steps:
            return
        row, extra = {split: self.score(split) for split in self.splits}, self.loop.extra
        self.loop.run.log(step, **{f"{self.loop.chart}/{split}": value for split, value in row.items()})
        extra["history"].append({"step": step, **row})
        best = extra["best"]
        if best is None or "val" not in row or row["val"] > best["val"]:
            extra["best"] = {"step": step, "val": row.get("val")}
            self.loop.tensors = {name: x.detach().to("cpu", copy=True) for name, x in self.weights.items()}
        self.loop.save()

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """After the last step: the figures of the chosen step, whose weights loop.tensors holds, for metrics.json.

        history, best_step, val, test (at the chosen step), last_epoch_test; where the test split was scored at every
        look, test_selected too, its best. The network may have either step's weights afterwards.
        """
        best, history = self.loop.extra["best"], self.loop.extra["history"]
        test_at = {row["step"]: row["test"] for row in history if "test" in row}
        found = {"test_selected": max(test_at.values())} if test_at else {}
        for step in (self.loop.total, best["step"]):
            if step not in test_at:
                for name, tensor in self.weights.items() if step != self.loop.total else ():
                    tensor.copy_(self.loop.tensors[name])
                test_at[step] = self.score("test")
        found |= {"test": test_at[best["step"]], "last_epoch_test": test_at[self.loop.total]}
        return found | {"history": history, "best_step": best["step"], "val": best["val"]}
