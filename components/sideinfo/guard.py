"""Text of items, users and reviews is data: what could be read as anything else is taken out before an LLM sees it.

Anybody who can name an item can write to the LLM. `neutralise` keeps the words and removes what works on a reader that
follows instructions: invisible and reordering characters, markup and chat-template tokens, speakers' names, encoded blobs,
addresses, and sentences that speak to the writer instead of about the item. `delimit` puts the rest between marks that the
text itself cannot contain. The same function cleans what the LLM writes, so that nothing travels on in a profile.

It is one of several layers (a closed schema, validation, counterfactual inference), and not proof against every wording.
"""

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

OPENING, CLOSING = "<data>", "</data>"
REMOVED = "[removed]"

_MAX_UNESCAPES = 3  # "&amp;amp;lt;" is written by nobody who means well
_MAX_PASSES = 8
_MAX_MARKS = 2  # combining marks in a row; more are no language but a way to hide letters

_TEMPLATE_TOKENS = re.compile(
    r"<\s*[|/]?\s*(?:\||im_|start_of|end_of|begin_of|end of|s>|bos|eos|pad|unk|tool|system|user|assistant|think)[^<>]{0,60}>"
    r"|<\|[^<>|]{0,60}\|>|\[/?\s*(?:INST|SYS|SYSTEM|USER|ASSISTANT|TOOL_CALLS|AVAILABLE_TOOLS)\s*\]|(?<!<)<{2,4}/?\s*SYS\s*>{2,4}|</?s>",
    re.IGNORECASE,
)
_SPEAKER = re.compile(
    r"(?:^|(?<=[\n.!?;\"'»]))[\s#>*_-]{0,20}(?:system|assistant|user|human|developer|instructions?|response|prompt"
    r"|sistema|asistente|usuario|système|assistante?|utilisateur|benutzer|anweisung(?:en)?|система|ассистент|пользователь"
    r"|系统|助手|用户|システム|アシスタント|ユーザー|시스템)(?:\s+(?:message|prompt|note|override))?[*_]{0,2}\s*[::]",
    re.IGNORECASE,
)
_TAG = re.compile(r"<!--.*?(?:-->|$)|</?[a-zA-Z!][^<>]{0,500}>", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*|~~~[\w-]*")
_LINK = re.compile(r"!?\[([^\[\]]{0,200})\]\([^()\s]{0,2000}(?:\s[^()]{0,200})?\)")
_ADDRESS = re.compile(
    r"\b(?:[a-z][a-z0-9+.-]{1,15}://|www\.)\S+|\b(?:data|javascript):\S+|\b[\w.+-]{1,64}@[\w.-]{3,255}", re.IGNORECASE
)
# base64 and hexadecimal; without a digit a long run is words joined by hyphens and slashes
_BLOB = re.compile(
    r"(?<![\w+/=-])(?:(?=[A-Za-z+/_-]*[0-9])(?=[a-z0-9+/_-]*[A-Z])(?=[A-Z0-9+/_-]*[a-z])[A-Za-z0-9+/_-]{32,}={0,2}|[0-9a-f]{32,})"
    r"(?![\w+/=-])"
)
_ESCAPES = re.compile(r"(?:(?:\\[xu][0-9a-f]{2,8}|%[0-9a-f]{2}|&#x?[0-9a-f]{1,6};)\s?){3,}", re.IGNORECASE)
_SPACES = re.compile(r"\s+")
_SPACED = re.compile(r"\b(?:[^\W\d_][ ._*-]){6,}[^\W\d_]\b")
_STRUCTURE = str.maketrans({"<": " ", ">": " ", "{": "(", "}": ")", "[": "(", "]": ")", "|": ",", "`": "'", "\\": " "})
_SENTENCE = re.compile(r"[^.!?。؟]*(?:[.!?。؟]+|$)")

# the letters of other alphabets that look like Latin ones, for matching only
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕԁһӏтмнкгѵցԛԝАВЕКМНОРСТУХІЈЅαοενικρτυχΑΒΕΖΗΙΚΜΝΟΡΤΥΧıɡ0134@$",
    "aeopcyxijsdhltmhkrvgqwABEKMHOPCTYXIJSaoevikptuxABEZHIKMNOPTYXigoieaas",
)

