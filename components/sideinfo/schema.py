"""The only form in which an LLM's words enter the platform, and what is checked before they do."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.sideinfo.guard import REMOVED, neutralise

MAX_PROFILE_CHARS = 2000
MAX_TAGS = 8

_MIN_WORDS = 5
_MIN_CHARS = 20  # of a profile that can have as many words
_CHARS_PER_WORD = 8  # with the space after it; the longest that is asked for, not the longest that is used
_WORD = re.compile(r"\w+")
_SPAN = 5  # words; five in a row are a phrase, and a phrase that comes again is no coincidence
_MIN_SPANS = 8  # of a text that is judged by its spans
_MAX_REPEATED = 0.4
_MAX_COPIED_DATA = 0.6  # a profile of a short title may name it
_MAX_COPIED_PROMPT = 0.2

_REFUSAL = re.compile(
    r"\b(?:i(?:'m|\s+am)\s+(?:sorry|unable|not\s+able)|i\s+(?:can(?:no|')?t|cannot|won't|will\s+not|do\s+not|don't)\s+(?:help|assist|provide|"
    r"comply|answer|write|create|generate|fulfil+|have\s+(?:enough|access|information))|as\s+an?\s+(?:ai|artificial|language\s+model)|"
    r"es\s+tut\s+mir\s+leid|ich\s+kann\s+(?:nicht|leider|ihnen)|je\s+(?:suis\s+désolé|ne\s+peux\s+pas)|lo\s+siento|no\s+puedo\s+(?:ayudar|proporcionar)|"
    r"desculpe|não\s+posso|mi\s+dispiace|non\s+posso)|申し訳|抱歉|对不起|죄송",
    re.IGNORECASE,
)
# the words that every text of a language has, and that other languages in the table do not have
_FUNCTION_WORDS = {
    "English": "the and of to who with for are this that is as would from their they or by it be will which",
    "German": "der die das und ist mit für den von auf ein eine nicht sich auch als wird werden wer zu dem einer",
    "French": "le la les et des est pour qui une dans avec sur par ce cette ils au aux plus leur sont du",
    "Spanish": "el la los las y que para con una por es del su como más sus quienes gustan al lo este esta",
    "Italian": "il lo gli e che per con una di è del della chi dei sono nel alla piace come più questo questa",
    "Portuguese": "o os as e que para com uma por é do da dos das em quem não como mais seu sua ao gosta",
    "Dutch": "de het een en van met voor die dat is zijn op aan niet ook wie als door worden naar deze",
}
_FUNCTION_SETS = {name: frozenset(words.split()) for name, words in _FUNCTION_WORDS.items()}


class Profile(BaseModel):
    """What an LLM may say of an item or a user."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    profile: str = Field(min_length=1, max_length=MAX_PROFILE_CHARS)
    """The text that is embedded."""
    tags: Annotated[list[str], Field(max_length=MAX_TAGS)]
    """From the data set's closed vocabulary."""
    confidence: float = Field(ge=0, le=1)
    """How far the data support the profile, in the LLM's own opinion."""
    reasoning: str | None = Field(default=None, max_length=MAX_PROFILE_CHARS)
    """Not used further."""


@dataclass(frozen=True)
class Rejected:
    """An answer that is not used."""

    reason: str
    """One of a few, for counting and for the repair prompt."""


