"""GenEval: its classes, prompts, rules and table; numpy alone."""
