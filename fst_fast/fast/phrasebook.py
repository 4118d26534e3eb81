"""The offline reflector: reads the verifier's feedback and edits the prompt's sentences from the task's phrase book.

Rule-based, no model. Noisy on purpose, with numbers that an experiment chose. It never sees a task's hidden
rule: which topic a feedback sentence is about, and which wording answers it, it guesses from the words they share.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage

EDIT = 0.7  # chance that a topic complained of is edited
SLIP = 0.25  # chance that the wording is then drawn from the whole topic
DROP = 0.15  # chance that a sentence is dropped
SHUFFLE = 0.3  # chance that the sentences are reordered

_IGNORED = "a all an answer are as be by each expected for from i in is it of on only put should the to use wrong"


class PhrasebookReflector:
    def __init__(self, phrasebook: Mapping[str, Sequence[str]]):
        self.usage = ReflectionUsage()
        self._topics = {topic: list(sentences) for topic, sentences in phrasebook.items() if sentences}
        self._topic_of = {sentence: topic for topic, sentences in self._topics.items() for sentence in sentences}
        self._words_of = {topic: _words(" ".join([topic, *sentences])) for topic, sentences in self._topics.items()}

    def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
        self.usage += ReflectionUsage(calls=len(requests))
        return [self._edit(request, random.Random(request.seed)) for request in requests]

    def _edit(self, request: ReflectionRequest, rng: random.Random) -> Reflection:
        sentences, done = _sentences(request.prompt.text), []
        for complaint, topic in self._complaints(request):
            if rng.random() > EDIT:
                continue
            wording = rng.choice(self._topics[topic] if rng.random() < SLIP else self.wordings(topic, complaint))
            sentences = [s for s in sentences if self._topic_of.get(s) != topic] + [wording]
            done.append(f'{topic}: "{wording}" because "{complaint}"')
        if rng.random() < DROP and len(sentences) > 1:
            done.append(f'dropped "{sentences.pop(rng.randrange(len(sentences)))}"')
        if rng.random() < SHUFFLE:
            rng.shuffle(sentences)
            done.append("reordered")
        return Reflection(" ".join(sentences), "; ".join(done) or "no change")

    def _complaints(self, request: ReflectionRequest) -> list[tuple[str, str]]:
        """The distinct feedback sentences that speak of a topic, with that topic, most frequent first."""
        failures = [r.verdict.feedback for r in request.rollouts if r.reward < 1]
        counted = Counter(sentence for feedback in failures for sentence in _sentences(feedback))
        return [(sentence, topic) for sentence, _ in counted.most_common() if (topic := self.topic(sentence))]

    def topic(self, complaint: str) -> str | None:
        """The topic whose name and sentences share the most words with `complaint`."""
        words = _words(complaint)
        shared = {topic: len(words & known) for topic, known in self._words_of.items()}
        best = max(shared, key=shared.__getitem__)
        return best if shared[best] else None

    def wordings(self, topic: str, complaint: str) -> list[str]:
        """The sentences of `topic` that share the most words with `complaint`."""
        words = _words(complaint)
        overlap = {s: len(words & _words(s)) for s in self._topics[topic]}
        return [s for s, n in overlap.items() if n == max(overlap.values())]


def _sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def _words(text: str) -> set[str]:
    return {w for w in re.findall(r"\w+", text.lower()) if len(w) > 1} - set(_IGNORED.split())
