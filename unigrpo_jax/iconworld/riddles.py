"""Words of the world, and the ways to say a class, a number or a colour without naming it."""

from __future__ import annotations

PLURALS = {
  "apple": "apples", "bird": "birds", "umbrella": "umbrellas", "wine glass": "wine glasses",
  "cell phone": "cell phones", "bicycle": "bicycles", "chair": "chairs", "kite": "kites",
}

# What follows "thing" or "things"; each fits one class of the world only.
DESCRIPTIONS = {
  "apple": ("with a core", "from a fruit tree", "for a pie"),
  "bird": ("with wings", "in a nest", "with a beak"),
  "umbrella": ("for wet days", "against rain", "for a storm"),
  "wine glass": ("for a toast", "with a thin stem", "for a drink"),
  "cell phone": ("for calls", "with a screen", "for messages"),
  "bicycle": ("with pedals", "with two wheels", "for a ride"),
  "chair": ("to sit on", "at a table", "with four legs"),
  "kite": ("on a string", "for windy days", "for a strong breeze"),
}

# What follows "the colour of".
EXAMPLES = {
  "red": ("a ripe tomato", "a fire engine", "blood"),
  "orange": ("a carrot", "a pumpkin", "a tiger"),
  "yellow": ("the sun", "a lemon", "butter"),
  "green": ("grass", "a frog", "a leaf"),
  "blue": ("the sea", "the sky", "a sapphire"),
  "purple": ("lavender", "a plum", "grapes"),
  "pink": ("a flamingo", "a pig", "bubble gum"),
  "brown": ("chocolate", "a bear", "coffee"),
}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# "a kite with a bird to its left"
CONVERSES = {
  "left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it",
}

# The words before what is asked for.
OPENINGS = ("draw", "show", "paint", "a picture of", "a photo of")


def arithmetic(number: int) -> tuple[str, ...]:
  """Ways to say a number of 1 to 4 by a sum: "half of six", "three minus one", "twice two"."""
  ways = [f"half of {NUMBERS[2 * number]}"]
  if number % 2 == 0:
    ways.append(f"twice {NUMBERS[number // 2]}")
  ways += [f"{NUMBERS[number + less]} minus {NUMBERS[less]}" for less in (1, 2, 3)]
  ways += [f"{NUMBERS[part]} plus {NUMBERS[number - part]}" for part in range(1, number)]
  return tuple(ways)
