"""How well an encoder tells the classes of texts apart: accuracy, macro F1, and whether its
confidence is what it is worth.

Macro F1 is the mean over classes of F1 = 2 TP / (2 TP + FP + FN), so a rare class counts as much as
a frequent one. The calibration error is the expected one over BINS bins of equal width of the
confidence (the probability of the predicted class): sum over bins of the share of texts in it times
|accuracy - mean confidence| (Guo et al., arXiv:1706.04599, eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import cache_key, require_choice, require_number
from slim.data.base import PARTS, TEST
from slim.data.labelled import Labelled, LabelledWindows
from slim.models.encoders import CLASSES

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")

BINS = 10


@dataclass
class Classification:
    """Measures a classifier on texts with labels.

    Attributes:
        data: The texts.
        part: Which of them: ``test``, ``validation`` or ``train``.
        window: Tokens of a text at most; longer ones are cut.
        limit: Texts from the start, 1 or more; None: all.
        batch_size: Texts at once; changes figures by rounding only.
    """

    cache_name: ClassVar[str] = "Classification"

    data: object = field(default=None)
    part: str = TEST
    window: int = 64
    limit: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.data, Labelled):
            raise SlimError(
                "eval=classification measures on texts with labels. Use data=headlines or "
                "data=labelled data.text=FILE.csv."
            )
        require_choice("eval.extra.classification.part", self.part, PARTS)
        require_number("eval.extra.classification.window", self.window, 4, integer=True)
        require_number("eval.extra.classification.batch_size", self.batch_size, 1, integer=True)
        if self.limit is not None:
            require_number("eval.extra.classification.limit", self.limit, 1, integer=True)

    def cache_key(self) -> dict:
        data = cache_key(self.data)
        # how much a class counts in training changes nothing here
        data.pop("class_weights", None)
        return {"data": data, "part": self.part, "window": self.window, "limit": self.limit}

    def check(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for a model that tells no classes apart, or others than the data's.

        Args:
            spec: The model.
        """
        if spec.top != CLASSES:
            what = "an encoder without a head for classes" if spec.is_encoder else "a decoder"
            raise SlimError(
                f"eval=classification measures classifiers, and {spec.name} is {what}.\n"
                "Use task=classification on train.py to make one of an encoder, or another eval."
            )
        self.data.check_classes(spec.labels, spec.name)

    def windows(self, tokenizer, names: list[str], context_length: int) -> LabelledWindows:
        """Return the texts as tokens.

        Args:
            tokenizer: The model's.
            names: The model's classes, in order.
            context_length: Tokens that the model has room for.
        """
        window = min(self.window, context_length)
        tokens = None if self.limit is None else self.limit * window
        return self.data.labelled(self.part, tokenizer, window, tokens, names)

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Return ``metrics``, ``protocol`` and ``records`` (a row per text: its class, the
        predicted one, the confidence in it, and whether it is right)."""
        names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
        windows = self.windows(tokenizer, names, context_length)
        probabilities = self.probabilities(model, windows)
        labels = windows.labels[:, 1].long()
        confidence, predicted = probabilities.max(1)
        correct = predicted == labels
        true = probabilities[torch.arange(len(labels)), labels]
        metrics = {
            "accuracy": correct.double().mean().item(),
            "macro_f1": macro_f1(labels.tolist(), predicted.tolist()),
            "calibration_error": calibration_error(confidence.tolist(), correct.tolist()),
            "class_nll": -true.double().clamp_min(1e-30).log().mean().item(),
        }
        if not torch.isfinite(probabilities).all():
            metrics = dict.fromkeys(metrics, float("nan"))
        protocol = {
            "data": cache_key(self.data).get("class"),
            "part": self.part,
            "texts": len(labels),
            "window": min(self.window, context_length),
            "classes": len(names),
        }
        records = {
            "class": [names[label] for label in labels.tolist()],
            "predicted": [names[label] for label in predicted.tolist()],
            "confidence": [round(value, 6) for value in confidence.tolist()],
            "correct": [int(value) for value in correct.tolist()],
        }
        return {"metrics": metrics, "protocol": protocol, "records": records}

    def probabilities(self, model, windows: LabelledWindows) -> torch.Tensor:
        """Return the probabilities of the classes, float32 [texts, classes], on the CPU.

        Args:
            model: The classifier.
            windows: The texts.
        """
        # texts of like length together: the least filling up
        order = (windows.tokens != windows.pad).sum(1).argsort(stable=True)
        parts = []
        for chosen in track(order.split(self.batch_size), "classes"):
            batch = windows.batch(chosen)
            inputs = {"input_ids": batch["tokens"], "attention_mask": batch["mask"]}
            if "types" in batch:
                inputs["token_type_ids"] = batch["types"]
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            parts.append(model(**inputs).logits.float().softmax(-1).cpu())
        probabilities = torch.cat(parts)
        return probabilities[order.argsort()]


def macro_f1(labels: list[int], predicted: list[int]) -> float:
    """Return the mean F1 of the classes that occur, among the labels or the predictions.

    Args:
        labels: True classes.
        predicted: As many predicted ones.
    """
    scores = []
    for name in sorted({*labels, *predicted}):
        pairs = list(zip(labels, predicted, strict=True))
        hits = sum(true == name and guess == name for true, guess in pairs)
        wrong = sum((true == name) != (guess == name) for true, guess in pairs)
        scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores)


def calibration_bins(confidence: list[float], correct: list[int]) -> list[tuple[int, float, float]]:
    """Return for each bin of the confidence that holds texts: how many, their mean confidence and
    their accuracy.

    Args:
        confidence: Probability of the predicted class, of each text.
        correct: Whether it was right.
    """
    members: dict[int, list[int]] = {}
    for index, value in enumerate(confidence):
        members.setdefault(min(BINS - 1, int(value * BINS)), []).append(index)
    bins = []
    for number in sorted(members):
        chosen = members[number]
        mean = sum(confidence[index] for index in chosen) / len(chosen)
        share = sum(correct[index] for index in chosen) / len(chosen)
        bins.append((len(chosen), mean, share))
    return bins


def calibration_error(confidence: list[float], correct: list[int]) -> float:
    """Return the expected calibration error.

    Args:
        confidence: Probability of the predicted class, of each text.
        correct: Whether it was right.
    """
    total = 0.0
    for count, mean, share in calibration_bins(confidence, correct):
        total += count * abs(share - mean)
    return total / len(confidence)
