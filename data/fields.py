"""What the keys and the texts of a record may be: data/records.py reads records with these rules.

A key is used, or known to be harmless, or known to change what a record means, or it is printed. A
text may not hold the marks of another chat format, from which a model would learn to write them.
"""

import re
from functools import lru_cache


class SkipRecord(ValueError):
    """A valid record from which nothing can be learned."""


TURNS = ("messages", "conversations", "conversation")  # keys of a whole dialogue
QUESTION_AND_ANSWER = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
ABOUT = ("input", "context")  # what an instruction is about
BEFORE = ("system", "system_prompt", "history")  # what comes before a dialogue
PAIR = ("chosen", "rejected", "rating", "kind", "chosen_safe", "rejected_safe")
LABELS = ("label", "labels")  # good or bad (KTO), or the known answer to a prompt
# Keys of one format that change what a record of another format means.
QUESTIONS = {*TURNS, *BEFORE, *ABOUT, "inputs", *(question for question, _ in QUESTION_AND_ANSWER)}
FORMATS = {*QUESTIONS, *PAIR, *(answer for _, answer in QUESTION_AND_ANSWER)}
FORMATS |= {"text", "is_safety", "own_answers", "terse", "obeyed_if", *LABELS}

# Words in the names of other keys. No list of keys that change a meaning could be complete, so a
# key has only words that are known to be harmless, or one that is known to change the meaning, or
# it is printed. The last two lines are the words of Tinytown's own files.
HARMLESS = set(
    """id ids uid uuid idx index key hash md5 url urls link uri source sources src dataset origin
    split subset model models generator author license copyright lang language locale category
    categories topic topics tag tags task type domain subject score scores rank reward quality
    difficulty level length len count num number size turn turns time timestamp date created updated
    year version title comment notes user username name path file filename line page markdown
    about attribute stranger truth how gap gated finished helpfulness safety step group a b
    kl follow content unsafe chosen rejected true best of n at by""".split()
)
MEANING = re.compile(
    r"(un)?mask|weight|loss|train|learn(able|ed|$)|supervis|ignore|sys|context|ctx|histor|preamble|"
    r"document|passage|background|persona|tool|function|label|margin|kto|image|video|audio|think|"
    r"thought|reasoning|article|paragraph|excerpt|evidence|premise|knowledge$|hints?$|options?$|"
    r"choices?$|tables?$|prior|previous|earlier|suffix|developer|instructions$|guideline|desirab"
)
LONG = 200  # characters of a text that is too long to describe a record
# A key that ends with one of these only describes: system_prompt_id, context_length.
DESCRIBES = {"id", "ids", "uuid", "hash", "length", "len", "source", "lang", "language", "model"}
DESCRIBES |= {"title", "count", "date"}
BLANK = re.compile(r"[\s\u200b-\u200d\u2060\ufeff]*")  # white space, also of no width
TURN_KEYS = {"role", "content", "from", "value", "weight"}
NOT_ALTERNATING = "turns that do not alternate from Human to Assistant"


def get_field(record: dict, key: str):
    """The value of a field; None if it is missing or empty: null, blank text, or a table's NaN."""
    value = record.get(key)
    blank = value != value or (isinstance(value, str) and BLANK.fullmatch(value))
    return None if blank else value


@lru_cache(4096)
def changes_meaning(key: str) -> bool | None:
    """Whether a key that no format has changes what a record means, by its words. None: unknown."""
    words = re.findall(r"[^\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", key).lower())
    if words and words[-1] in DESCRIBES:
        return False
    if any(MEANING.match(word) for word in words):
        return True
    return False if words and HARMLESS.issuperset(words) else None


def unused_keys(record) -> set[str]:
    """The keys of a record and of its messages of which nothing is known, or with a long text."""
    if not isinstance(record, dict):
        return set()
    keys = record.keys() - FORMATS
    texts = {key: record[key] for key in keys if isinstance(record[key], str)}
    long = {key for key, text in texts.items() if len(text) > LONG and " " in text}
    for turns in (record.get(key) for key in TURNS):
        for turn in turns if isinstance(turns, list) else []:
            keys |= turn.keys() - TURN_KEYS if isinstance(turn, dict) else set()
    return long | {key for key in keys if changes_meaning(key) is None}


def check_keys(record: dict, used, messages=()):
    """ValueError if a key that is not used changes what a record, or a message, means.

    messages: the dialogue of the record. A key of another format may repeat what stands in it.
    """
    for key in record.keys() - set(used):
        if get_field(record, key) is None or record[key] in ([], {}, "[]", "{}"):
            continue
        known = key.lower() in FORMATS - {*LABELS}
        near = key.lower() in QUESTIONS if known else changes_meaning(key)
        if near and not repeats(record[key], messages):
            raise ValueError(f'"{key}" is not supported, and would change what the record means')


def repeats(value, messages) -> bool:
    """True if a value, a text or messages, says nothing that is not in a dialogue, but answers."""
    turns = value if isinstance(value, list) else [value]
    said = []
    for turn in turns:
        if not isinstance(turn, dict):
            said.append(turn)
        elif turn.get("role", turn.get("from")) not in ("assistant", "gpt", "chatgpt"):
            said.append(turn.get("content", turn.get("value")))
    contents = [message["content"] for message in messages]
    return all(
        isinstance(t, str) and any(t.strip() in content for content in contents) for t in said
    )


