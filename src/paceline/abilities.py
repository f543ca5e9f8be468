"""Abilities: what an engine, a format, a cache or an installation can do, and what a method needs.

`compatibility.py` holds the table of what composes; both sides name abilities from here.
"""

from __future__ import annotations

from enum import StrEnum


class Ability(StrEnum):
    """One thing that can be offered by one side and needed by the other."""

    LAYERS = "layers"  # run some layers only, and give logits behind any of them
    POSITIONS = "positions"  # attend to some committed positions only
    TOKENS = "tokens"  # compute the logits of some tokens only
    MIXTURES = "mixtures"  # run a node that is a weighted sum of token embeddings
    HIDDEN = "hidden"  # return the hidden states that the head was given
    ATTENTION_MASS = "attention mass"  # sum the attention that each cached position received
    KEYS = "keys"  # return the keys and values that the cache holds
    QUERIES = "queries"  # keep the queries of the last positions
    SURPRISAL = "surprisal"  # keep how improbable each committed token was
    STORED_PAGES = "stored pages"  # hand out cached keys and values, and take them back
    APPEND_ROWS = "append rows"  # commit positions by given keys and values
    EVICT = "evict"  # drop committed rows of the cache and go on with the others
    GRADIENT = "gradient"  # differentiate the model's blocks
    ENSEMBLE = "ensemble"  # several models behind one engine
    SANDBOX = "sandbox"  # run the programs that a model writes, isolated
    TORCH = "torch"  # torch is installed
