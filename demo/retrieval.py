"""Act (a): a pretrained encoder finds the documentation that answers a question, while faults strike its products.

corpus vectors C      computed once, without faults
answer(q)             = argmax_i  C[i] · encoder(q)          one forward per question, as a server would do it
a wrong answer        = answer(q) under faults ≠ answer(q) of the untouched model
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

import abft

from .corpus import Passage, fingerprint, passages
from .encoder import Encoder
from .faultlog import Tally, describe
from .plan import Plan
from .progress import Progress
from .questions import QUESTIONS, Question

NO_ANSWER = "nothing (not a number)"
LIST = 5  # passages that a retrieval system would hand on
MOVED = 1e-3  # of the vector's length, which is 1
BATCH = 32  # passages per forward while the corpus is embedded

# Faults are injected into the products that abft computes. "off" computes every product without any check, so the
# unprotected model meets exactly the faults that the others meet, and nothing stands between them and its answers.
POLICIES = {
    "unprotected": abft.Policy(level="off"),
    "protected": abft.Policy(),
    "DMR": abft.Policy(level="off", redundancy="dmr"),
}


@dataclass
class ArmResult:
    """One arm at one rate; rate 0 is the clean pass that every arm makes first."""

    arm: str
    rate: float
    requests: int = 0
    wrong: int = 0  # the best passage differs from the untouched model's
    wrong_lists: int = 0  # the list of the best five does
    changed: int = 0  # the question's vector differs in at least one bit from the same arm's clean pass
    moved: int = 0  # … and by at least 1e-3 of its length
    fault_seeds: list[int] = field(default_factory=list)  # one per round
    faults: Tally = field(default_factory=Tally)
    milliseconds: list[float] = field(default_factory=list)

    def compare(self, vector: Tensor, clean: Tensor, answers: tuple[str, ...], right: tuple[str, ...]) -> bool:
        """Count what one request delivered; True for a wrong answer."""
        self.changed += not torch.equal(vector, clean)
        # "not <": a NaN has moved as far as can be.
        self.moved += not bool((vector - clean).norm() < MOVED)
        self.wrong_lists += answers != right
        self.wrong += answers[0] != right[0]
        return answers[0] != right[0]

    @property
    def p50(self) -> float:
        return median(self.milliseconds)

    @property
    def mean(self) -> float:
        return sum(self.milliseconds) / len(self.milliseconds)

    def record(self) -> dict:
        numbers = {key: value for key, value in vars(self).items() if key not in ("milliseconds", "faults")}
        return {
            **numbers,
            **self.faults.record(),
            "ms_p50": round(self.p50, 3),
            "ms_mean": round(self.mean, 3),
            "ms_max": round(max(self.milliseconds), 3),
            "seconds": round(sum(self.milliseconds) / 1e3, 3),
        }


@dataclass
class WrongAnswer:
    """One delivered wrong answer, kept as an example that people can read."""

    arm: str
    rate: float
    question: str
    right: str
    wrong: str
    fault: str


@dataclass
class Retrieval:
    passages: int
    questions: int
    corpus_sha256: str
    top1: float  # share of the questions whose expected object comes first, without faults
    top3: float
    arms: list[ArmResult]
    wrong_answers: list[WrongAnswer]


def run(encoder: Encoder, plan: Plan, seed: int) -> Retrieval:
    questions = QUESTIONS[: plan.questions]
    corpus = passages(plan.passages, keep=[question.expected for question in questions])
    index = Index([passage.name for passage in corpus], embed_corpus(encoder, corpus))
    tokens = [encoder.tokenise([question.text]) for question in questions]
    # What the untouched model answers; every arm is compared with this, not with its own clean pass.
    untouched = ArmResult("fault-free", 0.0, requests=len(tokens))
    plain = [_timed(encoder.embed, token, untouched) for token in tokens]
    right = [index.best(vector) for vector in plain]

    arms = {name: encoder.using(abft.protect(copy.deepcopy(encoder.model), policy, name=name)) for name, policy in POLICIES.items()}
    results, wrong_answers, clean = [untouched], [], {}
    with Progress("asking without faults", len(arms) * len(tokens)) as bar:
        for name, arm in arms.items():
            results.append(ArmResult(name, 0.0))
            clean[name], _ = _ask(arm, tokens, results[-1], bar)
            for vector, answers in zip(clean[name], right, strict=True):
                results[-1].compare(vector, vector, index.best(vector), answers)

    mixture = abft.inject.Mixture.gpu_2026()
    forwards = len(plan.retrieval_rates) * plan.rounds * len(arms) * len(tokens)
    with Progress("asking under faults", forwards) as bar:
        for rate in plan.retrieval_rates:
            counts = {name: ArmResult(name, rate) for name in arms}
            # Arm after arm within a round, so that a slow minute of the machine falls on all of them, and all with
            # one seed per round: the arms meet the same faults.
            for round_seed in (seed + 1000 * number + round(100 * rate) for number in range(plan.rounds)):
                for name, arm in arms.items():
                    result = counts[name]
                    result.fault_seeds.append(round_seed)
                    with abft.inject.faults(mixture, rate=rate, seed=round_seed) as log:
                        vectors, faults = _ask(arm, tokens, result, bar, log)
                    for number, vector in enumerate(vectors):
                        answers = index.best(vector)
                        if result.compare(vector, clean[name][number], answers, right[number]):
                            names = (questions[number].text, right[number][0], answers[0])
                            wrong_answers.append(WrongAnswer(name, rate, *names, faults[number]))
            results.extend(counts.values())
    digest = fingerprint(passage.text for passage in corpus)
    top1, top3 = index.accuracy(plain, questions)
    return Retrieval(len(corpus), len(questions), digest, top1, top3, results, wrong_answers)


@dataclass(frozen=True)
class Index:
    """The corpus: names of the passages and their vectors (passages, 384), all of length 1."""

    names: list[str]
    vectors: Tensor

    def best(self, vector: Tensor) -> tuple[str, ...]:
        """The names of the ``LIST`` nearest passages, best first."""
        if not vector.isfinite().all():
            # To a sort NaN is the largest value, so a poisoned vector would "find" whatever stands first.
            return (NO_ANSWER,)
        return tuple(self.names[number] for number in (self.vectors @ vector[0]).topk(LIST).indices)

    def accuracy(self, vectors: list[Tensor], questions: tuple[Question, ...]) -> tuple[float, float]:
        """Top-1 and top-3, of the questions whose expected passage exists: another Python may name things otherwise."""
        pairs = zip(vectors, questions, strict=True)
        found = [(self.best(vector), question.expected) for vector, question in pairs if question.expected in self.names]
        top1, top3 = (sum(name in names[:top] for names, name in found) / max(1, len(found)) for top in (1, 3))
        return top1, top3


def embed_corpus(encoder: Encoder, corpus: list[Passage]) -> Tensor:
    """(passages, 384); passages of like length share a batch, so that little of it is padding."""
    order = sorted(range(len(corpus)), key=lambda index: len(corpus[index].text))
    vectors = torch.empty(len(corpus), encoder.width)
    with Progress(f"reading {len(corpus)} docstrings", -(-len(order) // BATCH)) as bar:
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            vectors[batch] = encoder.embed(encoder.tokenise([corpus[index].text for index in batch]))
            bar.advance()
    return vectors


def _ask(
    arm: Encoder, tokens: list[dict[str, Tensor]], result: ArmResult, bar: Progress, log: Sequence = ()
) -> tuple[list[Tensor], list[str]]:
    """One request per question: its vector, and in words what struck it.

    What was injected and what was noticed is read after each request, outside the measured time.
    """
    vectors, faults = [], []
    abft.report(reset=True)
    for token in tokens:
        before = len(log)
        vectors.append(_timed(arm.embed, token, result))
        struck = log[before:]
        result.requests += 1
        result.faults.add(struck, abft.report(reset=True))
        faults.append(", ".join(describe(fault) for fault in struck).replace(f"{result.arm}.", ""))
        bar.advance(f"{result.arm} at {result.rate:.0%}")
    return vectors, faults


def _timed(embed: Callable[[dict[str, Tensor]], Tensor], token: dict[str, Tensor], result: ArmResult) -> Tensor:
    start = time.perf_counter()
    vector = embed(token)
    result.milliseconds.append(1e3 * (time.perf_counter() - start))
    return vector
