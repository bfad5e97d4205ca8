"""What the checks find in a rationale: what each flag is for, and that clean text has none."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.data.interactions import InteractionData
from cotrain.rationale.checks import FLAGS, Checks, names_of

# Index, title and categories; 1 to 4 are shown in every test, 4 is the target.
ITEMS = [
    ("", ""),
    ("Matrix, The (1999)", "Action|Sci-Fi"),
    ("Star Wars: A New Hope (1977)", "Action|Adventure"),
    ("Postino, Il (Postman, The) (1994)", "Drama"),
    ("Heat (1995)", "Crime|Drama"),
    ("Three Colors: Red (1994)", "Romance"),
    ("Game, The (1997)", "Mystery|Thriller"),
    ("Fargo (1996)", "Film-Noir"),
    ("Red Rock West (1992)", "Western"),
    ("Big Night (1996)", ""),
    ("2001: A Space Odyssey (1968)", "Mystery"),
    ("Untitled", "unknown"),
    ("O'Brien’s Law (1990)", "Horror"),
]
TITLES = [title for title, _ in ITEMS]
CATEGORIES = [category for _, category in ITEMS]
HISTORY, TARGET = [1, 2, 3], 4

CLEAN = "This user chose it because it is a tense story of two men, dark like the ones before it."


def checks_of(
    titles: list[str] = TITLES, categories: list[str] = CATEGORIES, **changes: Any
) -> Checks:
    limits: dict[str, Any] = {"min_words": 6, "max_words": 40, "language": None}
    return Checks(titles, categories, **limits | changes)


@pytest.fixture(scope="module")
def checks() -> Checks:
    return checks_of()


@pytest.fixture(scope="module")
def english() -> Checks:
    return checks_of(language="en")


def flags_of(checks: Checks, text: str, ended: bool = True) -> list[str]:
    return checks.flags(text, HISTORY, TARGET, ended)


# ---- clean --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        CLEAN,
        "They watched it because it tells of a robbery, with the action and drama they like.",
        "This user chose it because it is slow and quiet. A few of the others are, too.",
        "It has the same dark mood as “The Matrix”, which this user took before.",
        "It's a crime drama that's as tense as what the user's last choices were.",
        "Like three of the earlier choices it was made in the 1990s (mostly 1994).",
    ],
)
def test_clean_text_has_no_flag(english: Checks, text: str):
    assert flags_of(english, text) == []


# ---- one flag each ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n\t", "…", "?!", "_", "***", "- –"])
def test_nothing_is_nothing_else_beside(checks: Checks, text: str):
    assert flags_of(checks, text, ended=False) == ["empty"]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but the reasons of this user are not known to me.",
        "I’m sorry, but the reasons of this user are not known to me.",
        "I apologise, but there is too little here to say why.",
        "As an AI I have no way of seeing into the heads of users.",
        "It is something that I cannot say from these titles alone.",
        "It is something that I can’t say from these titles alone.",
        "I am unable to tell from these what moved this user.",
        "Unfortunately I'm not able to tell what moved this user.",
    ],
)
def test_excuses_are_refusals(checks: Checks, text: str):
    assert flags_of(checks, text) == ["refusal"]


def test_sorrow_in_a_story_is_no_refusal(checks: Checks):
    text = "It is about a sorry man who cannot sleep, apologises to all, and is able to laugh."
    assert flags_of(checks, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "It is dark and dark and it is dark and dark and it is dark and dark and it is dark.",
        "It is a very very very tense story about two men.",
        "A story of crime in the city. A story of crime in the city. A story of crime.",
    ],
)
def test_saying_it_again_and_again_repeats(checks: Checks, text: str):
    assert flags_of(checks, text) == ["repeats"]


def test_a_few_words_said_twice_do_not_repeat(checks: Checks):
    text = "It is a tense story of two men, and it is a tense story of the city that made them so."
    assert flags_of(checks, text) == []
    assert flags_of(checks, "They like very, very long films about men who talk.") == []


@pytest.mark.parametrize(
    "text",
    [
        "Use only facts, and name no titles; it is a story of two men.",
        "- It is a story of two men in a city.",
        "It is a story of two men.\n  * It is like the ones before it.",
        "It is a story of two men | Crime, Drama, as before.",
        "It is a story of two men in a city.<|im_end|>",
        "It is a story of two men in a city.\nassistant",
        "=== question: why did they like the story of two men?",
        "Below are the last choices of a user, and why they were made.",
    ],
)
def test_the_question_and_its_layout_are_an_echo(checks: Checks, text: str):
    assert flags_of(checks, text) == ["echo"]


def test_dashes_within_a_sentence_are_no_echo(checks: Checks):
    assert flags_of(checks, "It is well-made - dark, tense - and about two men.") == []
    assert flags_of(checks, "It is a voice assistant for the kitchen, like the earlier one.") == []


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, "too_short"), (5, "too_short"), (6, None), (40, None), (41, "too_long")],
)
def test_words_are_counted_with_both_limits_allowed(
    checks: Checks, count: int, expected: str | None
):
    text = " ".join(f"word{number}," for number in range(count))
    assert flags_of(checks, text) == ([] if expected is None else [expected])


def test_what_was_cut_off_is_unfinished(checks: Checks):
    assert flags_of(checks, CLEAN[:60], ended=False) == ["unfinished"]


def test_every_flag_that_holds_is_named_in_the_order_of_the_meanings(english: Checks):
    text = "I'm sorry sorry sorry: - Fargo (1996) <| Western"
    found = flags_of(english, text, ended=False)
    assert found == [
        "refusal", "foreign_title", "foreign_category", "repeats", "echo", "unfinished",
    ]  # fmt: skip
    assert found == [flag for flag in FLAGS if flag in found]


# ---- titles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Matrix, The (1999)", ["the matrix"]),
        ("Heat", ["heat"]),
        ("Postino, Il (Postman, The) (1994)", ["il postino"]),
        ("Star Wars: A New Hope (1977)", ["star wars a new hope", "star wars"]),
        # One word before a colon is a word of any sentence.
        ("2001: A Space Odyssey (1968)", ["2001 a space odyssey"]),
        ("Lost World: Jurassic Park, The (1997)",
         ["the lost world jurassic park", "the lost world"]),
        ("O'Brien’s Law", ["o'brien's law"]),
        ("Pasta, A Guide", ["pasta a guide"]),
        ("1984 (1984)", ["1984"]),
        ("(1999)", []),
        ("?", []),
    ],
)  # fmt: skip
def test_what_titles_may_be_called(title: str, names: list[str]):
    assert [" ".join(words) for words in names_of(title)] == names


@pytest.mark.parametrize(
    "named",
    [
        # The article where people say it, with and without year.
        "The Matrix", "“The Matrix”", "The Matrix (1999)", "“The Matrix (1999)”", "*The Matrix*",
        # As the table writes it.
        "Matrix, The (1999)", "“Matrix, The (1999)”", "Matrix, The", "Il Postino",
        "Postino, Il (Postman, The) (1994)", "“Postman, The”", "The Postman (1994)",
        # Whole, without its subtitle, and either with words around.
        "Star Wars: A New Hope", "Star Wars", "“Star Wars”", "**Star Wars**", "Star Wars (1977)",
        "“A New Hope”", "the Star Wars Saga", "“Star Wars Saga”",
        "“Heat”", "Heat", "Heat (1995)", "Michael Mann's Heat (1995)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["It is as tense as {} was for them.", "{} is as tense to them."])
def test_titles_that_were_shown_may_be_named(checks: Checks, named: str, frame: str):
    assert flags_of(checks, frame.format(named)) == []


@pytest.mark.parametrize(
    "named",
    [
        "The Game", "“The Game”", "The Game (1997)", "“Game, The”", "Game, The (1997)",
        "Three Colors", "Three Colors: Red", "Red Rock West", "Big Night", "*Big Night*",
        "2001: A Space Odyssey", "O’Brien's Law",
        # One word: where quotes, stars or a year mark it.
        "“Fargo”", '"Fargo"', "«Fargo»", "*Fargo*", "**Fargo**", "Fargo (1996)", "“Fargo,”",
        # Of no table, but marked.
        "“Some Other Film”", "Some Other Film (1988)", "Some Film of the Other (2004)",
    ],
)  # fmt: skip
def test_titles_that_were_not_shown_are_foreign(checks: Checks, named: str):
    assert flags_of(checks, f"It is as tense as {named} was for them.") == ["foreign_title"]


@pytest.mark.parametrize(
    "text",
    [
        "It is set far from Fargo in the snow, and is dark like the others.",
        "It has a big night in it, and plays the game that the three colors play.",
        "It is “as tense as can be”, and “a feast”, like the others.",
        "It was the best of the year (1995), they say, and dark like the others.",
        "It is tense *as can be*, and **dark** like the others.",
    ],
)
def test_words_that_are_not_marked_as_titles_are_words(checks: Checks, text: str):
    assert flags_of(checks, text) == []


def test_two_words_that_open_a_sentence_may_be_a_title_by_accident(checks: Checks):
    assert flags_of(checks, "This is one long evening. Big Night for all who were there.") == []
    assert flags_of(checks, "It is tense: “Big Night for all who were there” it says.") == [
        "foreign_title"
    ]
    # Three are no accident, and a text that begins with a title is about it.
    assert "foreign_title" in flags_of(checks, "This is one long day. Red Rock West was longer.")
    assert "foreign_title" in flags_of(checks, "Big Night was as long to this user.")


def test_what_counts_is_what_was_shown_and_not_what_there_is(checks: Checks):
    text = "It is as dark as Big Night was for them."
    assert checks.flags(text, [9], TARGET, True) == []
    assert checks.flags(text, [1], 9, True) == []
    assert checks.flags(text, [], TARGET, True) == ["foreign_title"]


def test_a_long_title_is_known_by_its_first_words():
    """Those that went on after a sixth word in small letters were not seen."""
    titles = ["", "Grey Wool Scarf for Men and Women, 180 cm", "Blue Cotton Cap"]
    checks = checks_of(titles, [""] * 3)
    text = "It goes with the Grey Wool Scarf for Men and Women that this customer has."
    assert checks.flags(text, [], 2, True) == ["foreign_title"]
    assert checks.flags(text, [1], 2, True) == []
    whole = f"It goes with the {titles[1]} of this customer."
    assert checks.flags(whole, [], 2, True) == ["foreign_title"]
    assert checks.flags(whole, [1], 2, True) == []


def test_every_title_of_movielens_may_be_named_as_it_is_written(ml100k: InteractionData):
    """Among them "Maybe, Maybe Not (Der Bewegte Mann)", whose aside is another's title."""
    catalog = ml100k.catalog
    checks = checks_of(catalog.titles, catalog.categories, min_words=1)
    for item, title in enumerate(catalog.titles[1:], start=1):
        for text in (title, f"They liked {title} too.", f"They liked “{title}” too."):
            found = checks.flags(text, [], item, True)
            assert not {"foreign_title", "foreign_category"} & set(found), text


