"""Personal details in texts (§4.1): e-mail addresses, telephone numbers and street addresses.

A telephone number is known by its shape. Dates, ranges of years, ISBNs, decimals, tables and parts
of longer numbers have other shapes. docs/DATA.md says how often these rules are right.

ours, because the paper does not say how it finds sites with much personal information.
"""

import re
from collections import Counter

KINDS = ("e-mail", "telephone", "address")

# The lookbehinds and the limits keep all searches linear in the text's length.
EMAIL = re.compile(
    r"""(?<![\w.+/-])(?!git@)(?=[\d_.+-]{0,63}[^\W\d_])[\w.+-]{1,64}    # has a letter
        @(?:[\w-]{1,63}\.){1,4}(?!(?:service|png|jpe?g|gif|svg|js|ts|py|so|json|html|css)\b)
        [^\W\d_]{2,24}(?![\w@(\[]|[.:/]\w)                                 # no URL, no call""",
    re.VERBOSE,
)

# Digits that may be one number: joined by at most one mark of telephone numbers.
DIGITS = re.compile(
    r"""(?<![\w.,/@#$€£=*<>^~+-])(?<![\d)][ :])(?:\+[ ]?)?\(?\+?[0-9]
        (?:(?:\)[ ]?-?[ ]?|[ ]?\(|[ ]?[-–‑/][ ]?|[. \xa0])?[0-9])*""",
    re.VERBOSE,
)
AFTER = re.compile(r"[ ]?(?:x|ext\.?)[ ]?\d|(?![\w@%°€£$*=<>+]|[-–.,:/]\w|[ ][%°€£$=])")
LONGEST = 40  # characters of a telephone number; more are a table
DATE = re.compile(
    r"(?<!\d)(?:(?:1[5-9]|20)\d\d([-./ ])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])([-./ ])(?:0?[1-9]|[12]\d|3[01])\2(?:1[5-9]|20)\d\d"
    r"|(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?!\d)"
)
YEARS = re.compile(r"(?<!\d)(?:1\d|20)\d\d ?[-–/] ?(?:1\d|20)\d\d(?!\d)")
# Shapes without a country code, as numbers of digits: (3) 3-4 is (555) 123-4567.
NATIONAL = re.compile(r"\(3\)[ -]?3[ .-]4|3-3-4|3\.3\.4|\(2\) ?[45][ -]4|3-4-4")
# Behind such a word, any shape will do; behind a verb, one with groups or a zero.
NAMED = re.compile(
    r"""\b(?:(?P<noun>(?:tele)?(?:phone|fono|fon|fax)|telef[oó]no?|tel|whatsapp|hotline)
        |mobile|mob|cell|handy|call|ring|dial|text|sms)
        (?:[ ](?:numbers?|nos?|nr|me|us|him|her|them|is|was|on|at|it)\b|[.:#]|[ ]){0,5}$""",
    re.VERBOSE | re.IGNORECASE,
)
# Behind such a word, the number is another one.
OTHER = re.compile(
    r"\b(?:ISBN(?:-1[03])?|ISSN|EAN|UPC|IBAN|DOI|ID|order|invoice|account|serial|ticket|case|part"
    r"|item|patent|batch|version|build|pages?|pp)(?: (?:numbers?|nos?|nr|is)\b|[.:#]| ){0,4}$",
    re.IGNORECASE,
)

STREET = re.compile(
    r"""(?<![\w.,/$#%-])(?P<number>[1-9]\d{0,4}[A-Za-z]?)[ ]
        (?!(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec))
        (?:[NSEW]\.[ ])?(?:[A-Z0-9][\w'’]{0,20}[ ]){1,3}
        (?<!Wheel[ ])(?<!Hard[ ])(?<!Disk[ ])(?<!Flash[ ])(?<!Right[ ])(?<!Milky[ ])
        (?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Boulevard|Blvd|Terrace|Crescent|Way)\b
        (?P<town>(?:[ ][NSEW]{1,2}\b)?,[ ][A-Z0-9])?""",
    re.VERBOSE,
)
YEAR = re.compile(r"1[5-9]\d\d|20\d\d")
# "Chapter 5 Main Street", "Windows 10 Hard Drive": the number belongs to the word before it.
OWNED = re.compile(
    r"\b(?!(?:At|To|Visit|Address)\b)[A-Z][\w.]* $"
    r"|\b(?:chapter|figure|table|section|page|version) $"
)
STATE = (
    "A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]"
    "|T[NX]|UT|V[AT]|W[AIVY]"
)
ADDRESS = re.compile(
    rf"""\b(?<![.,/-])\d{{1,4}}(?:[ ]bis)?,?[ ](?:rue|avenue|boulevard|place|quai)
            (?:[ ]d[eu]s?|[ ]la|[ ]l['’])*[ ]?[A-ZÀ-Ý]\w{{2,20}}            # 12, rue de la Paix
        |(?:[sS]tra(?:ß|ss)e|str\.|gasse|[aA]llee|weg)
            [ ]\d{{1,4}}(?:[ ]?[a-z])?\b(?![.,]?\d)                         # Hauptstraße 12
        |(?:Calle|Rua|Avenida|Piazza)[ ](?:d[aeio]s?[ ]|[A-Z]\w{{1,20}},?[ ]){{1,4}}
            \d{{1,4}}\b(?![.,]?\d)                                          # Calle Mayor 5
        |P\.?[ ]?O\.?[ ]Box[ ]\d{{1,6}}\b
        |,[ ](?:{STATE})[ ]\d{{5}}\b                                        # Springfield, IL 62704
    """,
    re.VERBOSE,
)


