"""How often the loops of a compiled XLA program run."""

from __future__ import annotations

import re

from unigrpo_jax.tools.plan import hlo_text

_NOTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = {"copy", "bitcast", "convert", "reshape"}  # An integer is the same after these.


def trips(
  loop: hlo_text.Instruction, around: hlo_text.Computation,
  computations: dict[str, hlo_text.Computation],
) -> tuple[int | None, int | None]:
  """Trips of a loop, and the most that it can make; None where the text does not say.

  Read from what XLA notes at the loop, or from its condition: a counter that starts at a constant
  and grows by a constant, and is less than another. Of two conditions that must both hold, each is
  a limit.

  Args:
    loop: A "while".
    around: The computation that it stands in.
    computations: All of them, by name.
  """
  noted = _NOTED.search(loop.attributes)
  if noted:
    return int(noted[1]), int(noted[1])
  condition = computations[loop.called("condition")[0]]
  body = computations[loop.called("body")[0]]
  if condition.root.opcode == "and":
    limits = [
      _compared(part, condition, body, loop, around)
      for part in condition.operands(condition.root)
    ]
    return None, min((limit for limit in limits if limit is not None), default=None)
  found = _compared(condition.root, condition, body, loop, around)
  return found, found


def _compared(compare, condition, body, loop, around) -> int | None:
  """Trips until `counter < bound` or `counter <= bound` is false."""
  direction = compare.attribute("direction")
  if compare.opcode != "compare" or direction not in ("LT", "LE"):
    return None
  counter, bound = (
    hlo_text.source(operand, condition, _SAME) for operand in condition.operands(compare)
  )
  end = _bound(bound, body, loop, around)
  if counter.opcode != "get-tuple-element" or end is None:
    return None
  index = int(counter.attribute("index"))
  start, step = _initial(index, loop, around), _step(index, body)
  if start is None or step is None or step < 1:
    return None
  return max(0, -(-(end + (direction == "LE") - start) // step))


def _bound(value, body, loop, around) -> int | None:
  """The integer that a condition sees at `value`: a constant, or one that the loop carries."""
  if value.opcode != "get-tuple-element":
    return _integer(value)
  index = int(value.attribute("index"))
  return _initial(index, loop, around) if _step(index, body) == 0 else None


def _initial(index, loop, around) -> int | None:
  """The integer that a loop starts with at `index` of its tuple."""
  given = hlo_text.source(around.operands(loop)[0], around, _SAME)
  if given.opcode != "tuple":
    return None
  return _integer(hlo_text.source(around.operands(given)[index], around, _SAME))


def _step(index, body) -> int | None:
  """What a trip adds to the element `index` of its tuple; None where that is not a constant."""
  if body.root.opcode != "tuple":
    return None
  value = hlo_text.source(body.operands(body.root)[index], body, _SAME)
  if _is_element(value, index, body):
    return 0
  if value.opcode != "add":
    return None
  parts = [hlo_text.source(operand, body, _SAME) for operand in body.operands(value)]
  steps = [_integer(part) for part in parts if not _is_element(part, index, body)]
  return steps[0] if len(steps) == 1 else None


def _is_element(value, index, body) -> bool:
  """Whether `value` is the element `index` of the tuple that a trip is given."""
  return (
    value.opcode == "get-tuple-element" and int(value.attribute("index")) == index
    and value.operands[0] == body.parameters[0].name
  )


def _integer(value: hlo_text.Instruction) -> int | None:
  """The value of an integer constant."""
  found = value.opcode == "constant" and re.fullmatch(r"-?\d+", value.literal)
  return int(value.literal) if found else None
