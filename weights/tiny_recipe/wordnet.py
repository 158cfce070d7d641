"""WordNet's database files as training text: definitions, examples, words, sentences; and retrieval pairs."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from qwen3core.errors import InputError
from qwen3core.training import Example

POS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Synset:
    offset: int
    kind: str
    """Its lexicographer file, as noun.animal, by number: ``05``."""
    lemmas: tuple[str, ...]
    hypernyms: tuple[int, ...]
    definition: str
    examples: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """One synset in ten is in no training text: for evaluation."""
        return self.offset % 10 == 7

    @property
    def document(self) -> str:
        """The synset as a text to be found: its words, then its definition."""
        return f"{', '.join(self.lemmas[:3])}: {self.definition}"


def read_wordnet(folder: str | Path) -> dict[str, list[Synset]]:
    """Synsets by part of speech, from the files data.noun and so on (wndb(5WN)). Raises InputError."""
    found = {}
    for pos in POS:
        path = Path(folder) / f"data.{pos}"
        if not path.is_file():
            raise InputError(f"WordNet's {path} is missing: apt-get install wordnet-base")
        lines = path.read_text("utf-8").splitlines()
        found[pos] = [_synset(line) for line in lines if not line.startswith(" ")]
    return found


def _synset(line: str) -> Synset:
    fields, _, gloss = line.partition(" | ")
    offset, kind, _, count, *rest = fields.split()
    words, pointers = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) + 1 :]
    lemmas = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
    up = tuple(int(target) for symbol, target in pairwise(pointers) if symbol == "@")
    examples = tuple(text.strip() for text in re.findall(r'"([^"]{12,})"', gloss))
    definition = re.split(r'; "', gloss)[0].strip().removesuffix(";")
    return Synset(int(offset), kind, lemmas, up, definition, examples)


def texts(wordnet: dict[str, list[Synset]], folder: str | Path, seed: int, sentences: int) -> list[str]:
    """Distinct texts to learn on: definitions, every second one with its words, examples, common words, compositions.

    folder: WordNet's database. sentences: how many texts to compose.
    """
    chance = random.Random(seed)
    counts = _counts(Path(folder))
    found: dict[str, None] = {}
    for synsets in wordnet.values():
        for synset in synsets:
            if not synset.held_out:
                plain = [chance.choice((synset.definition, synset.document)), *synset.examples]
                plain += [lemma for lemma in synset.lemmas if (lemma, synset.kind) in counts]
                found |= dict.fromkeys(_written(text, chance) for text in plain)
    compose = _composer(wordnet, folder, counts, chance)
    while sentences > 0:
        text = _written(next(compose), chance)
        sentences -= text not in found
        found[text] = None
    return list(found)


def _written(text: str, chance: random.Random) -> str:
    """The text, half the time written as a sentence is: capital first, full stop last."""
    if chance.random() < 0.5:
        return text
    text = text[:1].upper() + text[1:]
    return text if text[-1:] in ".?!" else f"{text}."


TEMPLATES = (
    "a {person} is {doing} a {thing}",
    "a {adj} {person} is {doing} in the {place}",
    "the {person} is {doing} a {adj} {thing} on the {thing}",
    "two {animal}s are {doing} near a {thing}",
    "a {adj} {animal} is {doing} through the {place}",
    "a {animal} and a {animal} are {doing} in the {nature}",
    "a {person} and a {person} are {doing} {food}",
    "someone is {doing} the {food} with a {thing}",
    "a {person} {doing} a {thing} next to a {adj} {thing}",
    "a group of {person}s {doing} outside the {place}",
    "the {adj} {thing} is {adj}",
    "there is no {person} {doing} a {thing}",
    "{number} {person}s {does} in {event} in the {place}",
    "{person}s {does} {state} after {event}",
    "{group} {does} {act} over {state}",
    "{group} says {event} {does} {possession}",
    "{person} {does} {number} {group} in {place} {event}",
    "what is the best way to {do} a {thing}?",
    "how do I {do} {food} without a {thing}?",
    "you should {do} the {thing} before you {do} it",
    "I think the {act} is more {adj} than the {cognition}",
    "it depends on the {cognition} and the {state} of the {thing}",
)
KINDS = {"04": "act", "05": "animal", "06": "thing", "09": "cognition", "11": "event", "13": "food", "14": "group"}
KINDS |= {"15": "place", "17": "nature", "18": "person", "21": "possession", "26": "state"}
NUMBERS = ("two", "three", "five", "10", "25", "100", "at least 30", "dozens of", "several")


def _composer(
    wordnet: dict[str, list[Synset]], folder: str | Path, counts: dict[tuple[str, str], int], chance: random.Random
) -> Iterator[str]:
    """Sentences of common words in WordNet's own sentence frames and in ``TEMPLATES``."""
    common: dict[str, dict[str, float]] = {}
    for pos, synsets in wordnet.items():
        for synset in synsets:
            kind = {"verb": "do", "adj": "adj"}.get(pos, KINDS.get(synset.kind, "other"))
            for lemma in synset.lemmas:
                if lemma.isalpha() and lemma.islower() and (lemma, synset.kind) in counts:
                    common.setdefault(kind, {})[lemma] = counts[lemma, synset.kind] ** 0.75
    words = {kind: (list(found), list(accumulate(found.values()))) for kind, found in common.items()}
    frames = dict(line.split(" ", 1) for line in (Path(folder) / "sents.vrb").read_text("utf-8").splitlines() if line)
    framed = [
        frames[number].strip().replace("%s", line.partition("%")[0].replace("_", " "))
        for line in (Path(folder) / "sentidx.vrb").read_text("utf-8").splitlines()
        for number in line.partition(" ")[2].split(",")
        if number in frames
    ]

    def word(match: re.Match[str]) -> str:
        kind = match[1]
        if kind == "number":
            return chance.choice(NUMBERS)
        choices, cumulated = words["do" if kind in ("doing", "does") else kind]
        [found] = chance.choices(choices, cum_weights=cumulated)
        return {"doing": _ing, "does": _s}.get(kind, str)(found)

    while True:
        if chance.random() < 0.15:
            yield chance.choice(framed)
        else:
            yield re.sub(r"\{(\w+)\}", word, chance.choice(TEMPLATES))


