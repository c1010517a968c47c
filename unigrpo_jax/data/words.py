"""Prompts for text in pictures: one to four common words, quoted, in one of twenty scenes."""

from __future__ import annotations

from typing import Any
import zlib

import numpy as np

COUNTS = {"train": 20_000, "validation": 200, "test": 1000}  # Prompts by split, by default.
# Texts whose checksum leaves one of these remainders are of that split, all others of train.
_REMAINDERS = {"validation": (0, 1), "test": (2, 3, 4, 5)}
_MODULUS = 40

SCENES = (
  'A neon sign that says "{}" above the door of a small bar at night',
  'A wooden board on a beach with "{}" painted on it',
  'A chalkboard in a café on which "{}" is written',
  'A white coffee mug with the words "{}" printed on it',
  'A black T-shirt on a hanger with "{}" in large letters',
  'A road sign beside a desert highway that reads "{}"',
  'The cover of an old book with the title "{}"',
  'A birthday cake with "{}" written on it in icing',
  'A poster on a brick wall that says "{}"',
  'A shop window with "{}" in golden letters on the glass',
  'A banner between two trees in a park with the text "{}"',
  'A newspaper on a table with the headline "{}"',
  'A yellow taxi with "{}" on the sign on its roof',
  'A hand holding a card on which "{}" is written in ink',
  'A cinema at dusk whose front announces "{}"',
  'A stone gate in a garden with "{}" carved into it',
  'A paper cup on a desk with a sticker that reads "{}"',
  'Graffiti on a concrete wall that spells "{}"',
  'A hot-air balloon over hills with "{}" on its side',
  'A laptop on a bed whose screen shows "{}"',
)
WORDS = tuple("""
able above after again air all always apple arm art autumn away baby back bag ball bank bath bear
bed bell best big bird black blue boat body book both box boy bread bridge bright brown bus cake
call camp car care cat chair city class clean clear clock close cloud coat coffee cold cook corn
cup dance dark day deep dinner dog door down dream dress drink drive early earth east easy egg
energy enjoy evening every eye fair fall family farm fast field film fire first fish five floor
flower fly food forest four free fresh friend front fruit full fun game garden gate girl give
glass gold good grass great green group grow hall hand happy hat head heart here high hill home
hope horse hot hotel hour house ice idea island jump keep kind king kitchen lake land large last
late leaf learn left letter life light line lion little live long look love lunch magic main make
map market match meat meet milk mind mirror money moon more morning mountain mouse move music name
near new next nice night north number ocean off office oil old one only open orange order paint
paper park party past peace people phone piano picture place plan plant play point power price
public queen quick quiet race radio rain read ready red rest rice right ring river road rock room
rose round run sale salt school sea second sell seven shape sharp ship shop show side silver simple
sing six sky sleep slow small smile snow soft song soon soup south space spring stage star start
station stay stone stop store storm story street strong sugar summer sun sweet swim table talk
taste tea team ten test thank thing three time today top town toy train travel tree true turn two
under valley view village voice wait walk wall warm wash watch water wave way welcome west white
wild wind window winter wish wood word work world write year yellow yes young zero
""".split())
_CASES = (str.lower, str.upper, str.title)


def make(split: str, count: int) -> list[tuple[str, dict[str, Any]]]:
  """(prompt, metadata) of the first `count` prompts of a split of `COUNTS`; no two are the same.

  Metadata has the key text, what is quoted, and tag, how many words that is. A text of one split
  is in no other, in whatever case.
  """
  # Not a Generator's streams, which NumPy may change between releases.
  bits = np.random.Philox(np.random.SeedSequence([zlib.crc32(split.encode())]))
  draw = lambda options: options[int(bits.random_raw() % len(options))]
  made: dict[str, dict[str, Any]] = {}
  while len(made) < count:
    size, case, scene = draw((1, 2, 3, 4)), draw(_CASES), draw(SCENES)
    words = " ".join(draw(WORDS) for _ in range(size))
    if _split_of(words) == split:
      text = case(words)
      prompt = scene.format(text)
      made.setdefault(
        prompt, {"prompt": prompt, "tag": f"{size} word{'s' if size > 1 else ''}", "text": text}
      )
  return list(made.items())


def _split_of(words: str) -> str:
  remainder = zlib.crc32(words.encode()) % _MODULUS
  return next((s for s, remainders in _REMAINDERS.items() if remainder in remainders), "train")
