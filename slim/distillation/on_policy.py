"""Generalised, on-policy distillation: the student learns on answers that it, or the teacher, has
just given.

Agarwal et al. (arXiv:2306.13649): with probability lambda the student answers a batch of questions,
else the teacher (there: the data) does; then both distributions are compared on every token of the
answers. No gradient goes through the drawing. The data gives questions only; whether the student
makes progress is measured on the teacher's most likely answers to questions that are kept apart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import Dataset

from slim.core.errors import SlimError
from slim.data.chat import turns
from slim.data.encoding import encode_pairs, end_token, render
from slim.data.examples import TRAIN, VALIDATION, Conversations
from slim.data.packing import IGNORE, Example, Windows, separate
from slim.distillation.generate import generate
from slim.distillation.module import Distilling
from slim.distillation.objective import LiveTeacher
from slim.distillation.tasks import DistillationTask
from slim.training.batches import MicroBatches, window_order
from slim.training.fit import autocast
from slim.training.module import Optimization

if TYPE_CHECKING:
    from slim.distillation.stage import Distillation

AT_ONCE = 64  # questions answered together for validation


class AnsweredBatches(Dataset):
    """Micro-batches of answers, made when the first one of an optimiser step is asked for.

    questions: their tokens, in the order of training. per_step: of these for a step, a multiple of
        ``accumulation``.
    answer: gives examples for some questions and the number of their step. pack: puts examples into
    windows."""

    def __init__(
        self,
        questions: list[list[int]],
        per_step: int,
        accumulation: int,
        answer: Callable[[list[list[int]], int], list[Example]],
        pack: Callable[[list[Example]], Windows],
    ):
        self.questions, self.per_step, self.accumulation = questions, per_step, accumulation
        self.answer, self.pack = answer, pack
        self.parts: list[Windows] = []

    def __len__(self) -> int:
        return len(self.questions) // self.per_step * self.accumulation

    def __getitem__(self, number: int) -> dict:
        step, part = divmod(number, self.accumulation)
        if part == 0:
            examples = self.answer(
                self.questions[step * self.per_step : (step + 1) * self.per_step], step
            )
            size = self.per_step // self.accumulation
            self.parts = [
                self.pack(examples[at : at + size]) for at in range(0, self.per_step, size)
            ]
        windows = self.parts[part]
        batch = MicroBatches(windows, torch.arange(len(windows)), len(windows))[0]
        return {
            **batch,
            "loss_tokens": sum(int(windows.loss_tokens.sum()) for windows in self.parts),
        }


class OnPolicyTask(DistillationTask):
    """Questions from the data, answers from the student, the teacher, or both."""

    def __init__(self, tuner: Distillation, *where):
        if not isinstance(tuner.data, Conversations):
            raise SlimError(
                f"{tuner.data.title} has no questions. Use data=tiny_chat, data=jsonl or other conversations."
            )
        self.teacher, self.student = None, None
        self.counts = {"too_long": 0}
        self.generated = {"answers": 0, "tokens": 0, "unfinished": 0, "seconds": 0.0}
        super().__init__(tuner, *where)

    def read_training(self) -> list[list[int]]:
        """Return the questions' tokens: as many as the steps need, or all where epochs are
        counted."""
        stage = self.tuner
        found = self.questions(TRAIN)
        found = list(
            found
            if stage.steps is None
            else islice(found, stage.steps * stage.generation.questions)
        )
        if not found:
            raise SlimError(
                f"{stage.data.title} gives no question that leaves room for an answer in teacher.window."
            )
        return found

    def questions(self, part: str) -> Iterator[list[int]]:
        """Yield questions that leave room for an answer, as tokens in the chat template, up to
        where the answer begins."""
        longest = self.tuner.window - self.tuner.generation.new_tokens
        for question in self.tuner.data.questions(part):
            text, ((start, _),) = render(self.tokenizer, turns(question, "x"))
            tokens = self.tokenizer(text[:start], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            if len(tokens) <= longest:
                yield tokens
            else:
                self.counts["too_long"] += 1

    def read_validation(self) -> Windows:
        """Return the teacher's most likely answers to questions that training does not ask."""
        self.teacher = self.tuner.teacher.load(self.device)
        examples: list[Example] = []
        questions = self.questions(VALIDATION)
        while some := list(islice(questions, AT_ONCE)):
            examples += self.answers(self.teacher, some, 0.0)
            if sum(len(example.tokens) for example in examples) >= self.tuner.validation_tokens:
                break
        if not examples:
            raise SlimError(f"{self.tuner.data.title} gives no question to validate on.")
        return self.pack(examples)

    def pack(self, examples: list[Example]) -> Windows:
        return separate(examples, self.tuner.window, end_token(self.tokenizer))

    @property
    def epoch_steps(self) -> float:
        return len(self.training) / self.tuner.generation.questions

    # Answers

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer: what the model says, and what the chat template puts behind an
        answer."""
        from slim.evaluation.generation import end_tokens

        last = next(iter(encode_pairs(self.tokenizer, [("x", "x")]))).tokens[-1]
        return {last, *end_tokens(self.teacher, self.tokenizer)}

    def answers(
        self, model: nn.Module, questions: list[list[int]], temperature: float
    ) -> list[Example]:
        """Let ``model`` answer; the tokens of the answers have labels."""
        with autocast(self.device, self.precision)():
            found = generate(
                model, questions, self.tuner.generation.new_tokens, self.ends, temperature
            )
        return [
            Example([*question, *answer], [*[IGNORE] * len(question), *answer])
            for question, answer in zip(questions, found, strict=True)
        ]

    def answer_step(self, questions: list[list[int]], step: int) -> list[Example]:
        """Answer the questions of an optimiser step, by whom the settings say."""
        begin = time.perf_counter()
        stage = self.tuner
        share = {"student": 1.0, "teacher": 0.0, "both": stage.generation.student_share}[
            stage.answers
        ]
        mine = random.Random(f"{stage.seed}/{step}").random() < share
        found = self.answers(
            self.student if mine else self.teacher, questions, stage.generation.temperature
        )
        self.generated["answers"] += len(found)
        self.generated["tokens"] += sum(len(example.tokens) for example in found)
        self.generated["unfinished"] += sum(
            example.tokens[-1] not in self.ends for example in found
        )
        self.generated["seconds"] += time.perf_counter() - begin
        return found

    # Training

    def live_teacher(self) -> LiveTeacher:
        self.teacher_loss = self.measure(self.teacher)
        return LiveTeacher(self.teacher, self.tuner.temperature, self.classes)

    def learner(self, model: nn.Module, optimisation: Optimization) -> Distilling:
        self.student = model
        return super().learner(model, optimisation)

    def micro_batches(self, steps: int) -> AnsweredBatches:
        stage = self.tuner
        order = window_order(len(self.training), steps * stage.generation.questions, stage.seed)
        questions = [self.training[index] for index in order.tolist()]
        return AnsweredBatches(
            questions, stage.generation.questions, stage.accumulation, self.answer_step, self.pack
        )

    def facts(self) -> dict:
        return {
            "questions": len(self.training),
            "data": {"train": self.counts, "validation": self.validation.counts},
            "generated": {name: round(value, 3) for name, value in self.generated.items()},
            **self.distillation_facts(),
        }
