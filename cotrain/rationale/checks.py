"""Whether a rationale keeps to what it was told: no titles but those that it was shown, nothing
empty, refused, said again and again, too short or too long, or in another language."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

FLAGS = {
    "empty": "nothing was written",
    "refusal": "the model excused itself",
    "foreign_title": "names an item that is neither in the history nor the target",
    "foreign_category": "names a category that neither history nor target is in",
    "repeats": "says the same again and again",
    "echo": "repeats the question or its layout",
    "too_short": "fewer words than rationale.min_words",
    "too_long": "more words than rationale.max_words",
    "unfinished": "cut off at rationale.max_tokens before its first sentence ended",
    "language": "not in rationale.language",
}

Words = tuple[str, ...]

# Titles are told apart by their first words: what follows is colour, size or subtitle.
_TITLE_WORDS = 6
# Fewer words than that do not tell a language.
_LANGUAGE_WORDS = 6
# With more categories than a list of genres has, those of one word, such as Sets or Face, are words
# of any sentence unless they are written with a capital.
_GENRES = 100
# Names of categories that are words of any sentence.
_PLAIN_CATEGORIES = {("unknown",), ("other",), ("general",), ("new",), ("all",)}
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_ARTICLES = "The|A|An|Le|La|Les|L'|Il|El|Los|Las|Der|Die|Das|Det|Den"
_LAST_ARTICLE = re.compile(rf"^(.*), ({_ARTICLES})$", re.IGNORECASE)
_YEAR = re.compile(r"\s*\((?:19|20)\d\d\)")
_ASIDE = re.compile(r"\s*\([^()]*\)")
_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|i apologi[sz]e|as an ai|ai language model|i can(?:no|')t|"
    r"i am (?:not able|unable)|i'm (?:not able|unable)|unable to (?:provide|answer|determine))\b",
    re.IGNORECASE,
)
_ECHO = re.compile(
    r"use only facts|name no (?:other )?(?:titles|products)|in one (?:short|or two)|oldest first|"
    r"below are the|candidates:|<\||\|>|^\s*[-*] |\s\|\s|===|\bassistant\b:?$",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTED = re.compile(r"[\"“”«»]([^\"“”«»\n]{1,120})[\"“”«»]|(?<!\w)\*{1,2}([^*\n]{1,120})\*{1,2}")
_BEFORE_YEAR = re.compile(r"([^.!?\"“”()\n]{1,100}?)\s*\((?:19|20)\d\d\)")


def words_of(text: str) -> Words:
    """Lower-case words, without accents' ways of being written, and without punctuation."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    return tuple(word.lower() for word in _WORD.findall(text))


def names_of(title: str) -> list[Words]:
    """What a title may be called: without its year and asides, its article in front; and by its
    part before a colon, where that has two words or more."""
    name = _ASIDE.sub("", _YEAR.sub("", title)).strip()
    if found := _LAST_ARTICLE.match(name):
        name = f"{found[2]} {found[1]}"
    names = [words_of(name)]
    head, colon, _ = name.partition(":")
    if colon and len(words_of(head)) >= 2:
        names.append(words_of(head))
    return [words for words in names if words]


@lru_cache(maxsize=2**14)
def _all_names_of(title: str) -> list[Words]:
    """Also as the table writes it, "Matrix, The (1999)", and by its asides."""
    asides = [aside.strip(" ()") for aside in _ASIDE.findall(_YEAR.sub("", title))]
    names = [words_of(title), *(name for text in (title, *asides) for name in names_of(text))]
    return [words for words in names if words]


