"""Profiles without an LLM: every word of them is in the data."""

from dataclasses import replace
from pathlib import Path

import pytest

from components.ids import TRAIN
from components.ingest.dataset import Dataset
from components.sideinfo.metadata import MetadataWriter, attribute, summary
from tests.sideinfo_parents import SMALL, Small, write_ingest


def _profiles(root: Path, world: Small, **settings: int) -> tuple[list[str | None], list[str | None]]:
    training = Dataset.load(write_ingest(root, world).path()).only(TRAIN)
    writer = MetadataWriter(**{"max_words": 100, "max_user_items": 10, "seed": 0} | settings)
    items = writer.write_items(training)
    return list(items), list(writer.write_users(training, items))


def test_profiles_of_a_small_data_set_are_the_ones_written_by_hand(tmp_path: Path) -> None:
    items, users = _profiles(tmp_path, SMALL)
    assert items == [
        "Alien. Release year: 1979. Genres: Horror, Sci-Fi.",
        "Blade Runner. Release year: 1982. Genres: Sci-Fi.",
        "Casablanca. Release year: 1942. Genres: Drama.",
        "Dogma. Release year: 1999. Genres: Drama.",
        None,  # its title is its id, so it has none
    ]
    assert users == [
        "Release year: 1979 to 1982. Genres, most frequent first: Sci-Fi, Horror. Chose: Alien; Blade Runner.",
        "Release year: 1942 to 1982. Genres, most frequent first: Sci-Fi, Drama, Horror. "
        "Chose: Alien; Blade Runner; Casablanca.",
        "Release year: 1999. Genres, most frequent first: Drama. Chose: Dogma.",
        None,  # no training interaction
    ]


def test_what_users_say_of_themselves_comes_first_and_is_enough_for_a_profile(tmp_path: Path) -> None:
    world = replace(SMALL, name="jobs", users={"occupation": ["writer", "", "", "nurse"]})
    _, users = _profiles(tmp_path, world)
    assert users[0] is not None
    assert users[0].startswith("Occupation: writer. Release year: 1979")
    assert users[1] is not None
    assert users[1].startswith("Release year")
    assert users[3] == "Occupation: nurse."


def test_an_item_without_title_is_described_by_its_text_and_never_named_by_its_id(tmp_path: Path) -> None:
    texts = SMALL.items | {"genres": ["Horror, Sci-Fi", "Sci-Fi", "Drama", "Drama", "Sci-Fi"]}
    items, users = _profiles(tmp_path, replace(SMALL, name="untitled", items=texts))
    assert items[4] == "Genres: Sci-Fi."
    assert users[2] is not None
    assert "50" not in users[2]


def test_of_many_titles_a_seeded_sample_is_named_and_all_count_in_the_summary(tmp_path: Path) -> None:
    first = _profiles(tmp_path / "a", SMALL, max_user_items=2)[1][1]
    assert first is not None
    assert "1942 to 1982" in first
    named = first.split("Chose, among others: ")[1].removesuffix(".").split("; ")
    assert len(named) == len(set(named)) == 2
    assert set(named) < {"Alien", "Blade Runner", "Casablanca"}
    assert _profiles(tmp_path / "b", SMALL, max_user_items=2)[1][1] == first
    others = {_profiles(tmp_path / str(seed), SMALL, max_user_items=2, seed=seed)[1][1] for seed in range(1, 9)}
    assert others - {first}


def test_a_long_profile_is_cut_at_a_word(tmp_path: Path) -> None:
    items, users = _profiles(tmp_path, SMALL, max_words=4)
    assert items[0] == "Alien. Release year: 1979."
    assert users[0] == "Release year: 1979 to"


def test_profiles_do_not_depend_on_held_out_interactions(tmp_path: Path) -> None:
    assert _profiles(tmp_path / "a", SMALL) == _profiles(tmp_path / "b", SMALL.with_other_held_out())


def test_many_numbers_are_told_as_their_range_and_their_middle_half() -> None:
    years = attribute("release_year", ["1999", "1990", "", "1996", "1991", "1995"])
    assert years.kind == "number"
    assert summary(years, range(6)) == "Release year: 1990 to 1999, half of them 1991 to 1996"
    assert summary(years, [1, 3]) == "Release year: 1990 to 1996"
    assert summary(years, [2]) == ""


def test_frequent_values_come_first_and_equal_ones_in_the_order_of_the_alphabet() -> None:
    genres = attribute("genres", ["Drama|War", "War", "Crime|Drama", "Crime|War"])
    assert genres.kind == "values"
    assert summary(genres, [0, 1, 2]) == "Genres, most frequent first: Drama, War, Crime"


def test_of_free_text_the_words_that_are_rare_elsewhere_are_told() -> None:
    plots = attribute(
        "plot",
        [
            "The ship is hunted by a monster in space",
            "The crew of a ship in space hears the monster",
            "The lovers meet again in Paris during the war",
            "The lovers part and never see the city again",
        ],
    )
    assert plots.kind == "words"
    told = summary(plots, [0, 1]).removeprefix("Plot, telling words: ").split(", ")
    assert told[:3] == ["monster", "ship", "space"]  # twice here, nowhere else; then words seen once
    assert "the" not in told  # in every plot


@pytest.mark.parametrize("texts", [["", ""], []])
def test_a_column_without_any_text_says_nothing(texts: list[str]) -> None:
    assert summary(attribute("notes", texts), range(len(texts))) == ""