@dataclass(frozen=True)
class Rules:
    """What an answer is held against."""

    tags: frozenset[str]
    max_words: int
    language: str
    system: str
    """The prompt, of which nothing may come back."""

    def check(self, text: str, finish_reason: str, data: str) -> Profile | Rejected:
        """The profile that an answer holds, cleaned and cut to length, or why it is not used.

        Args:
            text: what the LLM wrote.
            finish_reason: why it stopped; "stop" is the good one.
            data: the row's data, which are to be used and not to be copied.
        """
        if finish_reason != "stop":
            return Rejected({"length": "cut off"}.get(finish_reason, finish_reason or "no finish reason"))
        start, end = text.find("{"), text.rfind("}")
        if start < 0 or end < start:
            return Rejected(_wordless(text))
        try:
            found = Profile.model_validate_json(text[start : end + 1])
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in problem["loc"][:1])
            known = place in Profile.model_fields  # other names are the LLM's own words
            return Rejected(f"{place}: {problem['type']}" if known else problem["type"])
        if unknown := set(found.tags) - self.tags:
            return Rejected(f"{len(unknown)} tags outside the vocabulary")
        return self._checked(found, data)

    def _checked(self, found: Profile, data: str) -> Profile | Rejected:
        if _REFUSAL.search(found.profile):
            return Rejected("refusal")
        guarded = neutralise(found.profile, MAX_PROFILE_CHARS)
        if REMOVED in guarded.text or guarded.removed & {"role", "instruction"}:
            return Rejected("instructions or addresses in the profile")
        words = _WORD.findall(guarded.text.casefold())
        if len(words) < _MIN_WORDS:
            return Rejected("too short")
        spans = _spans(words)
        if 1 - len(set(spans)) / len(spans) > _MAX_REPEATED or len(set(words)) < len(words) / 8:
            return Rejected("repetition")
        if language := _other_language(guarded.text, words, self.language):
            return Rejected(f"{language} instead of {self.language}")
        if len(spans) >= _MIN_SPANS:
            for source, most, reason in (
                (data, _MAX_COPIED_DATA, "copied data"),
                (self.system, _MAX_COPIED_PROMPT, "copied prompt"),
            ):
                known = set(_spans(_WORD.findall(source.casefold())))
                if sum(span in known for span in spans) > most * len(spans):
                    return Rejected(reason)
        text = " ".join(guarded.text.split()[: self.max_words])
        return found.model_copy(update={"profile": text, "tags": list(dict.fromkeys(found.tags)), "reasoning": None})


def json_schema(tags: Sequence[str], max_words: int, opening: str | None = None) -> dict[str, Any]:
    """The JSON schema of an answer, for decoding that is guided by it; narrower than what is accepted.

    A small model that is let run on never comes to an end: so the profile has a length, the confidence is one of five figures,
    and no reasoning, which nobody would read, is asked for.

    Args:
        tags: the closed vocabulary.
        max_words: of the profile.
        opening: what the profile begins with; it is then one sentence.
    """
    profile: dict[str, Any] = {"minLength": _MIN_CHARS, "maxLength": min(MAX_PROFILE_CHARS, max_words * _CHARS_PER_WORD)}
    if opening:
        profile = {"pattern": f"^{opening} [A-Za-z ,]+[.]$"}  # lengths beside a pattern have no effect
    vocabulary = {"items": {"enum": list(tags)}} if tags else {"items": {"type": "string"}, "maxItems": 0}
    properties = {
        "profile": {"type": "string", **profile},
        "tags": {"type": "array", "maxItems": MAX_TAGS, **vocabulary},
        "confidence": {"type": "number", "enum": [0, 0.25, 0.5, 0.75, 1]},
        "reasoning": {"type": "null"},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _wordless(text: str) -> str:
    if not text.strip():
        return "empty"
    return "refusal" if _REFUSAL.search(text[:MAX_PROFILE_CHARS]) else "no JSON object"


def _spans(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[index : index + _SPAN]) for index in range(max(1, len(words) - _SPAN + 1))]


def _other_language(text: str, words: Sequence[str], expected: str) -> str | None:
    """The language a text is in when that is another `Language`, or another alphabet; None when it seems right."""
    letters = [character for character in text if character.isalpha()]
    if sum(character < "ɐ" for character in letters) < 0.7 * len(letters):  # Latin letters end there
        return "another alphabet"
    counts = {name: sum(word in known for word in words) for name, known in _FUNCTION_SETS.items()}
    likely = max(counts, key=lambda name: (counts[name], name == expected))
    return likely if counts[likely] > counts[expected] + 1 else None
