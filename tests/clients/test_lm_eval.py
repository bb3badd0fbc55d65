"""lm-evaluation-harness over HTTP scores what `qn.forward` scores.

Its `local-completions` reads log-probabilities of echoed prompts and has no tokenizer but ours,
asked over HTTP. The same numbers are computed here from the definition:

- A text of tokens t_1..t_n is scored in windows of w = max_length - 2 tokens. The first window is
  w tokens after <eos>; each later one predicts the next w tokens, or as many as remain, given the
  tokens before them, so that w stand before the last. A text's log-likelihood is the sum over its
  tokens.
- word_perplexity = exp(-sum(log-likelihoods) / sum(words)), words being what white space
  separates; byte_perplexity the same over bytes of UTF-8; bits_per_byte = log2 of the latter.
- A choice is scored given its question, and is greedy where each of its tokens is the likeliest.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import qnext as qn
from qnext.complete import complete
from qnext.embedded import PROBLEMS
from tests.clients.served import CLIENTS, Served, needs_clients, run

pytestmark = [pytest.mark.slow, needs_clients]
LENGTH = 66  # tokens the client believes the model has, so that long texts take several windows
NEW = 24  # tokens of an answer
TASKS: dict[str, dict[str, Any]] = {
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question"], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
Rows = list[dict[str, Any]]


def documents() -> dict[str, Rows]:
    """What each task asks: texts of 20 to 200 tokens, and problems the demo never saw."""
    rows = [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:12]]
    said = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    odd = "na\u00efve \u20ac \U0001f600"
    texts = [said[0], "\n\n".join(said[1:3]), "\n\n".join(said[3:6]), odd]
    asked = [f"Question: {row['question']}\nAnswer:" for row in rows]
    right = [int(row["answer"].rsplit(" ", 1)[1]) for row in rows]
    return {
        "texts": [{"text": text} for text in texts],
        "choices": [
            {"question": f"{q} The answer is", "choices": [f"{n + i}" for i in range(3)], "gold": 0}
            for q, n in zip(asked, right, strict=True)
        ],
        "answers": [
            {"question": q, "answer": row["answer"]}
            for q, row in zip(asked[:4], rows[:4], strict=True)
        ],
    }


@pytest.fixture(scope="module", params=[1, 4], ids=["one by one", "together"])
def results(
    request: pytest.FixtureRequest, server: Served, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Metrics by task, and the samples of each: asked one by one, or four at a time in batches."""
    room = tmp_path_factory.mktemp("lm_eval")
    for name, rows in documents().items():
        (room / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(room / f"{name}.jsonl")}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        # JSON is YAML
        (room / f"{name}.yaml").write_text(json.dumps(task | TASKS[name]))
    together = request.param
    arguments = [
        f"base_url={server.url}/v1/completions",
        f"model=demo,max_length={LENGTH},num_concurrent={together},max_retries=1",
    ]
    run(
        CLIENTS / "bin/lm_eval",
        *("run", "--model", "local-completions", "--model_args", ",".join(arguments)),
        *("--include_path", room, "--tasks", ",".join(TASKS), "--batch_size", f"{together}"),
        *("--output_path", room / "out", "--log_samples"),
        env={"HF_HOME": str(room / "hf"), "HF_HUB_OFFLINE": "1"},
        cwd=room,
        timeout=900,
    )
    (told,) = (room / "out").rglob("results_*.json")
    samples = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name in TASKS
        for path in (room / "out").rglob(f"samples_{name}_*.jsonl")
    }
    return json.loads(told.read_text())["results"], samples


@pytest.fixture(scope="module")
def demo() -> tuple[qn.Params, Any]:
    return qn.demo(), qn.tokenizer()


def score(params: qn.Params, before: Sequence[int], then: Sequence[int]) -> tuple[float, bool]:
    """log p(then | before), and whether each of its tokens is the likeliest."""
    tokens = torch.tensor([[*before, *then]])
    with torch.no_grad():
        logits, _ = qn.forward(params, qn.init_state(params.config, 1, tokens.shape[1]), tokens)
    shares = logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    wanted = torch.tensor(then)
    found = shares.gather(1, wanted[:, None])[:, 0]
    return float(found.sum()), bool((shares.argmax(1) == wanted).all())


def score_text(params: qn.Params, tokens: Sequence[int], eos: int) -> float:
    window = LENGTH - 2
    total, _ = score(params, [eos], tokens[:window])
    for start in range(window, len(tokens), window):
        then = tokens[start : start + window]
        end = start + len(then)
        total += score(params, tokens[end - window - 1 : start], then)[0]
    return total


def test_perplexities(results: Any, demo: tuple[qn.Params, Any]) -> None:
    params, tokenizer = demo
    texts = [row["text"] for row in documents()["texts"]]
    encoded = [tokenizer.encode(text) for text in texts]
    assert max(map(len, encoded)) > 2 * LENGTH > LENGTH > min(map(len, encoded))
    eos = tokenizer.encode("<|im_end|>")[0]
    total = sum(score_text(params, tokens, eos) for tokens in encoded)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    told = results[0]["texts"]
    # both are float32; the orders of their sums differ
    assert told["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-6)
    assert told["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-6)
    assert told["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-6)


def test_choices(results: Any, demo: tuple[qn.Params, Any]) -> None:
    params, tokenizer = demo
    right = 0
    assert len(results[1]["choices"]) == len(documents()["choices"])
    for sample in results[1]["choices"]:
        question = sample["doc"]["question"]
        before = tokenizer.encode(question)
        scores = []
        for choice, told in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            then = tokenizer.encode(f"{question} {choice}")[len(before) :]
            value, greedy = score(params, before, then)
            assert float(told[0]) == pytest.approx(value, rel=1e-5, abs=1e-5)
            assert str(told[1]) == str(greedy)
            scores.append(value)
        right += max(scores) == scores[0]
    assert results[0]["choices"]["acc,none"] == right / len(results[1]["choices"])


def test_answers(results: Any, demo: tuple[qn.Params, Any]) -> None:
    params, tokenizer = demo
    assert len(results[1]["answers"]) == len(documents()["answers"])
    for sample in results[1]["answers"]:
        prompt = tokenizer.encode(sample["doc"]["question"])[-(LENGTH - 1 - NEW) :]
        pieces = complete(params, tokenizer, [prompt], NEW, stops=["Question", "<|im_end|>"])
        assert sample["resps"][0][0] == "".join(piece.text for piece in pieces)
