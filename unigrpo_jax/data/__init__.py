"""Host-side data: tokenizer and image transforms."""