_REPLACED = (
    (_TEMPLATE_TOKENS, " ", "role"),
    (_TAG, " ", "markup"),
    (_FENCE, " ", "markup"),
    (_LINK, r"\1", "markup"),
    (_ESCAPES, f" {REMOVED} ", "encoded"),
    (_ADDRESS, f" {REMOVED} ", "address"),
    (_BLOB, f" {REMOVED} ", "encoded"),
    (_SPACED, f" {REMOVED} ", "encoded"),
    (_SPEAKER, " ", "role"),
)
_REMOVED_RUN = re.compile(rf"{re.escape(REMOVED)}(?:[\s.,;:!?]*{re.escape(REMOVED)})+")

_OBJECT = r"(?:instruct\w*|prompts?|rules?|directions?|guidelines?|commands?|context|messages?|polic(?:y|ies))"
_DROP = r"(?:ignore|disregard|forget|override|bypass|skip|overlook|neglect)"
_INSTRUCTIONS = re.compile(
    "|".join(
        (
            # English
            rf"\b{_DROP}\b.{{0,30}}\b(?:previous|prior|above|all|any|your|these|those|system|earlier|preceding|my|every|other|former"
            rf"|given|foregoing)\b.{{0,20}}\b{_OBJECT}\b",
            rf"\b{_DROP}\s+(?:the\s+)?(?:instructions?|prompts?|guidelines?)\b",
            r"\b(?:ignore|disregard|forget)\s+(?:all|everything|anything)\b.{0,20}\b(?:above|before|previous\w*|prior|earlier|said|told)\b",
            rf"\b(?:new|updated|real|actual|secret|hidden|following|above)\s+{_OBJECT}\s*(?:are|is|follow|:)",
            rf"\b(?:reveal|print|repeat|show|output|leak|expose)\b.{{0,30}}\b(?:system|hidden|secret|your|above)\b.{{0,20}}\b{_OBJECT}\b",
            r"\bsystem\s+(?:prompt|message|override|instruction)",
            r"\byou\s+are\s+(?:now|no\s+longer|an?\s+(?:ai|assistant|language\s+model|helpful))\b",
            r"\b(?:from\s+now\s+on|starting\s+now|going\s+forward)\b.{0,20}\byou\b",
            r"\b(?:act|behave|respond|pretend)\s+(?:as|like)\s+(?:if|an?|the)\b.{0,30}\b(?:ai|assistant|model|system|developer|admin\w*|dan)\b",
            r"\b(?:always|must|should|please|be\s+sure\s+to|make\s+sure\s+to)\s+(?:\w+\s+){0,2}(?:recommend|rank|promote|prefer|suggest)\b"
            r".{0,60}\b(?:this|first|top|highest|every\s*one|every\s*body|every\s+user|all\s+users|any\s+user|above\s+all)\b",
            r"\b(?:recommend|rank|promote|suggest)\b.{0,20}\b(?:this|it|me|us)\b.{0,40}\b(?:everyone|everybody|first|above\s+(?:all|every)|every\s+user"
            r"|all\s+users|any\s+user|at\s+the\s+top|number\s+one|no\.?\s*1|#\s*1)",
            r"\b(?:every|all|any)\s+users?\s+(?:will|would|must|should)\s+(?:love|like|enjoy|want|buy|be\s+recommended)\b",
            r"\b(?:say|write|output|answer|respond|reply|return|state|claim|describe)\b.{0,30}\b(?:that\s+)?(?:every(?:one|body)|all\s+users|any\s*one)\b",
            r"\b(?:answer|respond|reply|output|return|write)\b.{0,15}\b(?:only|exactly|with\s+the|in\s+json|the\s+following|verbatim)\b",
            r"\b(?:set|put|make)\b.{0,20}\b(?:confidence|profile|tags)\b.{0,15}(?:\bto\b|=|\bas\b)",
            r"\b(?:language\s+model|llm|chat\s*gpt|ai\s+(?:model|assistant))s?\b.{0,40}\b(?:must|should|note|read|attention|ignore|please)\b",
            r"\b(?:attention|note|important|dear)\b.{0,15}\b(?:language\s+model|llm|ai|assistant|recommender)\b",
            r"\b(?:end|begin|start)\s+of\s+(?:data|input|instructions?|prompt|context)\b",
            # German
            r"\b(?:ignorier\w*|vergiss|vergessen\s+sie|missacht\w*|überspring\w*)\b.{0,50}\b(?:anweisung\w*|vorgabe\w*|regeln?|befehl\w*|prompt\w*|alles)\b",
            r"\bdu\s+bist\s+(?:jetzt|nun|ab\s+jetzt)\b|\bempfiehl\b.{0,40}\b(?:immer|allen|jedem|zuerst)\b",
            # French
            r"\b(?:ignor(?:e|ez|er)|oubli(?:e|ez|er)|néglige[zr]?)\b.{0,50}\b(?:instructions?|consignes?|règles?|directives?|tout)\b",
            r"\b(?:tu\s+es|vous\s+êtes)\s+(?:maintenant|désormais)\b|\brecommand(?:e|ez)\b.{0,40}\b(?:toujours|tous|tout\s+le\s+monde)\b",
            # Spanish, Portuguese
            r"\b(?:ignor[ae]\w?|olvid[ae]\w?|esque[çc]a|desconsider[ae])\b.{0,50}\b(?:instrucci\w+|instru[çc]\w+|reglas?|regras?|órdenes|ordens|todo|tudo)\b",
            r"\b(?:ahora\s+eres|agora\s+você\s+é|eres\s+ahora)\b|\brecom(?:ienda|iende|ende)\b.{0,40}\b(?:siempre|sempre|todos|todas)\b",
            # Italian, Dutch, Polish
            r"\b(?:ignora|dimentica|trascura)\w*\b.{0,50}\b(?:istruzion\w+|regole|comandi|tutto)\b|\bora\s+sei\b",
            r"\b(?:negeer|vergeet)\b.{0,50}\b(?:instructies?|regels?|opdrachten|alles)\b|\bje\s+bent\s+nu\b",
            r"\b(?:zignoruj|ignoruj|zapomnij)\b.{0,50}\b(?:instrukcj\w+|polece\w+|zasad\w*)\b",
            # Russian, Ukrainian
            r"(?:игнориру\w+|забудь\w*|проигнорируй\w*|ігнору\w+)[^.]{0,50}(?:инструкци\w+|указани\w+|правил\w*|команд\w*|інструкці\w+|все\b|всё\b)",
            r"(?:ты|вы)\s+теперь\b|рекомендуй\w*[^.]{0,40}(?:всегда|всем)",
            # Chinese, Japanese, Korean
            r"(?:忽略|无视|無視|忘记|忘記|不要理会)[^。]{0,20}(?:指令|指示|提示|规则|規則|说明|說明|内容)|你现在是|你現在是|(?:总是|始终|务必)[^。]{0,8}推荐",
            r"(?:指示|命令|ルール|プロンプト|これまで)[^。]{0,12}(?:無視|忘れ)|あなたは(?:今|これから)|(?:必ず|常に)[^。]{0,12}(?:推薦|おすすめ)",
            r"(?:지시|명령|규칙|프롬프트|지침)[^.]{0,12}(?:무시|잊)|당신은\s*이제",
            # Arabic, Hindi, Turkish
            r"(?:تجاهل|انس)[^.]{0,40}(?:التعليمات|الأوامر|القواعد|السابقة)|(?:निर्देश|आदेश|नियम)[^।]{0,30}(?:अनदेखा|नज़रअंदाज़|भूल)",
            r"\b(?:talimat\w*|kural\w*|komut\w*)\b.{0,30}\b(?:yok\s*say\w*|unut\w*|görmezden)",
        )
    ),
    re.IGNORECASE,
)


