"""The kinds of word problem, as data: numbers to draw, and pairs of question and answer.

Templates are filled in three ways:

- `(buys|finds)`  one of the alternatives;
- `{things}`      a word or a number. `{A}` and `{B}` are two people; `{he}`, `{him}`, `{his}`
                  belong to `{A}`; every noun of `problem_words.NOUNS` comes as `{thing}` and
                  `{things}`, with a second, different one as `{thing2}` and `{things2}`;
- `[t=x+y]`       a step: it computes `t` and writes `12 + 7 = <<12+7=19>>19`.

Numbers are drawn in order: `x=2..50` from a range, `x=20|50` from a choice, `x=n*q` computed.
A draw in which any number or result is below 2 is thrown away (so plurals are always right).
"""

from typing import NamedTuple


class Kind(NamedTuple):
    """A family of problems that are solved by the same steps from the same numbers."""

    name: str
    numbers: str
    templates: tuple[tuple[str, str], ...]


ONE_STEP = (
    Kind(
        "add",
        "x=5..60 y=3..50",
        (
            (
                "{A} has {x} {things}. {He} (buys|finds|gets) {y} more. "
                "How many {things} does {A} have now?",
                "{A} has [t=x+y] {things} now.",
            ),
            (
                "{A} picked {x} {fruits} and {B} picked {y} {fruits}. "
                "How many {fruits} did they pick (together|in all)?",
                "Together they picked [t=x+y] {fruits}.",
            ),
            (
                "There are {x} {things} in one {box} and {y} {things} in another {box}. "
                "How many {things} are there in (total|all)?",
                "There are [t=x+y] {things} in total.",
            ),
            (
                "After giving {y} {things} to {B}, {A} has {x} {things} left. "
                "How many {things} did {A} have (at first|in the beginning)?",
                "{A} had [t=x+y] {things} at first.",
            ),
            (
                "{A} drove {x} miles (before lunch|in the morning) and {y} miles in the evening. "
                "How many miles did {he} drive that day?",
                "{A} drove [t=x+y] miles that day.",
            ),
            (
                "{B} has {x} {things}. {A} has {y} more {things} than {B}. "
                "How many {things} does {A} have?",
                "{A} has [t=x+y] {things}.",
            ),
        ),
    ),
    Kind(
        "subtract",
        "x=10..99 y=3..60",
        (
            (
                "{A} has {x} {things}. {He} (gives|sells|sends) {y} of them to {B}. "
                "How many {things} does {A} have left?",
                "{A} has [t=x-y] {things} left.",
            ),
            (
                "There were {x} {foods} in the {box}. {A} (ate|took|sold) {y} of them. "
                "How many {foods} are still in the {box}?",
                "There are [t=x-y] {foods} still in the {box}.",
            ),
            (
                "{A} lost {y} of {his} {x} {goods}. How many {goods} does {he} have now?",
                "{A} has [t=x-y] {goods} now.",
            ),
            (
                "{A} is reading a book with {x} pages. {He} has read {y} pages (so far|already). "
                "How many pages does {A} still have to read?",
                "{A} still has to read [t=x-y] pages.",
            ),
            (
                "{A} needs {x} {things} for a party. {He} has {y} {things} already. "
                "How many more {things} does {A} need?",
                "{A} needs [t=x-y] more {things}.",
            ),
            (
                "{A} and {B} have {x} {things} together. {y} of the {things} belong to {B}. "
                "How many {things} belong to {A}?",
                "{A} has [t=x-y] {things}.",
            ),
        ),
    ),
    Kind(
        "compare",
        "x=10..99 y=3..60",
        (
            (
                "{A} has {x} {things} and {B} has {y} {things}. "
                "How many more {things} does {A} have than {B}?",
                "{A} has [t=x-y] more {things} than {B}.",
            ),
            (
                "{A} picked {y} {fruits}. {B} picked {x} {fruits}. "
                "How many fewer {fruits} did {A} pick than {B}?",
                "{A} picked [t=x-y] fewer {fruits} than {B}.",
            ),
            (
                "A farmer has {x} {animals} and {y} {animals2}. "
                "How many more {animals} than {animals2} does the farmer have?",
                "The farmer has [t=x-y] more {animals} than {animals2}.",
            ),
            (
                "{A} is {y} years old and {his} (cousin|neighbor|friend) is {x} years old. "
                "How many years younger is {A}?",
                "{A} is [t=x-y] years younger.",
            ),
            (
                "The walk to {place} takes {A} {x} minutes. The bus takes {y} minutes. "
                "How many minutes does {A} save by taking the bus?",
                "{A} saves [t=x-y] minutes.",
            ),
            (
                "A big {box} holds {x} {things}. A small {box} holds {y} {things}. "
                "How many more {things} does the big {box} hold?",
                "The big {box} holds [t=x-y] more {things}.",
            ),
        ),
    ),
    Kind(
        "groups",
        "n=2..12 x=2..12",
        (
            (
                "{A} has {n} {boxes}. There are {x} {things} in each {box}. "
                "How many {things} does {A} have (in all|altogether)?",
                "{A} has [t=n*x] {things} in all.",
            ),
            (
                "Each {box} holds {x} {things}. "
                "How many {things} (are in|does {A} need to fill) {n} {boxes}?",
                "{n} {boxes} hold [t=n*x] {things}.",
            ),
            (
                "{A} plants {n} rows of {flowers}. Each row has {x} {flowers}. "
                "How many {flowers} does {he} plant?",
                "{A} plants [t=n*x] {flowers}.",
            ),
            (
                "{A} gives {x} {things} to each of {his} {n} {friends}. "
                "How many {things} does {A} give away?",
                "{A} gives away [t=n*x] {things}.",
            ),
            (
                "{A} (runs|walks|rides) {x} miles every (Sunday|week|Friday). "
                "How many miles is that in {n} weeks?",
                "In {n} weeks that is [t=n*x] miles.",
            ),
            (
                "{A} sees {n} tables at {place}. {x} people sit at each table. "
                "How many people are sitting there?",
                "There are [t=n*x] people sitting there.",
            ),
        ),
    ),
    Kind(
        "share",
        "n=2..12 q=2..12 x=n*q",
        (
            (
                "{A} has {x} {things}. {He} (shares|divides) them equally among {n} {friends}. "
                "How many {things} does each {friend} get?",
                "Each {friend} gets [t=x/n] {things}.",
            ),
            (
                "{A} puts {x} {things} into {n} {boxes}, with the same number in each {box}. "
                "How many {things} are in each {box}?",
                "Each {box} has [t=x/n] {things}.",
            ),
            (
                "Each {box} holds {n} {things}. How many {boxes} does {A} need for {x} {things}?",
                "{A} needs [t=x/n] {boxes}.",
            ),
            (
                "{A} plants {x} {flowers} in {n} equal rows. How many {flowers} are in each row?",
                "Each row has [t=x/n] {flowers}.",
            ),
            (
                "{A} (reads|writes) {n} pages every day. "
                "How many days does {he} need for {x} pages?",
                "{A} needs [t=x/n] days.",
            ),
            (
                "{A} makes teams of {n} children. There are {x} children in {his} class. "
                "How many teams are there?",
                "There are [t=x/n] teams.",
            ),
        ),
    ),
    Kind(
        "price",
        "n=2..12 p=2..12",
        (
            (
                "{A} buys {n} {things} at {shop}. Each {thing} costs {p} dollars. "
                "How many dollars does {A} (pay|spend)?",
                "{A} pays [t=n*p] dollars.",
            ),
            (
                "At {shop} one {good} costs ${p}. How much do {n} {goods} cost there?",
                "{n} {goods} cost [t=n*p] dollars.",
            ),
            (
                "{A} earns {p} dollars an hour (washing cars|in the garden|at {shop}). "
                "How much does {he} earn in {n} hours?",
                "{A} earns [t=n*p] dollars.",
            ),
            (
                "A {box} of {foods} costs ${p} at {shop}. {A} wants {n} {boxes}. "
                "How much money does {he} need?",
                "{A} needs [t=n*p] dollars.",
            ),
            (
                "A ticket for the (show|train|zoo) costs {p} dollars. "
                "How much do {A} and {his} family pay for {n} tickets?",
                "They pay [t=n*p] dollars.",
            ),
            (
                "{A} sells {n} {goods} for {p} dollars each. How many dollars does {A} get?",
                "{A} gets [t=n*p] dollars.",
            ),
        ),
    ),
)
