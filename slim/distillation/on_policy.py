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

import torch
from torch import nn
from torch.utils.data import Dataset

from slim.checkpoints.checkpoint import Checkpoint
from slim.core.errors import SlimError
from slim.data.chat import turns
from slim.data.encoding import encode_pairs, end_token, render
from slim.data.examples import TRAIN, VALIDATION, Conversations
from slim.data.packing import IGNORE, Example, Windows, separate
from slim.distillation.generate import generate
from slim.distillation.module import Distilling
from slim.distillation.objective import LiveTeacher
from slim.distillation.plan import DistillationPlan
from slim.distillation.tasks import DistillationTask
from slim.evaluation.generation import end_tokens
from slim.training.batches import MicroBatches, window_order
from slim.training.fit import autocast
from slim.training.module import Optimization

AT_ONCE = 64  # questions answered together for validation


class AnsweredBatches(Dataset):
    """Micro-batches of answers, made when the first one of an optimiser step is asked for."""

    def __init__(
        self,
        questions: list[list[int]],
        per_step: int,
        accumulation: int,
        answer: Callable[[list[list[int]], int], list[Example]],
        pack: Callable[[list[Example]], Windows],
    ):
        """Ask nothing yet.

        Args:
            questions: Their tokens, in the order of training.
            per_step: Questions per optimiser step, a multiple of ``accumulation``.
            accumulation: Micro-batches per optimiser step.
            answer: Gives examples for some questions and the number of their step.
            pack: Puts examples into windows.
        """
        self.questions = questions
        self.per_step = per_step
        self.accumulation = accumulation
        self.answer = answer
        self.pack = pack
        self.parts: list[Windows] = []

    def __len__(self) -> int:
        return len(self.questions) // self.per_step * self.accumulation

    def __getitem__(self, number: int) -> dict:
        step, part = divmod(number, self.accumulation)
        if part == 0:
            self.parts = self._answered(step)
        windows = self.parts[part]
        batch = MicroBatches(windows, torch.arange(len(windows)), len(windows))[0]
        # Every token weighs the same whichever micro-batch of the step it is in.
        loss_tokens = sum(int(windows.loss_tokens.sum()) for windows in self.parts)
        return {**batch, "loss_tokens": loss_tokens}

    def _answered(self, step: int) -> list[Windows]:
        """Answer the questions of a step, in as many parts as it has micro-batches."""
        first = step * self.per_step
        examples = self.answer(self.questions[first : first + self.per_step], step)
        size = self.per_step // self.accumulation
        return [self.pack(examples[at : at + size]) for at in range(0, self.per_step, size)]


