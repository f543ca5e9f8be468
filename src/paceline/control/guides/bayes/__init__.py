"""What guides by Bayes' rule share."""
