"""Summaries of benchmarks recorded from other projects: GenEval's."""

from __future__ import annotations

from tests.parity import cases
from unigrpo_jax.benchmarks import geneval


@cases.case("reward")
def geneval_summary(folder, rec):
  for m in rec.matches(r"(geneval(?:/.+)?)/correct"):
    name = m[1]
    made = geneval.summary(
      rec[m[0]].tolist(), rec[f"{name}/tag"].tolist(), rec[f"{name}/prompt"].tolist()
    )
    means = [part.mean for part in made.tasks.values()]
    rec.check("geneval", f"{name}/task_scores", means, cases.FORMULA)
    rec.check("geneval", f"{name}/overall", made.overall.mean, cases.FORMULA)
    rec.check("geneval", f"{name}/images_correct", made.images, cases.FORMULA)
    rec.check("geneval", f"{name}/prompts_correct", made.prompts, cases.FORMULA)
