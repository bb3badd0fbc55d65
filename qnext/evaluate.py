"""Few-shot word problems (GSM8K) as the public scripts run them.

The shots are the file's first k lines; every line is then asked, the shots' own among them, as
those scripts do. Greedy, stopped at `Question` or `Assistant:`; the answer is the last number of
the text with commas removed. Protocol: github.com/sgl-project/sglang, few_shot_gsm8k.py.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from qnext.acceptance import Acceptance
from qnext.complete import Piece, complete
from qnext.errors import QnextError
from qnext.functional.generate import GREEDY
from qnext.functional.params import Params
from qnext.text import Tokenizer

STOPS = ("Question", "Assistant:")
NUMBER = re.compile(r"\d+")


class DataError(QnextError):
    """A problem file that is not JSON lines of `question` and `answer`."""


class Problem(NamedTuple):
    question: str
    answer: str


@dataclass(frozen=True)
class Report:
    """What an evaluation measured. Rates are shares of all problems; seconds are wall-clock."""

    accuracy: float
    invalid: float  # no number in the text
    accuracy_beyond_shots: float  # without the problems that were also shown as shots
    problems: int
    shots: int
    seconds: float
    output_tokens: int
    output_tokens_per_second: float
    draft: int
    acceptance: Acceptance  # of guesses, where any were made
    results: tuple[dict[str, Any], ...]

    def write(self, path: Path) -> None:
        speed = {
            "acceptance_by_position": self.acceptance.rates,
            "tokens_per_step": self.acceptance.tokens_per_step,
        }
        path.write_text(json.dumps(asdict(self) | speed, indent=1) + "\n", encoding="utf-8")


def read_problems(path: str | Path) -> list[Problem]:
    """Problems of a JSON-lines file. Raises DataError naming the line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problems.append(Problem(str(row["question"]), str(row["answer"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: want an object with question and answer ({error!r})"
            ) from error
    if not problems:
        raise DataError(f"{path} holds no problems")
    return problems


def answer_of(text: str) -> int | None:
    """The last number of a text, commas removed; None if there is none."""
    numbers = NUMBER.findall(text.replace(",", ""))
    return int(numbers[-1]) if numbers else None


def asked(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer:"


def shown(problem: Problem) -> str:
    return f"{asked(problem)} {problem.answer}\n\n"


def evaluate(
    params: Params,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    shots: int = 5,
    batch: int = 16,
    max_new_tokens: int = 512,
    limit: int | None = None,
    draft: int = 0,
    target: str = "cpu",
    progress: bool | None = None,
) -> Report:
    """Ask the first `limit` problems (default: all), `batch` at a time, after `shots` examples.

    With `draft` so many tokens are guessed ahead, which changes no answer. `target` is what steps
    are compiled for. Raises DataError where there are fewer problems than shots.
    """
    if not 0 <= shots <= len(problems):
        raise DataError(f"{shots} shots need as many problems; the file has {len(problems)}")
    prefix = "".join(map(shown, problems[:shots]))
    chosen = problems[:limit]
    prompts = [tokenizer.encode(prefix + asked(problem)) for problem in chosen]
    pieces = complete(
        *(params, tokenizer, prompts, max_new_tokens, GREEDY, STOPS, draft),
        target=target,
        rows=min(batch, len(prompts)),
        marks=(len(tokenizer.encode(prefix)),) if prefix else (),
    )
    began = time.monotonic()
    answers = [Piece(row, "", 0, None) for row in range(len(prompts))]
    hidden = None if progress is None else not progress
    judged: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(prompts), desc="eval", unit="problem", disable=hidden) as bar:
        for piece in pieces:
            whole = piece._replace(text=answers[piece.row].text + piece.text)
            answers[piece.row] = whole
            if piece.finish:
                judged[piece.row] = _judged(chosen[piece.row], whole)
                bar.update()
                bar.set_postfix(accuracy=f"{_share(list(judged.values()), 'right'):.3f}")
    seconds = time.monotonic() - began
    results = [judged[row] for row in range(len(prompts))]
    output = sum(row["tokens"] for row in results)
    return Report(
        accuracy=_share(results, "right"),
        invalid=sum(row["got"] is None for row in results) / len(results),
        accuracy_beyond_shots=_share(results[shots:], "right"),
        problems=len(results),
        shots=shots,
        seconds=seconds,
        output_tokens=output,
        output_tokens_per_second=output / seconds,
        draft=draft,
        acceptance=sum((answer.acceptance for answer in answers), Acceptance()),
        results=tuple(results),
    )


def _judged(problem: Problem, answer: Piece) -> dict[str, Any]:
    want, got = answer_of(problem.answer), answer_of(answer.text)
    return {
        "question": problem.question,
        "text": answer.text,
        "want": want,
        "got": got,
        "right": got is not None and got == want,
        "tokens": answer.tokens,
    }


def _share(results: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in results) / len(results) if results else 0.0
