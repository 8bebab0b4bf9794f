"""What people talk to: HTTP routes, request validation, tokenizer, detokenizer."""