def is_telephone(number: str, before: str) -> bool:
    """True for the shape of a telephone number. before: the end of the text in front of it."""
    number = re.sub(r" ?([-–‑/]) ?", lambda mark: "/" if mark[1] == "/" else "-", number)
    groups = re.findall(r"\d+", number)
    digits = "".join(groups)
    is_padded = len(groups) > 2 and all(group[0] == "0" for group in groups)  # 0010 0020 0030
    is_other = is_padded or digits.endswith("000000") or re.fullmatch(r"\+?\d+\.\d+", number)
    if is_other or DATE.search(number) or YEARS.search(number):
        return False
    if word := NAMED.search(before):
        has_shape = len(digits) > 6 and (len(groups) > 1 or number[0] in "+0")
        return 6 <= len(digits) <= 15 and (word["noun"] is not None or has_shape)
    if OTHER.search(before):
        return False
    if "+" in number or (digits[:2] == "00" and 2 < len(groups[0]) < 6):
        digits = digits.removeprefix("00")
        if digits[0] == "1":  # North America: 1, then an area code from 200
            return len(digits) == 11 and digits[1] > "1"
        return digits[0] != "0" and 9 <= len(digits) <= 15
    if re.match(r"\(?0[1-9]", number):
        first, *marks = re.findall(r"(?<=\d)\D+(?=\d)", number) or [""]
        longest = 12 if len(groups) == 2 else 11
        is_short = len(groups) == 2 and len(groups[1]) < 5  # the ZIP code 02110-1301
        dotted = first == "." and (len(groups) != 5 or set(marks) != {"."})  # 01.23.45.67.89
        return (
            1 < len(groups) < 6
            and 9 <= len(digits) <= longest
            and len(groups[0]) < 6
            and min(map(len, groups)) > 1
            and not dotted
            and not is_short
            and len(set(marks)) <= 1
            and set(marks) <= {" ", "-", "."}
        )
    number = re.sub(r"^1[ .-]", "", number)  # the prefix of long-distance calls in North America
    return bool(NATIONAL.fullmatch(re.sub(r"\d+", lambda group: str(len(group[0])), number)))


def telephones(text: str) -> list[str]:
    """The telephone numbers in a text."""
    found = []
    for match in DIGITS.finditer(text):
        start, end = match.span()
        if 6 <= end - start <= LONGEST and AFTER.match(text, end):
            number = match[0].replace("\xa0", " ")
            if ")" not in number:  # the bracket is around more than the area code
                number = number.lstrip("(")
            if is_telephone(number, text[max(start - 40, 0) : start]):
                found.append(number)
    return found


def addresses(text: str) -> list[str]:
    """The street addresses, post office boxes and US towns with a ZIP code in a text."""
    found = [match[0] for match in ADDRESS.finditer(text)]
    for match in STREET.finditer(text):
        # "1929 Wall Street" may be an event of that year, unless a town follows.
        is_year = YEAR.fullmatch(match["number"]) and not match["town"]
        if not is_year and not OWNED.search(text[max(match.start() - 30, 0) : match.start()]):
            found.append(match[0])
    return found


def count_details(text: str) -> Counter:
    """{kind of personal details: how many of them the text has}."""
    # Most texts have no "@". To look for it is much faster than the pattern.
    emails = EMAIL.findall(text) if "@" in text else []
    counts = map(len, (emails, telephones(text), addresses(text)))
    return Counter(dict(zip(KINDS, counts)))


class Sites:
    """Finds sites most of whose pages are personal. Memory grows with the number of hosts."""

    def __init__(self, limit: float):
        """limit: details per 1,000 characters of a page that is not personal; 0: no limit."""
        self.limit = limit
        self.hosts = {}  # {host: counts of all its pages}
        self.documents = {}  # {personal document without url: its counts}

    def add(self, document):
        """Count the details of a data.texts.Document."""
        if self.limit == 0:
            return
        counts = count_details(document.text)
        is_personal = counts.total() > self.limit * len(document.text) / 1000
        counts.update({"characters": len(document.text), "pages": 1, "personal pages": is_personal})
        if document.host:
            self.hosts.setdefault(document.host, Counter()).update(counts)
        elif self.is_personal(counts):
            self.documents[document.where] = counts

    def is_personal(self, counts) -> bool:
        """True if there are at least 3 details, and more than half of the pages are personal."""
        details = sum(counts[kind] for kind in KINDS)
        return details >= 3 and counts["personal pages"] > counts["pages"] / 2

    def to_leave_out(self) -> dict[str, Counter]:
        """{site: its counts} of all personal sites."""
        hosts = {host: counts for host, counts in self.hosts.items() if self.is_personal(counts)}
        return self.documents | hosts
