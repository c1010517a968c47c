"""A vision-language model behind an OpenAI-compatible server as a reward."""
