"""`torchrun -m qnext serve --tp 2` on devices: ranks that HCCL joins, captured steps, an answer."""

from tests.npu.models import here
from tests.parallel.test_serve_ranks import asked, ranks

SHARED = ("--tp", "2", "--whole", "delta_heads", "--dtype", "bfloat16", "--strict")
SIZES = ("--rows", "2", "--capacity", "256")
QUESTION = "Question: Mia has 12 apples and buys 7 more. How many has she now?\nAnswer:"


def test_two_ranks_answer() -> None:
    with ranks("--target", here().name, *SIZES, shared=SHARED) as both:
        answer = asked(both, prompt=QUESTION, max_tokens=20, temperature=0.0)
        assert answer.status_code == 200
        assert "12 + 7 = <<12+7=19>>19" in answer.json()["choices"][0]["text"]
