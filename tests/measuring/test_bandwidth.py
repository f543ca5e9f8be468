from dataclasses import replace

from paceline.machine import largest_cache
from paceline.measuring.bandwidth import bytes_per_token, measure_bandwidth
from paceline.models.config import LayerConfig
from tests.toy import ToyEngine


def test_the_buffer_is_far_larger_than_the_cache():
    found = measure_bandwidth(threads=2, repeats=1)
    assert found.threads == 2
    assert found.buffer_bytes >= max(256 << 20, 8 * largest_cache())
    assert 1e8 < found.bytes_per_second < 1e13


def test_bytes_of_a_token_are_matrices_and_what_attention_sees():
    engine = ToyEngine()
    layers = (LayerConfig(2, 1, 3, 5), LayerConfig(2, 1, 3, 5, window=8))
    engine.config = replace(engine.config, layers=layers)
    assert bytes_per_token(engine, 100) is None
    engine.weight_bytes = 1000
    assert bytes_per_token(engine, 100) == 1000 + 4 * 2 * 3 * (100 + 8)