class Guarded(NamedTuple):
    """Text that is safe to show to an LLM as data."""

    text: str
    """One line: words, figures and punctuation, without the characters that `delimit` needs; "" when nothing was left."""
    removed: frozenset[str]
    """What was found in it: "characters", "markup", "role", "encoded", "address", "instruction", "length"; not layout."""


def neutralise(text: str, max_chars: int) -> Guarded:
    """`text` as one line that says what it said and asks nothing.

    Args:
        text: anything.
        max_chars: of the result; what is beyond is cut at a word. Of a longer text only the first 4 times as many
            characters are looked at, so that the work is bounded.
    """
    removed = set[str]()
    if len(text) > 4 * max_chars:
        text = text[: 4 * max_chars]
        removed.add("length")
    for _ in range(_MAX_PASSES):  # what is taken out may have stood between the halves of something else
        before, text = text, _pass(text, removed)
        if text == before:
            break
    else:
        text = ""  # nobody nests like that who describes an item
    text = _cut(text, max_chars, removed)
    return Guarded(text if any(character.isalnum() for character in text.replace(REMOVED, "")) else "", frozenset(removed))


def delimit(lines: Iterable[str]) -> str:
    """Neutralised lines between marks that none of them can contain."""
    body = "\n".join(lines)
    assert "<" not in body, "only neutralised text is delimited"
    return f"{OPENING}\n{body}\n{CLOSING}"


