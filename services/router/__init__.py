"""The router: HTTP, tokenizer, scheduler, membership, placement. Holds no tensor of the model."""
