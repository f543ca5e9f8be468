"""Reading models: shape, weights, tokenizer."""