class OnPolicyTask(DistillationTask):
    """Questions from the data, answers from the student, the teacher, or both.

    Attributes:
        teacher: The teacher.
        student: The model in training; None before it is there.
        counts: ``too_long``: questions that leave no room for an answer.
        generated: ``answers``, ``tokens``, ``unfinished`` and ``seconds`` of the training.
    """

    def __init__(self, plan: DistillationPlan, checkpoint: Checkpoint, device: str, precision: str):
        if not isinstance(plan.data, Conversations):
            raise SlimError(
                f"{plan.data.title} has no questions. "
                "Use data=tiny_chat, data=jsonl or other conversations."
            )
        self.teacher: nn.Module | None = None
        self.student: nn.Module | None = None
        self.counts = {"too_long": 0}
        self.generated = {"answers": 0, "tokens": 0, "unfinished": 0, "seconds": 0.0}
        super().__init__(plan, checkpoint, device, precision)

    def read_training(self) -> list[list[int]]:
        """Return the questions' tokens: as many as the steps need, or all where epochs are
        counted."""
        plan = self.plan
        needed = None if plan.steps is None else plan.steps * plan.generation.questions
        questions = list(islice(self.questions(TRAIN), needed))
        if not questions:
            raise SlimError(
                f"{plan.data.title} gives no question that leaves room for an answer in "
                "teacher.window. Use a longer window, or fewer teacher.generation.new_tokens."
            )
        return questions

    def questions(self, part: str) -> Iterator[list[int]]:
        """Yield questions that leave room for an answer, as tokens in the chat template, up to
        where the answer begins.

        Args:
            part: ``TRAIN`` or ``VALIDATION``.
        """
        longest = self.plan.window - self.plan.generation.new_tokens
        title = self.plan.data.title
        for question in self.plan.data.questions(part):
            text, ((start, _),) = render(self.tokenizer, turns(question, "x"), where=title)
            encoded = self.tokenizer(text[:start], add_special_tokens=False, verbose=False)
            tokens = encoded["input_ids"]
            if len(tokens) <= longest:
                yield tokens
            else:
                self.counts["too_long"] += 1

    def read_validation(self) -> Windows:
        """Return the teacher's most likely answers to questions that training does not ask."""
        self.teacher = self.plan.teacher.load(self.device)
        examples: list[Example] = []
        tokens = 0
        questions = self.questions(VALIDATION)
        while some := list(islice(questions, AT_ONCE)):
            answered = self.answers(self.teacher, some, temperature=0.0)
            examples += answered
            tokens += sum(len(example.tokens) for example in answered)
            if tokens >= self.plan.validation_tokens:
                break
        if not examples:
            raise SlimError(f"{self.plan.data.title} gives no question to validate on.")
        return self.pack(examples)

    def pack(self, examples: list[Example]) -> Windows:
        """Put examples into windows, several in one.

        Args:
            examples: Questions with their answers.
        """
        return separate(examples, self.plan.window, end_token(self.tokenizer))

    @property
    def epoch_steps(self) -> float:
        return len(self.training) / self.plan.generation.questions

    # Answers

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer: what the model says, and what the chat template puts after an
        answer."""
        last = next(iter(encode_pairs(self.tokenizer, [("x", "x")]))).tokens[-1]
        return {last, *end_tokens(self.teacher, self.tokenizer)}

    def answers(
        self, model: nn.Module, questions: list[list[int]], temperature: float
    ) -> list[Example]:
        """Let a model answer; the tokens of the answers have labels.

        Args:
            model: Teacher or student.
            questions: Their tokens.
            temperature: Answers are drawn from the distribution softened by it; 0: the most likely
                token each time.
        """
        longest = self.plan.generation.new_tokens
        with autocast(self.device, self.precision)():
            answers = generate(model, questions, longest, self.ends, temperature)
        return [
            Example([*question, *answer], [*[IGNORE] * len(question), *answer])
            for question, answer in zip(questions, answers, strict=True)
        ]

    def answer_step(self, questions: list[list[int]], step: int) -> list[Example]:
        """Answer the questions of an optimiser step, by whom the settings say.

        Args:
            questions: Their tokens.
            step: Number of the step; with the seed it decides who answers.
        """
        begin = time.perf_counter()
        plan = self.plan
        shares = {"student": 1.0, "teacher": 0.0, "both": plan.generation.student_share}
        by_student = random.Random(f"{plan.seed}/{step}").random() < shares[plan.answers]
        answering = self.student if by_student else self.teacher
        examples = self.answers(answering, questions, plan.generation.temperature)
        ends = self.ends
        self.generated["answers"] += len(examples)
        self.generated["tokens"] += sum(len(example.tokens) for example in examples)
        self.generated["unfinished"] += sum(example.tokens[-1] not in ends for example in examples)
        self.generated["seconds"] += time.perf_counter() - begin
        return examples

    # Training

    def live_teacher(self) -> LiveTeacher:
        self.teacher_loss = self.measure(self.teacher)
        return LiveTeacher(self.teacher, self.plan.temperature, self.classes)

    def learner(self, model: nn.Module, optimisation: Optimization) -> Distilling:
        self.student = model
        return super().learner(model, optimisation)

    def micro_batches(self, steps: int) -> AnsweredBatches:
        plan = self.plan
        per_step = plan.generation.questions
        order = window_order(len(self.training), steps * per_step, plan.seed)
        questions = [self.training[index] for index in order.tolist()]
        return AnsweredBatches(questions, per_step, plan.accumulation, self.answer_step, self.pack)

    def metadata(self) -> dict:
        return {
            "questions": len(self.training),
            "data": {"train": self.counts, "validation": self.validation.counts},
            "generated": {name: round(value, 3) for name, value in self.generated.items()},
            **self.teacher_metadata(),
        }
