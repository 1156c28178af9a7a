"""Profiles by an LLM: items first, then users from their items' profiles, then what it writes without evidence.

Every request goes through the cache; every answer, also a cached one, is validated. A rejected answer is asked for again with
a smaller prompt, a bounded number of times, and the row is then set aside with its reason.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from components.ids import ITEM_ID, USER_ID
from components.ingest.dataset import Dataset
from components.progress import emit, progress
from components.sideinfo import evidence, prompts
from components.sideinfo.backends import NOT_IN_CACHE, Answer, Backend, Decoding, Space
from components.sideinfo.cache import AnswerCache
from components.sideinfo.config import SideinfoConfig
from components.sideinfo.guard import CLOSING, OPENING, delimit, neutralise
from components.sideinfo.ondisk import Desk, Quarantined, Texts
from components.sideinfo.profiles import SIDES, Account, Reference, Side
from components.sideinfo.schema import Profile, Rejected, Rules, json_schema
from components.sideinfo.tokens import Tokens, fit, room

_EXCERPT_CHARS = 200
_REPAIR_MIN_TOKENS = 64  # a repair shows half the data, for less to go wrong with; what is short already stays


@dataclass
class LLMWriter:
    """A ProfileWriter that asks a backend."""

    config: SideinfoConfig
    backend: Backend
    cache: AnswerCache
    tokens: Tokens
    decoding: Decoding
    """Without schema; that is made of the data set's vocabulary."""
    account: Account = field(default_factory=Account)
    guarded: Counter[str] = field(default_factory=Counter)
    """See ProfileWriter."""
    _desks: dict[Side, Desk] = field(default_factory=dict)
    _tags: list[str] | None = None

    def __post_init__(self) -> None:
        self.account.exact_tokens = self.tokens.exact

    def write_items(self, training: Dataset) -> Texts:
        """See ProfileWriter."""
        shown = evidence.of_items(training, self._limits(training, "item"), self.guarded)
        return self._write_side(training, "item", training.items[ITEM_ID].tolist(), shown)

    def write_users(self, training: Dataset, item_profiles: Sequence[str | None]) -> Texts:
        """See ProfileWriter."""
        shown = evidence.of_users(training, item_profiles, self._limits(training, "user"), self.guarded)
        return self._write_side(training, "user", training.users[USER_ID].tolist(), shown)

    def write_references(self, training: Dataset) -> list[Reference]:
        """See ProfileWriter; groups of most members first, at most `max_references` a side."""
        references: list[Reference] = []
        for side in SIDES:
            counts = Counter(group for row in _groups(training, side) for group in row)
            names = ["", *sorted(counts, key=lambda group: (-counts[group], group))[: self.config.max_references]]
            desk = self._write(training, side, names, map(evidence.of_group, names), f"{side} references")
            references += [Reference(side, name, row[0]) for name, row in zip(names, desk.written(len(names)), strict=True)]
        return references

    def columns(self, training: Dataset, side: Side) -> dict[str, Iterable[Any]]:
        """Tags and confidence that the LLM gave, and the groups whose references belong to the row."""
        desk, count = self._desks[side], training.num_items if side == "item" else training.num_users
        return {
            "tags": (tags for _, tags, _ in desk.written(count)),
            "confidence": (confidence for _, _, confidence in desk.written(count)),
            "groups": _groups(training, side),
        }

    def _vocabulary(self, training: Dataset) -> list[str]:
        if self._tags is None:
            given = self.config.tags
            self._tags = evidence.vocabulary(training, self.config.max_tags) if given is None else list(given)
        return self._tags

    def _prompt(self, training: Dataset, side: Side) -> prompts.Prompt:
        return prompts.load(side, self.config.language, self.config.max_words, self._vocabulary(training))

    def _limits(self, training: Dataset, side: Side) -> evidence.Limits:
        left = room(self._prompt(training, side).system, self.tokens, self.config.max_prompt_tokens)
        return evidence.Limits(self.tokens, left, self.config.max_reviews, self.config.max_user_items, self.config.seed)

    def _write_side(self, training: Dataset, side: Side, ids: Sequence[str], shown: Iterable[str | None]) -> Texts:
        before = self.account.rows
        desk = self._desks[side] = self._write(training, side, ids, shown, f"{side}s")
        self._note_coverage(side, self.account.rows - before, desk.covered())
        return Texts(profile for profile, _, _ in desk.written(len(ids)))

    def _write(self, training: Dataset, side: Side, ids: Sequence[str], shown: Iterable[str | None], unit: str) -> Desk:
        """Has a profile written for every row of which something is shown, unless no answer could be used."""
        rounds = [self._round(training, side, attempt) for attempt in range(1 + self.config.repair_attempts)]
        desk = Desk()
        told = ((row, data) for row, data in enumerate(shown) if data is not None)
        desk.show(0, ((row, rounds[0][0].request(data).key, data) for row, data in told))
        self.account.rows += (known := desk.waiting(0))
        started = time.monotonic()
        with progress("sideinfo", known, unit) as bar:
            for attempt, (space, rules) in enumerate(rounds):
                for answer in self._answers(desk, space, attempt):
                    rows, data = desk.rows(attempt, answer.key)
                    verdict = self._verdict(rules, answer, data)
                    if isinstance(verdict, Rejected) and not answer.error and attempt + 1 < len(rounds):
                        smaller = self._smaller(data)
                        following = rounds[attempt + 1][0].request(smaller)
                        desk.show(attempt + 1, ((row, following.key, smaller) for row in rows))
                        rows = []
                    elif isinstance(verdict, Rejected):
                        desk.settle(rows)
                        looked_at = attempt + (not answer.error)
                        excerpt = neutralise(answer.text, _EXCERPT_CHARS).text
                        for row in rows:
                            self.account.quarantine.add(Quarantined(unit, ids[row], verdict.reason, looked_at, excerpt))
                    else:
                        desk.settle(rows, verdict.profile, verdict.tags, verdict.confidence)
                        self.account.repaired += len(rows) * (attempt > 0)
                    bar.advance(len(rows), asked=self.account.asked, cached=self.account.cached)
        self.account.seconds += time.monotonic() - started
        return desk

    def _round(self, training: Dataset, side: Side, attempt: int) -> tuple[Space, Rules]:
        """How rows are asked for the `attempt`-th time, and what the answers are held against."""
        config, vocabulary = self.config, self._vocabulary(training)
        name: prompts.Name = "repair" if attempt or config.short_prompt else side
        prompt = prompts.load(name, config.language, config.max_words, vocabulary, side)
        schema = json_schema(vocabulary, config.max_words, config.opening) if config.guided else None
        decoding = replace(self.decoding, schema=schema, seed=self.decoding.seed + attempt)
        rules = Rules(frozenset(vocabulary), config.max_words, config.language, prompt.system)
        return Space(prompt, decoding, config.engine()), rules

    def _verdict(self, rules: Rules, answer: Answer, data: str) -> Profile | Rejected:
        if answer.error:
            return Rejected(answer.error)
        verdict = rules.check(answer.text, answer.finish_reason, data)
        if isinstance(verdict, Rejected):
            self.account.rejected[verdict.reason] += 1
        return verdict

    def _answers(self, desk: Desk, space: Space, attempt: int) -> Iterator[Answer]:
        """The answers that rows wait for: first those of the cache, then those asked for."""
        if desk.waiting(attempt):
            for answer in self.cache.find(space, lambda keys: desk.wanted(attempt, keys)):
                self.account.cached += 1
                yield answer
        if not (waiting := desk.waiting(attempt)):
            return
        if space.prompt.name != "repair" and self.config.backend != "replay" and self.cache.is_asked_anew(space):
            pinned = "; a list in sideinfo.tags keeps the tags as they are when the data change"
            emit(
                "warning",
                stage="sideinfo",
                message=f"all {waiting} {space.prompt.name} profiles are asked for: what '{space.decoding.model}' has answered "
                f"was asked with other tags or settings{pinned if self.config.tags is None else ''}",
            )
        with self.cache.recorder(space) as keep:
            for answer in self.backend.answers(map(space.request, desk.requests(attempt)), space.decoding):
                self.account.asked += answer.error != NOT_IN_CACHE
                self.account.tokens_in += answer.tokens_in
                self.account.tokens_out += answer.tokens_out
                if answer.error:
                    self.account.unanswered += 1
                else:
                    keep(answer)
                yield answer

    def _smaller(self, text: str) -> str:
        """The data of a repair: the first part of what was shown."""
        lines = text.removeprefix(f"{OPENING}\n").removesuffix(f"\n{CLOSING}").split("\n")
        return delimit(fit(lines, self.tokens, max(_REPAIR_MIN_TOKENS, self.tokens.count(text) // 2)))

    def _note_coverage(self, side: Side, known: int, covered: int) -> None:
        reasons = self.account.quarantine.reasons(f"{side}s").most_common(3)
        told = ", ".join(f"{count} x {reason}" for reason, count in reasons)
        self.account.sides[f"{side}s"] = {"known": known, "covered": covered, "why_not": told}
        self.config.check_coverage(self.account.sides)


def _groups(training: Dataset, side: Side) -> Iterator[list[str]]:
    return evidence.item_groups(training) if side == "item" else evidence.user_groups(training)