# ---- categories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["western", "Western", "film-noir", "Film Noir", "mystery"])
def test_a_category_of_neither_history_nor_target_is_foreign(checks: Checks, name: str):
    assert flags_of(checks, f"It is a {name} as tense as those before.") == ["foreign_category"]


@pytest.mark.parametrize("name", ["action", "Sci-Fi", "adventure", "crime drama", "unknown"])
def test_categories_that_were_shown_may_be_named(checks: Checks, name: str):
    assert flags_of(checks, f"It is one more {name} as tense as those before.") == []


def test_a_category_that_is_part_of_what_was_shown_is_not_foreign():
    titles = ["", "A Horror of Weddings", "Kettle", "Pan", "Ghosts"]
    categories = ["", "Comedy", "Home & Kitchen", "Kitchen", "Horror"]
    checks = checks_of(titles, categories)
    assert checks.flags("It is something for the kitchen, as before.", [1], 2, True) == []
    assert checks.flags("It has a horror of weddings that is funny.", [2], 1, True) == []
    assert checks.flags("It has the horror that is in all kitchens.", [2], 3, True) == [
        "foreign_category"
    ]


def test_of_a_shop_with_many_categories_one_plain_word_is_no_name():
    """Regression: "a feature that sets it apart" was taken for the category Sets."""
    titles = ["", "Comb", "Brush"]
    many = "|".join(f"Shelf {number}" for number in range(120))
    checks = checks_of(titles, ["", f"Hair|{many}", "Sets|Bath Salts"])
    for text in ("It has a unique feature that sets it apart.", "Sets like it come with a comb."):
        assert checks.flags(text, [], 1, True) == []
    for text in (
        "It is sold among the Sets of this shop.",
        "It smells of bath salts, cheaply.",
    ):
        assert checks.flags(text, [], 1, True) == ["foreign_category"]


