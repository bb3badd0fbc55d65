"""Single tokens as bytes and as text to show: many are no whole character by themselves."""

from functools import lru_cache

from qnext.text.tokenizer import Tokenizer


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of byte-level vocabularies stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(rest)}


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token adds to a text; none of an id that the vocabulary does not have."""
    letters = tokenizer.backend.id_to_token(token) if tokenizer.knows(token) else None
    if letters is None:
        return b""
    table = _bytes_of_letters()
    if token in tokenizer.backend.get_added_tokens_decoder() or any(
        c not in table for c in letters
    ):
        return letters.encode()  # an added token is written as it is
    return bytes(table[letter] for letter in letters)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as clients show it: its text, or its bytes where those are no whole characters."""
    raw = token_bytes(tokenizer, token)
    if not raw and not tokenizer.knows(token):
        return f"token_id:{token}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
