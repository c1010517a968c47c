"""The message of a call that must be refused."""

import pytest

from unigrpo_jax import errors


def refusal(function, *args, **kwargs) -> str:
  """The one line of the InputError that the call raises."""
  with pytest.raises(errors.InputError) as caught:
    function(*args, **kwargs)
  message = str(caught.value)
  assert "\n" not in message
  return message