def test_an_item_without_categories_does_not_allow_all(checks: Checks):
    """Its empty name was taken for a part of every other."""
    text = "It is a western as tense as those before."
    assert CATEGORIES[9] == ""
    assert checks.flags(text, [9], TARGET, True) == ["foreign_category"]
    assert checks.flags(text, HISTORY, 9, True) == ["foreign_category"]


# ---- language -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Es ist eine düstere Geschichte über zwei Männer, wie die vorherigen Filme auch.",
        "C'est une histoire sombre de deux hommes, comme les films que l'on a vus avant.",
        "Это мрачная история двух мужчин, как и те фильмы, которые они смотрели раньше.",
    ],
)
def test_another_language_is_flagged_where_one_is_asked_for(
    checks: Checks, english: Checks, text: str
):
    assert flags_of(english, text) == ["language"]
    assert flags_of(checks, text) == []


def test_the_language_asked_for_need_not_be_english():
    german = checks_of(language="de")
    assert flags_of(german, CLEAN) == ["language"]
    assert flags_of(german, "Es ist eine düstere Geschichte über zwei Männer in der Stadt.") == []


def test_titles_may_be_in_any_language():
    titles = [
        "",
        "Die fabelhafte Welt der Amelie und ihre vielen Freunde",
        "Der Himmel über Berlin",
    ]
    checks = checks_of(titles, [""] * 3, language="en")
    for text in (
        f"It is as warm as “{titles[1]}”, and as slow as they like it.",
        f"{titles[1]}, {titles[2]}: both are of the same mood.",
    ):
        assert checks.flags(text, [1], 2, True) == []


