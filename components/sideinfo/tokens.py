"""How many tokens a text is: by the model's own tokenizer where it is at hand, else by an estimate that is on the safe side."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from components.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASCII_PER_TOKEN = 3  # English prose has about 4, names and figures fewer
_TEMPLATE_TOKENS = 64  # what a chat template puts around two messages, at most


class Tokens(Protocol):
    """Counts and cuts."""

    @property
    def exact(self) -> bool:
        """Whether the model's own tokenizer counts; the report says so."""
        ...

    def count(self, text: str) -> int:
        """Tokens of a text."""
        ...

    def cut(self, text: str, most: int) -> str:
        """The longest beginning of `text` that is at most `most` tokens."""
        ...


class EstimatedTokens:
    """Three ASCII characters a token, every byte of others one: more than tokenizers make of prose, not of every text."""

    exact = False

    def count(self, text: str) -> int:
        """See Tokens."""
        ascii_only = sum(character.isascii() for character in text)
        return -(-ascii_only // _ASCII_PER_TOKEN) + len(text.encode()) - ascii_only

    def cut(self, text: str, most: int) -> str:
        """See Tokens."""
        ascii_only = others = 0
        for index, character in enumerate(text):
            ascii_only += character.isascii()
            others += 0 if character.isascii() else len(character.encode())
            if -(-ascii_only // _ASCII_PER_TOKEN) + others > most:
                return text[:index]
        return text


@dataclass(frozen=True)
class ModelTokens:
    """The model's own tokenizer, of a directory in the format of transformers."""

    tokenizer: "PreTrainedTokenizerBase"
    exact: bool = True

    def count(self, text: str) -> int:
        """See Tokens."""
        return len(self._encode(text)["input_ids"])

    def cut(self, text: str, most: int) -> str:
        """See Tokens."""
        ends = self._encode(text)["offset_mapping"]
        return text if len(ends) <= most else text[: ends[most - 1][1] if most > 0 else 0]

    def _encode(self, text: str):  # type: ignore[no-untyped-def]  # transformers' BatchEncoding
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def load_tokens(directory: str | None) -> Tokens:
    """The tokenizer in a directory, an estimate when None; raises ConfigError when there is none that can be used."""
    if directory is None:
        return EstimatedTokens()
    from transformers import AutoTokenizer

    try:
        if not Path(directory).is_dir():
            raise OSError("no such directory")
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError("it has no tokenizer.json")
    except Exception as error:  # each format has errors of its own; all mean the same here
        reason = first_line(error)
        raise ConfigError(
            f"setting 'sideinfo.tokenizer' = '{directory}' cannot be loaded: {reason}.",
            "Give the model's directory (tokenizer.json, tokenizer_config.json), or null to estimate.",
        ) from error
    return ModelTokens(tokenizer)


def fit(lines: Iterable[str], tokens: Tokens, most: int) -> list[str]:
    """The first lines that are at most `most` tokens together; one that does not fit is cut, those after it are left out."""
    kept: list[str] = []
    for line in lines:
        size = tokens.count(line) + 1  # and its end of line
        if size > most:
            if cut := tokens.cut(line, most - 1).strip():
                kept.append(cut)
            break
        kept.append(line)
        most -= size
    return kept


def room(system: str, tokens: Tokens, max_prompt_tokens: int) -> int:
    """Tokens left for a row's data after the shared beginning; raises ConfigError when that is too few."""
    left = max_prompt_tokens - tokens.count(system) - _TEMPLATE_TOKENS
    if left < _TEMPLATE_TOKENS:
        raise ConfigError(
            f"setting 'sideinfo.max_prompt_tokens' = {max_prompt_tokens}: the prompt takes {max_prompt_tokens - left} of it, "
            f"so {left} are left for the data; at least {_TEMPLATE_TOKENS} are needed.",
            "Raise it, or give a smaller vocabulary in sideinfo.tags.",
        )
    return left