def _counts(folder: Path) -> dict[tuple[str, str], int]:
    """How often (lemma, lexicographer file) was seen in the texts that WordNet's makers tagged."""
    counts: dict[tuple[str, str], int] = {}
    for line in (folder / "cntlist.rev").read_text("utf-8").splitlines():
        sense, _, count = line.split(" ")
        lemma, _, rest = sense.partition("%")
        key = (lemma.replace("_", " "), rest.split(":")[1])
        counts[key] = counts.get(key, 0) + int(count)
    return counts


def _ing(verb: str) -> str:
    if verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")):
        return f"{verb.removesuffix('e')}ing"
    doubled = re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprt]", verb)
    return f"{verb}{verb[-1] if doubled else ''}ing"


def _s(verb: str) -> str:
    return f"{verb}es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else f"{verb}s"


def pairs(wordnet: dict[str, list[Synset]], *, held_out: bool) -> list[Example]:
    """Retrieval examples: an example sentence, or "KIND called WORD", asks for the document of its synset."""
    found = []
    for synsets in wordnet.values():
        by_offset = {synset.offset: synset for synset in synsets}
        for synset in synsets:
            if synset.held_out == held_out:
                kinds = [by_offset[up].lemmas[0] for up in synset.hypernyms if up in by_offset]
                queries = [*synset.examples, *(f"{kind} called {synset.lemmas[0]}" for kind in kinds[:1])]
                found += [Example(query, synset.document) for query in queries]
    return found
