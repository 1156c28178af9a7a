"""What is told of other people's errors."""

import pytest

from components.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no room, it says.\nand where"), "no room, it says"),
        (ValueError("\n  a frame round it \n"), "a frame round it"),
        (KeyError("sha256"), "'sha256'"),
        (OSError(), "OSError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_of_an_error_the_first_line_is_told_and_its_class_where_it_says_nothing(error: Exception, line: str) -> None:
    assert first_line(error) == line
