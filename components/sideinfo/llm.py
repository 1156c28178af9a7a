"""Profiles by an LLM: items first, then users from their items' profiles, then what it writes without evidence.

Every request goes through the cache; every answer, also a cached one, is validated. A rejected answer is asked for again with
a smaller prompt, a bounded number of times, and the row is then set aside with its reason.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from components.errors import LLMError
from components.ids import ITEM_ID, USER_ID
from components.ingest.dataset import Dataset
from components.progress import progress
from components.sideinfo import evidence, prompts
from components.sideinfo.backends import NOT_IN_CACHE, Answer, Backend, Decoding, Space
from components.sideinfo.cache import AnswerCache
from components.sideinfo.config import SideinfoConfig
from components.sideinfo.guard import CLOSING, OPENING, delimit, neutralise
from components.sideinfo.profiles import Account, Profiles, Quarantined, Reference, Side
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
    _written: dict[Side, list[Profile | None]] = field(default_factory=dict)
    _tags: list[str] | None = None

    def __post_init__(self) -> None:
        self.account.exact_tokens = self.tokens.exact

    def write_items(self, training: Dataset) -> Profiles:
        """See ProfileWriter."""
        found = evidence.of_items(training, self._limits(training, "item"))
        return self._write_side(training, "item", training.items[ITEM_ID].tolist(), found)

    def write_users(self, training: Dataset, item_profiles: Sequence[str | None]) -> Profiles:
        """See ProfileWriter."""
        found = evidence.of_users(training, item_profiles, self._limits(training, "user"))
        return self._write_side(training, "user", training.users[USER_ID].tolist(), found)

    def write_references(self, training: Dataset) -> list[Reference]:
        """See ProfileWriter; groups of most members first, at most `max_references` a side."""
        references: list[Reference] = []
        items = evidence.item_groups(training)
        sides: dict[Side, list[list[str]]] = {"item": items, "user": evidence.user_groups(training, items)}
        for side, groups in sides.items():
            counts = Counter(group for row in groups for group in row)
            names = ["", *sorted(counts, key=lambda group: (-counts[group], group))[: self.config.max_references]]
            written = self._write(training, side, names, [evidence.of_group(name) for name in names], f"{side} references")
            references += [Reference(side, name, text) for name, text in zip(names, _texts(written), strict=True)]
        return references

    def columns(self, training: Dataset, side: Side) -> dict[str, list[Any]]:
        """Tags and confidence that the LLM gave, and the groups whose references belong to the row."""
        items = evidence.item_groups(training)
        return {
            "tags": [found and found.tags for found in self._written[side]],
            "confidence": [found and found.confidence for found in self._written[side]],
            "groups": items if side == "item" else evidence.user_groups(training, items),
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

    def _write_side(self, training: Dataset, side: Side, ids: Sequence[str], found: evidence.Evidence) -> Profiles:
        self.guarded.update(found.guarded)
        written = self._write(training, side, ids, found.texts, f"{side}s")
        self._check_coverage(side, sum(text is not None for text in found.texts), written)
        self._written[side] = written
        return _texts(written)

    def _write(
        self, training: Dataset, side: Side, ids: Sequence[str], texts: Sequence[str | None], unit: str
    ) -> list[Profile | None]:
        """One profile per text, None where there is no text or no answer could be used."""
        vocabulary, config = self._vocabulary(training), self.config
        schema = json_schema(vocabulary, config.max_words, config.opening) if config.guided else None
        written: list[Profile | None] = [None] * len(texts)
        shown = {row: text for row, text in enumerate(texts) if text is not None}
        self.account.rows += len(shown)
        started = time.monotonic()
        with progress("sideinfo", len(shown), unit) as bar:
            for attempt in range(1 + config.repair_attempts):
                name: prompts.Name = "repair" if attempt or config.short_prompt else side
                prompt = prompts.load(name, config.language, config.max_words, vocabulary, side)
                rules = Rules(frozenset(vocabulary), config.max_words, config.language, prompt.system)
                decoding = replace(self.decoding, schema=schema, seed=self.decoding.seed + attempt)
                rejected: dict[int, str] = {}
                last = attempt == config.repair_attempts
                for rows, answer in self._answers(Space(prompt, decoding), shown):
                    done = 0
                    for row in rows:
                        verdict = self._verdict(rules, answer, shown[row])
                        if isinstance(verdict, Profile):
                            written[row] = verdict
                            self.account.repaired += attempt > 0
                        elif answer.error or last:
                            looked_at = attempt + (not answer.error)
                            excerpt = neutralise(answer.text, _EXCERPT_CHARS).text
                            self.account.quarantine.append(Quarantined(unit, ids[row], verdict.reason, looked_at, excerpt))
                        else:
                            rejected[row] = verdict.reason
                        done += row not in rejected
                    bar.advance(done, asked=self.account.asked, cached=self.account.cached)
                shown = {row: self._smaller(shown[row]) for row in sorted(rejected)}
        self.account.seconds += time.monotonic() - started
        return written

    def _verdict(self, rules: Rules, answer: Answer, data: str) -> Profile | Rejected:
        if answer.error:
            return Rejected(answer.error)
        verdict = rules.check(answer.text, answer.finish_reason, data)
        if isinstance(verdict, Rejected):
            self.account.rejected[verdict.reason] += 1
        return verdict

    def _answers(self, space: Space, shown: dict[int, str]) -> Iterator[tuple[list[int], Answer]]:
        """An answer with the rows it is for, rows of equal text together: first those of the cache, then those asked for."""
        requests = {row: space.request(text) for row, text in shown.items()}
        rows: dict[str, list[int]] = {}
        for row, request in requests.items():
            rows.setdefault(request.key, []).append(row)
        known = self.cache.find(space, rows.keys())
        self.account.cached += len(known)
        for key, answer in known.items():
            yield rows[key], answer
        open_requests = [requests[members[0]] for key, members in rows.items() if key not in known]
        if not open_requests:
            return
        with self.cache.recorder(space) as keep:
            for answer in self.backend.answers(open_requests, space.decoding):
                self.account.asked += answer.error != NOT_IN_CACHE
                self.account.tokens_in += answer.tokens_in
                self.account.tokens_out += answer.tokens_out
                if answer.error:
                    self.account.unanswered += 1
                else:
                    keep(answer)
                yield rows[answer.key], answer

    def _smaller(self, text: str) -> str:
        """The data of a repair: the first part of what was shown."""
        lines = text.removeprefix(f"{OPENING}\n").removesuffix(f"\n{CLOSING}").split("\n")
        return delimit(fit(lines, self.tokens, max(_REPAIR_MIN_TOKENS, self.tokens.count(text) // 2)))

    def _check_coverage(self, side: Side, known: int, written: Sequence[Profile | None]) -> None:
        covered = sum(entry is not None for entry in written)
        if covered >= self.config.min_coverage * known:
            return
        reasons = Counter(entry.reason for entry in self.account.quarantine if entry.side == f"{side}s").most_common(3)
        told = ", ".join(f"{count} x {reason}" for reason, count in reasons)
        raise LLMError(
            f"{covered} of {known} {side}s have a profile, a share of {covered / known:.3f}, and sideinfo.min_coverage is "
            f"{self.config.min_coverage:g}; why not: {told}.",
            "Run again: answers that came are kept, and only those that did not come are asked for. If answers were rejected, "
            "raise sideinfo.repair_attempts or sideinfo.max_tokens, or use a larger model; or lower sideinfo.min_coverage.",
        )


def _texts(written: Sequence[Profile | None]) -> Profiles:
    return [None if entry is None else entry.profile for entry in written]
