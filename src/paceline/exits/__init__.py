"""Exit policies, one a file: which layers each token runs; `base.py` has the contract."""
