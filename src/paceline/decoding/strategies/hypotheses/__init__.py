"""What searches share: hypotheses with their caches, and scores of what may come next."""