class Checks:
    """Looks at one rationale after another.

    Args:
        titles: Title of each item index; index 0 is padding.
        categories: Of each, joined by a bar.
        min_words, max_words: Of a rationale.
        language: ISO 639-1 code, or None: any.
    """

    def __init__(
        self,
        titles: Sequence[str],
        categories: Sequence[str],
        *,
        min_words: int,
        max_words: int,
        language: str | None,
    ):
        self._titles = titles
        self._categories = categories
        self._all_categories = {
            name
            for joined in set(categories)
            for category in joined.split("|")
            if (name := words_of(category)) and name not in _PLAIN_CATEGORIES
        }
        self._longest_category = max(map(len, self._all_categories), default=0)
        self._genres = len(self._all_categories) <= _GENRES
        self._min_words, self._max_words = min_words, max_words
        # Numbers in place of the words: 8 bytes a title. Names of one word are words of the
        # language too often; they count only where quotes or a year mark them as titles.
        known = {
            hash(name[:_TITLE_WORDS])
            for title in titles[1:]
            for name in names_of(title)
            if len(name) >= 2
        }
        self._known = np.array(sorted(known), dtype=np.int64)
        self._language = language
        self._identify = _identifier() if language is not None else None

    def flags(self, text: str, history: Sequence[int], target: int, ended: bool) -> list[str]:
        """What is wrong with a text, by the names of `FLAGS`.

        Args:
            text: The rationale.
            history: Item indices that it was shown.
            target: The item that it is about.
            ended: Whether it came to an end.
        """
        words = words_of(text)
        if not words:
            return ["empty"]
        shown = {*history, target}
        own = {name for item in shown for name in _all_names_of(self._titles[item])}
        found = {
            "refusal": bool(_REFUSAL.search(text.replace("’", "'"))),
            "foreign_title": self._names_others(text, own),
            "foreign_category": self._names_other_categories(text, shown, own),
            "repeats": _repeats(words),
            "echo": bool(_ECHO.search(text)),
            "too_short": len(words) < self._min_words,
            "too_long": len(words) > self._max_words,
            "unfinished": not ended,
            "language": self._is_foreign(text, own),
        }
        return [flag for flag, holds in found.items() if holds]

    def _names_others(self, text: str, own: set[Words]) -> bool:
        return any(not _belongs(name, own) for name in self._named(text))

    def _names_other_categories(self, text: str, shown: set[int], own: set[Words]) -> bool:
        words = words_of(text)
        of_shown = {
            name
            for item in shown
            for category in self._categories[item].split("|")
            if (name := words_of(category))  # no words are part of any
        }
        named = {
            words[start : start + size]
            for size in range(1, self._longest_category + 1)
            for start in range(len(words) - size + 1)
        }
        # A category that is part of one that was shown, or of a title, says nothing new.
        others = [name for name in named & self._all_categories
                  if not _belongs(name, of_shown | own)]  # fmt: skip
        return any(more or self._genres or _as_a_name(word, text) for word, *more in others)

    def _named(self, text: str) -> Iterable[Words]:
        """Everything in a text that looks like the name of an item."""
        for quoted in _QUOTED.finditer(text):
            phrase = (quoted[1] or quoted[2]).strip(" ,.;:!?")
            if phrase[:1].isupper() or phrase[:1].isdigit():
                yield from names_of(phrase)
        for dated in _BEFORE_YEAR.finditer(text):
            name = _capitalised_end(dated[1])
            if name:
                yield name
        yield from self._known_names(text)

    def _known_names(self, text: str) -> Iterable[Words]:
        """Names of the catalogue, of two words or more, written with capitals."""
        text = unicodedata.normalize("NFKC", text).replace("’", "'")
        found = list(_WORD.finditer(text))
        written = [match[0] for match in found]
        lower = [word.lower() for word in written]
        spans = [
            (start, start + size)
            for start in range(len(written))
            if written[start][0].isupper() or written[start][0].isdigit()
            for size in range(2, _TITLE_WORDS + 1)
            if start + size <= len(written)
            # Of a longer title these are the first words, and any word may be the last of them.
            and (
                size == _TITLE_WORDS
                or written[start + size - 1][0].isupper()
                or written[start + size - 1][0].isdigit()
            )
        ]
        if not spans or not len(self._known):
            return
        hashes = np.array([hash(tuple(lower[start:end])) for start, end in spans], np.int64)
        places = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
        for (start, end), known in zip(spans, self._known[places] == hashes, strict=True):
            # The beginning of a sentence is a capital without a name: "A Few", "The Game is".
            if known and (end - start > 2 or start == 0 or not _opens(text, found[start].start())):
                yield tuple(lower[start:end])

    def _is_foreign(self, text: str, own: set[Words]) -> bool:
        if self._identify is None:
            return False
        # Titles may be in any language.
        names = {word for name in own for word in name}
        left = " ".join(word for word in words_of(text) if word not in names)
        if len(left.split()) < _LANGUAGE_WORDS:
            return False
        language, probability = self._identify(left)
        return language != self._language and probability > 0.9


def _belongs(name: Words, own: set[Words]) -> bool:
    """Whether a name is one of its own, part of one, or one with words around."""
    return any(_within(name, other) or _within(other, name) for other in own)


def _within(short: Words, long: Words) -> bool:
    size = len(short)
    return any(long[start : start + size] == short for start in range(len(long) - size + 1))


def _as_a_name(word: str, text: str) -> bool:
    """Whether a lower-case word stands in a text with a capital, and not to open a sentence."""
    return any(
        match[0].lower() == word and match[0][0].isupper() and not _opens(text, match.start())
        for match in _WORD.finditer(text)
    )


def _opens(text: str, place: int) -> bool:
    before = text[:place].rstrip(" \"“'(")
    return not before or before[-1] in ".!?:\n"


def _capitalised_end(text: str) -> Words:
    """The words at the end of a text that are written as a name is: from a capital on, with small
    words between capitals."""
    words = _WORD.findall(text)
    start = len(words)
    for place in range(len(words) - 1, -1, -1):
        if words[place][0].isupper() or words[place][0].isdigit():
            start = place
        elif words[place] not in ("of", "the", "and", "a", "in", "to", "for", "on", "with", "from"):
            break
    return tuple(word.lower() for word in words[start:])


def _repeats(words: Words) -> bool:
    """Whether a fifth of all runs of four words have been there before, or one word three times in
    a row."""
    if any(a == b == c for (a, b), (_, c) in pairwise(pairwise(words))):
        return True
    runs = [words[start : start + 4] for start in range(len(words) - 3)]
    return len(runs) >= 5 and len(set(runs)) <= 0.8 * len(runs)


def _identifier():
    # Here, because its model takes a moment to read.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
