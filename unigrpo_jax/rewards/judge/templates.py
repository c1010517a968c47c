"""Templates of questions: texts with fields in braces, `templates/NAME.txt` or a user's file.

unified_reward_1 and unified_reward_2 have the wording with which these models were trained, from
yifan123/flow_grpo (flow_grpo/rewards.py) and CodeGoat24/UnifiedReward
(point_score_ACS_image_generation.py), both MIT.
"""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import pathlib
import string
from typing import Any

from unigrpo_jax import errors

FOLDER = pathlib.Path(__file__).with_name("templates")


class Template:
  """A text with fields such as {prompt}; {{ and }} stand for braces.

  Attributes:
    name: of the template, or the path of its file.
    fields: names of its fields.
    digest: hash of its text, 16 hexadecimal digits.
  """

  def __init__(self, name: str, text: str):
    """Parses a text; raises InputError where a brace is not closed or holds no field's name."""
    self.name, self._text = name, text
    try:
      parts = list(string.Formatter().parse(text))
    except ValueError as error:
      raise errors.InputError(f"template {name}: {error}; write {{{{ and }}}} for braces") from None
    self.fields = {field for _, field, _, _ in parts if field is not None}
    for _, field, style, conversion in parts:
      if field is not None and (not field.isidentifier() or style or conversion):
        raise errors.InputError(
          f"template {name}: {{{field}}} is no field's name; write {{{{ and }}}} for braces"
        )
    self.digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  @classmethod
  def open(cls, name: str) -> Template:
    """Opens a template by its name or as a text file.

    Raises:
      InputError: there is neither, or the text is no template.
    """
    path = FOLDER / f"{name}.txt"
    if "/" in name or not path.is_file():
      path = pathlib.Path(name).expanduser()
    try:
      text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
      names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.txt")))
      reason = getattr(error, "strerror", None) or "not UTF-8 text"
      raise errors.InputError(
        f"template={name!r}: {reason}; give a text file, or one of {names}"
      ) from None
    return cls(name, text)

  def require(self, field: str) -> None:
    """Raises InputError unless the template has this field."""
    if field not in self.fields:
      raise errors.InputError(f"template {self.name} must hold {{{field}}}")

  def fill(self, values: Mapping[str, Any]) -> str:
    """The text with its fields filled in.

    Raises:
      InputError: a value is missing or None.
    """
    for field in sorted(self.fields):
      if values.get(field) is None:
        raise errors.InputError(
          f"template {self.name} asks for {{{field}}}, which the sample does not have; "
          f"it has {', '.join(key for key in values if values[key] is not None)}"
        )
    return self._text.format_map(values)
