"""Annotations are checked while tests run, where tests.typed and the command line say so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from qnext.functional.speculate import newest
from qnext.lowering.graph import is_view
from qnext.runtime.kept import copy_alone
from qnext.runtime.steps import halted


@pytest.mark.parametrize(
    ("function", "given", "error"),
    [
        (newest, (torch.ones(3), torch.ones(2)), TypeCheckError),
        (halted, (None, torch.ones(3), torch.ones(2), torch.ones(2, 4)), TypeCheckError),
        (is_view, ("a name",), BeartypeCallHintViolation),
        (copy_alone, (torch.ones(2), [1.0, 1.0]), BeartypeCallHintViolation),
    ],
)
def test_a_wrong_type_is_refused(
    function: Callable[..., Any], given: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        function(*given)