# --------------------------------------------------------------------------------- text of messages
# What other chat formats write where a turn begins: at the start of a line, or after another mark.
MARK = re.compile(
    r"""(?:^|</?s>|<bos>|<\|\w{1,40}\|>|<｜[^｜]{1,40}｜>|sop>?)[ \t]*
        (<\|(?:im_start|start_header_id|header_start|start_of_role|start_of_turn_token|start
             |user|assistant|system|human|prompter|bot)\|>|<start_of_turn>|<\|turn>
         |<｜(?:User|Assistant)｜>|<(?:human|bot|user|assistant)>:|\[\|(?:user|assistant)\|\]
         |<reserved_10[2367]>|<beginning_of_sentence>)""",
    re.MULTILINE | re.IGNORECASE | re.VERBOSE,
)
HASHES = r"\#\#\#?[ ]?(?:Response|Assistant|Answer)[ ]?:"
HUMAN = r"(?i:[\[*]{0,2}(?:GPT4[ ]Correct[ ])?(?:human|user|用户|问)[\]*]{0,2}[ ]?[:：])"
ASSISTANT = r"(?i:[\[*]{0,2}(?:GPT4[ ]Correct[ ])?(?:assistant|AI|bot|助手|答)[\]*]{0,2}[ ]?[:：])"
# Words are marks only in pairs, the second after the first: a log may have lines with "User:". A
# question may quote a whole dialogue, but it does not begin or end with it.
WORDS = [
    [re.compile(pattern, re.MULTILINE | re.VERBOSE) for pattern in pair]
    for pair in (
        (r"\A\s*\#\#\#[ ]?(?:Instruction|Human|User)[ ]?:", ""),
        ("", rf"{HASHES}\s*\Z"),
        (r"\#\#\#[ ]?(?:Instruction|Human|User|Question)[ ]?:", HASHES),
        (r"\bUSER:", r"\bASSISTANT:"),
        (rf"\A\s*{HUMAN}", rf"(?:^|>)[ \t]*{ASSISTANT}"),
        (rf"^[ \t]*{HUMAN}", rf"(?:^|>)[ \t]*{ASSISTANT}\s*\Z"),
    )
]
END = re.compile(  # of a text or a turn
    r"""</s>|<\|(?:\w{0,20}end\w{0,20}|eo\w{1,10}|return|pad)\|>|<｜end[^｜]{1,40}｜>
        |<(?:eos|pad|eo[tdamh]|end_of_(?:turn|sentence))>|<turn\|>|\[(?:EOS|PAD)\]""",
    re.IGNORECASE | re.VERBOSE,
)
BEGINNING = re.compile(  # of a text; <s> without a space after it is HTML
    r"\s*(?:<s>\s|<bos>|<\|(?:begin|start)_?of_?text\|>|<｜begin[^｜]{1,40}｜>)\s*", re.IGNORECASE
)
LISTED = re.compile(  # messages, or one message, that a table turned into text
    r"""["']?(?:array\()?\[?\s*\{(?=.*["'](?:content|value|text)\\?["']\s*:).*
        ["'](?:role|from)\\?["']\s*:\s*\\?["']
        (?:system|human|user|gpt|assistant|tool|developer|function)\\?["'].*\}[^}]*\Z
        |\[\w{0,40}Message\(\w{1,20}=.*\)\]\Z""",
    re.DOTALL | re.VERBOSE,
)


def find_mark(text: str, is_answer: bool = False) -> str | None:
    """What shows that a text is a dialogue of another chat format, if it is one.

    An answer may quote such a mark, but not begin with one.
    """
    text = "\n".join(text.strip().splitlines())  # whatever ends a line
    if LISTED.match(text):
        return text[:20]
    if is_answer:
        mark = re.match(HASHES, text, re.VERBOSE) or MARK.match(text)
        return mark and mark[0]
    mark = MARK.search(text)
    if mark:
        return mark[1]
    for first, second in WORDS:
        start = first.search(text)
        end = start and second.search(text, start.end())
        if end:
            return (start[0] or end[0]).strip()
    return None


def check_text(content, i: int, is_answer: bool = False):
    """ValueError unless message i is text, and no dialogue of another chat format.

    SkipRecord for a message without text. That of an empty answer depends on its use.
    """
    if not isinstance(content, str):
        raise ValueError(f"message {i} is not a string")
    if not is_answer and BLANK.fullmatch(content):
        raise SkipRecord("an empty message")
    mark = find_mark(content, is_answer)
    if mark:
        raise ValueError(
            f"message {i} contains {mark!r}, a mark of another chat format: give "
            "the dialogue as messages"
        )


def without_ends(text: str) -> str:
    """A text without the marks of other chat formats at both ends. HTML's <s>...</s> stays."""
    start = BEGINNING.match(text)
    text = text[start.end() :] if start else text
    while "<s>" not in text:
        stripped = text.rstrip()
        at = max(stripped.rfind("<"), stripped.rfind("["))
        if at < 0 or not END.fullmatch(stripped, at):
            break
        text = stripped[:at]
    return text
