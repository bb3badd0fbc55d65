"""Text in and out: ids from text, text from ids, and conversations laid out by a chat template."""

from qnext.text.continuation import Continuation as Continuation
from qnext.text.template import ChatTemplate as ChatTemplate
from qnext.text.tokenizer import DecodeStream as DecodeStream
from qnext.text.tokenizer import Tokenizer as Tokenizer
from qnext.text.tokenizer import TokenizerError as TokenizerError