def is_instruction(text: str) -> bool:
    """Whether one sentence speaks to whoever writes about it."""
    plain = text.translate(_LOOKALIKES)
    return bool(_INSTRUCTIONS.search(text) or (plain != text and _INSTRUCTIONS.search(plain)))


def _pass(text: str, removed: set[str]) -> str:
    text = _SPACES.sub(lambda match: "\n" if "\n" in match.group() else " ", _visible(_unescaped(text), removed))
    for pattern, instead, reason in _REPLACED:
        text, count = pattern.subn(instead, text)
        if count:
            removed.add(reason)
    text = "".join(_sentence(match.group(), removed) for match in _SENTENCE.finditer(text.replace("\n", " ")))
    text = " ".join(text.replace(REMOVED, "\0").translate(_STRUCTURE).replace("\0", f" {REMOVED} ").split())
    return _REMOVED_RUN.sub(REMOVED, text)


def _unescaped(text: str) -> str:
    """Without HTML entities, also of entities."""
    for _ in range(_MAX_UNESCAPES):
        if (plain := html.unescape(text)) == text:
            break
        text = plain
    return text


def _visible(text: str, removed: set[str]) -> str:
    """Compatibility forms written as usual, without characters that have no shape of their own or move others."""
    kept: list[str] = []
    marks = 0
    for character in unicodedata.normalize("NFKC", text):
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if character in "\n\r\t\v\f\u2028\u2029\x85":
            kept.append("\n" if character != "\t" else " ")
        elif category[0] == "C" or marks > _MAX_MARKS or "\ufe00" <= character <= "\ufe0f" or character >= "\U000e0000":
            removed.add("characters")
        elif category == "Zs":
            kept.append(" ")
        else:
            kept.append(character)
    return "".join(kept)


def _sentence(text: str, removed: set[str]) -> str:
    if not is_instruction(text):
        return text
    removed.add("instruction")
    return f"{REMOVED} "


def _cut(text: str, max_chars: int, removed: set[str]) -> str:
    if len(text) <= max_chars:
        return text
    removed.add("length")
    head = text[: max_chars + 1]
    space = head.rfind(" ", max_chars // 2)
    return head[:space] if space > 0 else text[:max_chars]
