"""The training text: the King James Version (1611), read through the `bible` program.

The text is in the public domain in most countries (its translators died four centuries ago). Debian packages
it, so nothing is downloaded from an unversioned address:

    apt-get install bible-kjv bible-kjv-text
    python -m ciuic_hf.demo.text --out kjv-train.txt --heldout heldout.txt

Output format, of both files: UTF-8, one verse a line without its reference, one empty line between chapters.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Whole books kept out of training. Each is a story or letter that no other book retells; a Gospel would not
# do, because the other Gospels repeat it nearly word for word and the perplexity would measure memory.
HELDOUT_BOOKS = ("Ruth", "Est", "Jonah", "Phi", "Jas")

_WHOLE_TEXT = "gen1:1-rev22:21"
_VERSE_LINE = re.compile(r"(?P<book>[1-3]?[A-Za-z]+)(?P<chapter>\d+):(?P<verse>\d+) (?P<text>.+)")
_LINE_WIDTH = 100_000  # wider than any verse, so that the program never wraps one


def read_verses(program: str = "bible") -> Iterator[tuple[str, int, str]]:
    """Yields (book abbreviation, chapter, verse text) for the whole KJV, in canonical order."""
    if shutil.which(program) is None:
        raise FileNotFoundError(
            f"the program {program!r} was not found; run: apt-get install bible-kjv bible-kjv-text"
        )
    command = [program, "-f", f"-l{_LINE_WIDTH}", _WHOLE_TEXT]
    output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    for line in output.decode("ascii").splitlines():
        if not line.strip():
            continue
        match = _VERSE_LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{program} printed a line that is not a verse: {line[:80]!r}")
        yield match["book"], int(match["chapter"]), match["text"]


def split_text(verses: Iterator[tuple[str, int, str]]) -> tuple[str, str]:
    """Returns (training text, held-out text), the latter the books in `HELDOUT_BOOKS`."""
    train: list[str] = []
    heldout: list[str] = []
    for (book, _), chapter in itertools.groupby(verses, key=lambda verse: verse[:2]):
        part = heldout if book in HELDOUT_BOOKS else train
        part.append("\n".join(text for _, _, text in chapter))
    return "\n\n".join(train) + "\n", "\n\n".join(heldout) + "\n"


def chapters(text: str) -> list[str]:
    """Splits a text in the format above into chapters, each a string of one verse a line."""
    return [chapter for chapter in text.strip().split("\n\n") if chapter]


def main() -> None:
    """Writes the training and the held-out text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where to write the training text")
    parser.add_argument("--heldout", type=Path, help="where to write the held-out text, if wanted")
    args = parser.parse_args()
    train, heldout = split_text(read_verses())
    args.out.write_text(train, encoding="utf-8")
    if args.heldout is not None:
        args.heldout.write_text(heldout, encoding="utf-8")
    print(f"training text {len(train):,} bytes, held-out text {len(heldout):,} bytes")


if __name__ == "__main__":
    main()
