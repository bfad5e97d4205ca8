"""Finds items by what people call them: ids as text, titles, categories."""

import difflib
import heapq
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from cotrain.data.catalog import Catalog
from cotrain.errors import ConfigError, DataError, some_of

Kind = Literal["id", "title"]
# Longer histories, names and lists are no input of a person, and would only cost time.
MAX_NAMED, MAX_NAME_CHARACTERS, MAX_LIST_BYTES = 10_000, 1000, 2**28
# Titles that are compared letter by letter with one that is not known, and letters of each.
_COMPARED, _COMPARED_ALL, _LETTERS = 200, 50_000, 100


class ItemLookup:
    """Names of a catalogue's items.

    Args:
        catalog: The items.
    """

    def __init__(self, catalog: Catalog):
        self.catalog = catalog

    @cached_property
    def by_id(self) -> dict[str, int]:
        """Item index of each raw id as text."""
        return {str(item): index for index, item in enumerate(self.catalog.item_ids) if index}

    @cached_property
    def by_title(self) -> dict[str, list[int]]:
        """Item indices of each title, in the form that `folded` gives it."""
        found: dict[str, list[int]] = {}
        for index, title in enumerate(self.catalog.titles[1:], start=1):
            found.setdefault(folded(title), []).append(index)
        return found

    def indices(self, names: Sequence[tuple[Kind, str]]) -> np.ndarray:
        """Item indices of what a person named.

        Args:
            names: Each an id or a title, oldest first. Case and spaces of titles do not matter.

        Returns:
            (n,) int64.

        Raises:
            DataError: Some are unknown, or titles of several items; all of them are named, with
                the nearest known titles. Or there are none, too many, or endless ones.
        """
        if not names:
            raise DataError("No item is named. Expected one or more, oldest first.")
        if len(names) > MAX_NAMED:
            raise DataError(
                f"{len(names):,} items are named; expected at most {MAX_NAMED:,}. Longer histories "
                "belong into a file: --histories FILE."
            )
        found, problems = [], []
        for kind, text in names:
            if len(text) > MAX_NAME_CHARACTERS:
                problems.append(
                    f"{text[:40]!r}… has {len(text):,} characters, expected at most "
                    f"{MAX_NAME_CHARACTERS:,}"
                )
                continue
            index, problem = self._by_id(text) if kind == "id" else self._by_title(text)
            found.append(index)
            problems += [problem] if problem else []
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems[:5])
            more = f"\n  … ({len(problems)} in all)" if len(problems) > 5 else ""
            raise DataError(
                f"{len(problems)} of {len(names)} named items cannot be found among "
                f"{len(self.catalog) - 1:,}:\n{listed}{more}\nExpected ids, or titles of one item "
                "each, as the catalogue has them."
            )
        return np.array(found, np.int64)

    def _by_id(self, text: str) -> tuple[int, str]:
        index = self.by_id.get(text.strip(), 0)
        examples = some_of(self.catalog.item_ids[1:4])
        return (
            index,
            "" if index else f"no item has the id {text.strip()!r}; ids are like {examples}",
        )

    def _by_title(self, text: str) -> tuple[int, str]:
        found = self.by_title.get(folded(text), [])
        if len(found) == 1:
            return found[0], ""
        if found:
            ids = some_of(self.catalog.item_ids[index] for index in found)
            return 0, f"{len(found)} items are called {text!r}: name one by its id, of {ids}"
        near = some_of(self.nearest_titles(text))
        return 0, f"no item is called {text!r}" + (f"; the nearest are {near}" if near else "")

    def nearest_titles(self, text: str, count: int = 3) -> list[str]:
        """Titles most like a text, best first: of those that share the most words with it, by
        letters."""
        wanted = folded(text)[:_LETTERS]
        words = set(_words(wanted))
        shares = ((len(words.intersection(_words(title))), title) for title in self.by_title)
        pool = [title for share, title in heapq.nlargest(_COMPARED, shares) if share]
        pool = pool or list(self.by_title)[:_COMPARED_ALL]
        short: dict[str, str] = {}
        for title in pool:
            short.setdefault(title[:_LETTERS], title)
        near = difflib.get_close_matches(wanted, short, n=count, cutoff=0.3)
        return [self.catalog.titles[self.by_title[short[title]][0]] for title in near]

    def allowed(
        self,
        categories: Sequence[str] = (),
        allow: Path | None = None,
        deny: Path | None = None,
        strict: bool = False,
    ) -> tuple[np.ndarray | None, list[str]]:
        """Which items may be recommended.

        Args:
            categories: Only items of one of these, if there are any.
            allow: File with the ids of the only items, one a line.
            deny: File with the ids of items that are left out, one a line.
            strict: Ids that the catalogue lacks are an error and not a note.

        Returns:
            (V,) bool by item index, None where nothing is filtered; and notes on ids in the files
            that no item has.

        Raises:
            DataError: A file cannot be read or holds no known id, a category is unknown, or
                nothing is left.
        """
        if not categories and allow is None and deny is None:
            return None, []
        notes: list[str] = []
        allowed = np.ones(len(self.catalog), bool)
        if categories:
            allowed &= self._of_categories(categories)
        for path, option in ((allow, "--allow"), (deny, "--deny")):
            if path is not None:
                listed = self._listed(path, option, strict, notes)
                allowed &= listed if option == "--allow" else ~listed
        allowed[0] = False
        if not allowed.any():
            raise DataError(
                f"The filters leave none of {len(self.catalog) - 1:,} items: --categories, "
                "--allow and --deny together rule out everything. Loosen one of them."
            )
        return allowed, notes

    def _of_categories(self, wanted: Sequence[str]) -> np.ndarray:
        of_items = [
            {folded(name) for name in joined.split("|")} - {""}
            for joined in self.catalog.categories
        ]
        known = {
            folded(name): name for joined in self.catalog.categories for name in joined.split("|")
        }
        known.pop("", None)
        if not known:
            raise DataError("The items have no categories, so --categories has nothing to go by.")
        unknown = [name for name in wanted if folded(name) not in known]
        if unknown:
            near = difflib.get_close_matches(folded(unknown[0][:_LETTERS]), known, n=3)
            some = [known[name] for name in near or sorted(known)]
            raise DataError(
                f"No item is of the category {some_of(name[:80] for name in unknown)}. Expected of "
                f"{len(known):,} known ones, such as {some_of(some)}."
            )
        names = {folded(name) for name in wanted}
        return np.array([bool(names & own) for own in of_items])

    def _listed(self, path: Path, option: str, strict: bool, notes: list[str]) -> np.ndarray:
        listed = np.zeros(len(self.catalog), bool)
        texts = read_ids(path, option)
        unknown = [text for text in texts if text not in self.by_id]
        if unknown and (strict or len(unknown) == len(texts)):
            raise DataError(
                f"{len(unknown):,} of {len(texts):,} ids in {option} {path} belong to no item: "
                f"{some_of(text[:80] for text in unknown)}. Expected ids such as "
                f"{some_of(self.catalog.item_ids[1:4])}, one a line."
            )
        if unknown:
            notes.append(
                f"{len(unknown):,} of {len(texts):,} ids in {path} belong to no item and were "
                f"skipped: {some_of(text[:80] for text in unknown)}."
            )
        listed[[self.by_id[text] for text in texts if text in self.by_id]] = True
        return listed


def folded(text: str) -> str:
    """Without differences of case and spaces."""
    return " ".join(text.casefold().split())


def _words(text: str) -> Iterable[str]:
    return re.findall(r"\w{2,}", text)


def read_ids(path: Path, option: str) -> list[str]:
    """Ids as text, one a line, without blanks.

    Raises:
        ConfigError: No such file.
        DataError: It is no text, too large, or empty.
    """
    if not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file. Expected ids, one a line.")
    if path.stat().st_size > MAX_LIST_BYTES:
        raise DataError(
            f"{option} {path} has {path.stat().st_size / 2**20:,.0f} MiB; expected ids, one a "
            f"line, of at most {MAX_LIST_BYTES / 2**20:,.0f} MiB."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{option} {path} cannot be read as UTF-8 text: {error}. Expected ids, one a line."
        ) from error
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{option} {path} is empty. Expected ids, one a line.")
    return ids
