"""Presses of every kind, with arguments that suit the short texts of tests."""

PRESSES = {
    "none": {},
    "snapkv": {"window_size": 8},
    "streaming_llm": {},
    "pyramidkv": {"window_size": 4, "compression_ratio": 0.3},
    "knorm": {},
    "random": {},
    "tova": {},
    "expected_attention": {},
    "adakv:snapkv": {"window_size": 8},
    "key_rerotation:streaming_llm": {},
}
