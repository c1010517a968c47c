"""A BAGEL that answers requests of the OpenAI protocol."""