def test_too_few_words_tell_no_language():
    checks = checks_of(min_words=1, language="en")
    assert flags_of(checks, "Eine düstere Geschichte.") == []


# ---- any text -----------------------------------------------------------------------------------

# Half of it made of what the checks look for.
PIECES = st.sampled_from([
    "The Matrix", "Star Wars", "Big Night", "Fargo", "Heat", " (1995)", "(", ")", "“", "”", '"',
    "*", "**", "«", ":", ", The", "western", "I'm sorry", "- ", "<|", "|>", "\n", " ", " and ",
    ". ", "’", "ǅ", "İ", "²", "ﬁ", "\u0301", "\x00", "\ud800", "一部电影",
])  # fmt: skip
ANYTHING = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join))


@given(ANYTHING, st.lists(st.integers(1, len(TITLES) - 1), max_size=6),
       st.integers(1, len(TITLES) - 1), st.booleans())  # fmt: skip
@settings(deadline=None)
def test_any_text_gets_known_flags(
    english: Checks, text: str, history: list[int], target: int, ended: bool
):
    found = english.flags(text, history, target, ended)
    assert found == [flag for flag in FLAGS if flag in found]
    assert found == ["empty"] or ("unfinished" in found) != ended
    assert found == english.flags(text, [*reversed(history), target], target, ended)


@given(st.lists(ANYTHING, min_size=1, max_size=4), ANYTHING)
@settings(deadline=None)
def test_any_titles_and_categories_can_be_checked(texts: list[str], text: str):
    checks = checks_of(["", *texts], ["", *texts])
    found = checks.flags(text, list(range(1, len(texts))), len(texts), True)
    assert "foreign_category" not in found  # all are shown
    assert set(found) <= FLAGS.keys()


def some_titles() -> st.SearchStrategy[str]:
    words = st.lists(
        st.sampled_from(
            ["Star", "Wars", "the", "of", "Ünlike", "L'Amour", "C3PO", "2", "Mr.", "Red", "White:"]
        ),
        min_size=1,
        max_size=8,
    ).map(" ".join)
    ends = st.sampled_from(["", ", The", ", L'", " (1999)", ", The (1977)", " (Red Star) (2001)"])
    return st.builds(str.__add__, words, ends)


@given(st.lists(some_titles(), min_size=2, max_size=12), st.data())
@settings(deadline=None)
def test_a_users_own_titles_are_never_foreign(titles: list[str], data: st.DataObject):
    """However alike the titles of the catalogue are, and however their own are written."""
    titles = ["", *titles]
    checks = checks_of(titles, [""] * len(titles))
    indices = st.integers(1, len(titles) - 1)
    history, target = data.draw(st.lists(indices, max_size=4)), data.draw(indices)
    written = st.sampled_from(["{}", "“{}”", "*{}*", "({})"])
    parts = [
        data.draw(written).format(titles[item])
        for item in data.draw(st.permutations([*history, target]))
    ]
    assert "foreign_title" not in checks.flags(
        " is liked and so is ".join(parts), history, target, True
    )
